#!/usr/bin/env bash
# MNN 3.6.1: starting its converter has whichever `pip` is first on PATH install a logging package and what that needs.
#
# Guess before it was run: `mnnconvert`, of a package that needs NumPy alone, reads a file, writes a file, and leaves the
# environment as it is.
# Seen: as long as `aliyun` cannot be imported each start runs `pip install -U aliyun-log-python-sdk`. Called by its path
# from an environment of its own, it found another environment's pip on PATH. There protobuf went from version 7 to 5,
# and TensorFlow 2.21 no longer imported (VersionError of protobuf). Here a recorder stands in the place of pip.
# Who meets it: who converts a model where other things are installed. Put MNN's own environment first on PATH.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q MNN==3.6.1 onnx==1.23.2
mkdir "$folder/first"
cat > "$folder/first/pip" <<SH
#!/bin/sh
echo "pip \$*" >> "$folder/asked.txt"
SH
chmod +x "$folder/first/pip"
cat > "$folder/write.py" <<'PY'
import onnx
from onnx import TensorProto, helper

shape = [1, 4]
graph = helper.make_graph(
    [helper.make_node("Relu", ["x"], ["y"])],
    "relu",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "relu.onnx")
PY
cd "$folder"
venv/bin/python write.py
PATH="$folder/first:$PATH" venv/bin/mnnconvert -f ONNX --modelFile relu.onnx --MNNModel relu.mnn --bizCode x > said.txt 2>&1
ls -l relu.mnn
cat asked.txt
grep -qx 'pip install -U aliyun-log-python-sdk' asked.txt
