#!/usr/bin/env bash
# transformers 5.23.0: one training step of MobileNetV2 replaces 99.7 % of each batch norm's moving statistics.
#
# Guess before it was run: about 0.3 % of the way, since 0.997 is the share of the old statistics that the authors'
# TensorFlow code keeps in a step.
# Seen: 99.7 %. The number stands in PyTorch's argument `momentum`, which is the share of the new statistics.
# Who meets it: who fine-tunes the published checkpoints with batch norms that train; in evaluation the model then
# computes with the statistics of the last batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.23.0 torch==2.14.1
cat > "$folder/run.py" <<'PY'
import torch
import transformers

torch.manual_seed(0)
config = transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.35)
model = transformers.MobileNetV2ForImageClassification(config).train()
norm = model.mobilenet_v2.conv_stem.first_conv.normalization
norm.running_mean.fill_(1000.0)
seen = {}
norm.register_forward_hook(lambda module, inputs, output: seen.update(mean=inputs[0].mean((0, 2, 3)).detach()))
model(torch.rand(8, 3, 64, 64))
moved = (1000 - norm.running_mean) / (1000 - seen["mean"])
print(transformers.__version__, norm.momentum, round(float(moved.mean()), 3))
PY
cd "$folder"
venv/bin/python run.py 2>/dev/null | tee found.txt
grep -qx '5.23.0 0.997 0.997' found.txt
