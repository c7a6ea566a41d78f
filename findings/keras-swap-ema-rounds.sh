#!/usr/bin/env bash
# Keras 3.15.1: SwapEMAWeights changes the weights that are trained, on TensorFlow alone.
#
# Guess before it was run: the callback swaps, so that a swap there and back leaves each number as it was.
# Seen: on TensorFlow it adds and subtracts (a + b, then minus the one, then minus the other), so that what comes back
# is rounded to the precision of the larger of weight and average. A weight of 1e-4 beside an average of 1 comes back
# with an error of 2e-4 of itself; on JAX and PyTorch it is the same bit for bit. So each validation moves the training
# a little, and a run with the callback differs from one without.
# Who meets it: who compares backends, or wants the same training with and without validation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 tensorflow==2.21.0 jax==0.10.2
cat > "$folder/run.py" <<'PY'
import keras
import numpy as np

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
model.optimizer.build(model.trainable_variables)
before = np.full((4, 2), 1.2345678e-4, "float32")
model.set_weights([before])
(average,) = (variable for variable in model.optimizer.variables if variable.path.endswith("average"))
average.assign(np.ones((4, 2), "float32"))
callback = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
callback.set_params({"epochs": 3})
callback.set_model(model)
callback.on_epoch_end(0)
assert np.abs(model.get_weights()[0] - 1).max() < 1e-6
callback.on_epoch_begin(1)
error = np.abs(model.get_weights()[0] - before).max() / before.max()
print(keras.__version__, keras.backend.backend(), "the same" if error == 0 else f"off by {error:.0e} of itself")
PY
cd "$folder"
for backend in tensorflow jax; do
  KERAS_BACKEND=$backend TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python run.py 2>/dev/null | tee "$backend.txt"
done
grep -qx "3.15.1 jax the same" jax.txt
grep -q "3.15.1 tensorflow off by .* of itself" tensorflow.txt
