#!/usr/bin/env bash
# Keras 3.15.1: of two outputs of a nested model, in a list, the logs have one loss; the other's value is lost.
#
# Guess before it was run: `both_loss` and `both_loss_1`, as the metrics are `both_mae` and `both_mae_1`.
# Seen: the losses of both outputs have the name of the layer that they leave, so that the second one's overwrites the
# first one's. `evaluate` without `return_dict` gives the second one's number twice. The sum is right, and so is the
# training. Outputs in a dict, or of layers of their own, have a loss each.
# Who meets it: who puts a network with two outputs inside another model, and watches the loss of one of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2
cat > "$folder/run.py" <<'PY'
import keras
import numpy as np

image = keras.Input((4,))
heads = [keras.layers.Dense(1, name=name)(image) for name in ("age", "height")]
inner = keras.Model(image, heads, name="both")
outer = keras.Model(image, inner(image))
named = keras.Model(image, dict(zip(("a", "h"), inner(image))))
x, age, height = np.zeros((4, 4)), np.full((4, 1), 1.0), np.full((4, 1), 10.0)
for model in (inner, outer, named):
    y = [age, height] if model is not named else {"a": age, "h": height}
    model.compile("sgd", loss="mse", metrics=[["mae"], ["mae"]] if model is not named else None)
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    print(keras.__version__, {name: round(float(value)) for name, value in sorted(logs.items())})
print(keras.__version__, [round(float(value)) for value in outer.evaluate(x, [age, height], verbose=0)])
PY
cd "$folder"
KERAS_BACKEND=jax venv/bin/python run.py 2>/dev/null | tee seen.txt
cat > expected.txt <<'TXT'
3.15.1 {'age_loss': 1, 'age_mae': 1, 'height_loss': 100, 'height_mae': 10, 'loss': 101}
3.15.1 {'both_loss': 100, 'both_mae': 1, 'both_mae_1': 10, 'loss': 101}
3.15.1 {'a_loss': 1, 'h_loss': 100, 'loss': 101}
3.15.1 [101, 100, 100, 1, 10]
TXT
diff seen.txt expected.txt
