#!/usr/bin/env bash
# Keras 3.15.1 on PyTorch 2.14.1: the sparse cross-entropy of the probabilities of pixels has no gradient.
#
# Guess before it was run: `sparse_categorical_crossentropy` of (2, 5, 4, 3) has a gradient with `from_logits` and without.
# Seen: without, "RuntimeError: grad_input must be contiguous". Keras hands PyTorch's `nll_loss` the logarithms with the
# classes moved to the second axis, and its gradient takes no tensor that lies so. With logits, whose softmax is computed
# in between, all is fine.
# Who meets it: who trains a network of segmentation that ends in a softmax.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 torch==2.14.1
cat > "$folder/run.py" <<'PY'
import keras
import torch


def told(loss):
    try:
        loss.sum().backward()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "fine"


labels = torch.zeros(2, 5, 4, dtype=torch.int64)
scores = torch.rand(2, 5, 4, 3).softmax(-1).requires_grad_()
for logits in (True, False):
    loss = keras.ops.sparse_categorical_crossentropy(labels, scores, from_logits=logits)
    print("logits:" if logits else "probabilities:", told(loss))
moved = scores.detach().requires_grad_().log().permute(0, 3, 1, 2)
print("nll_loss:", told(torch.nn.functional.nll_loss(moved, labels)))
PY
cd "$folder"
KERAS_BACKEND=torch venv/bin/python run.py 2>/dev/null | tee found.txt
grep -qx "logits: fine" found.txt
grep -qx "probabilities: RuntimeError: grad_input must be contiguous" found.txt
grep -qx "nll_loss: RuntimeError: grad_input must be contiguous" found.txt
