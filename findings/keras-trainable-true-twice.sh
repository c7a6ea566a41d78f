#!/usr/bin/env bash
# Keras 3.15.1: `model.trainable = True` thaws layers that were frozen one by one on JAX and PyTorch, and none on TensorFlow.
#
# Guess before it was run: 158 trainable weights on each backend, as the setter's docstring says ("sets trainable
# attribute for the layer and its sublayers").
# Seen: on TensorFlow 0. The model's own value is True already, and assigning an attribute the value that it has is
# skipped there, so that the setter does not run. `model.trainable = False` first makes it run.
# Who meets it: scripts that freeze `base.layers` in a loop, and unfreeze with `base.trainable = True` for fine-tuning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 tensorflow==2.21.0 jax==0.10.2
cat > "$folder/run.py" <<'PY'
import keras

model = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=None)
for layer in model.layers:
    layer.trainable = False
model.trainable = True
first = len(model.trainable_weights)
model.trainable = False
model.trainable = True
print(keras.__version__, keras.backend.backend(), first, len(model.trainable_weights))
PY
cd "$folder"
for backend in tensorflow jax; do
  KERAS_BACKEND=$backend TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python run.py 2>/dev/null | tee "$backend.txt"
done
grep -qx '3.15.1 tensorflow 0 158' tensorflow.txt
grep -qx '3.15.1 jax 158 158' jax.txt
