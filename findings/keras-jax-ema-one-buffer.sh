#!/usr/bin/env bash
# Keras 3.15.1 on JAX: after `fit` with an optimiser of `use_ema=True`, a second `fit` fails, or `predict` makes it fail.
#
# Guess before it was run: `fit` goes on where it ended, as without the average, and as on TensorFlow.
# Seen: `fit` ends with the average in the place of the weights, as one buffer with the optimiser's own. The next step
# gives its buffers away, this one twice, and what comes out is "TypeError: 'NoneType' object is not callable", raised
# while the model is put in order after the real error. `predict` in between gives the buffer away too, after which
# the optimiser's average is deleted. With `model.set_weights(model.get_weights())` after `fit` all goes on.
# Who meets it: who trains in several calls of `fit`, such as head first and then all, with an average of the weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 tensorflow==2.21.0 jax==0.10.2
cat > "$folder/run.py" <<'PY'
import keras
import numpy as np

x, y = np.ones((8, 4), "float32"), np.zeros((8, 2), "float32")


def fitted(mend=False, predict=False):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
    model.fit(x, y, verbose=0)
    if mend:
        model.set_weights([np.array(weight) for weight in model.get_weights()])
    if predict:
        model.predict(x, verbose=0)
    return model


def told(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "fine"


def averages(model):
    return [np.array(variable) for variable in model.optimizer.variables if variable.path.endswith("average")]


name = f"{keras.__version__} {keras.backend.backend()}"
print(name, "second fit:", told(lambda: fitted().fit(x, y, verbose=0)))
print(name, "mended:", told(lambda: fitted(mend=True).fit(x, y, verbose=0)))
print(name, "average after predict:", told(lambda: averages(fitted(predict=True))))
PY
cd "$folder"
for backend in tensorflow jax; do
  KERAS_BACKEND=$backend TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python run.py 2>/dev/null | tee "$backend.txt"
done
for what in "second fit" mended "average after predict"; do
  grep -qx "3.15.1 tensorflow $what: fine" tensorflow.txt
done
grep -qx "3.15.1 jax second fit: TypeError: 'NoneType' object is not callable" jax.txt
grep -qx "3.15.1 jax mended: fine" jax.txt
grep -q "3.15.1 jax average after predict: RuntimeError: Array has been deleted" jax.txt
