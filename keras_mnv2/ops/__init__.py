"""The network's operations: the fastest form that was measured for the active backend.

`keras_mnv2.ops.default` has and describes all of them, and each backend's module those that are faster otherwise.
"""

import importlib
from typing import Any

import keras

from keras_mnv2.ops import default

_fast = {"tensorflow", "jax", "torch"}
_name = keras.backend.backend() if keras.backend.backend() in _fast else "default"
_module = importlib.import_module(f"keras_mnv2.ops.{_name}")


def _fastest(name: str) -> Any:
    return getattr(_module, name, getattr(default, name))


batch_normalization = _fastest("batch_normalization")
block_in_chunks = _fastest("block_in_chunks")
call_of = _fastest("call_of")
compiled = _fastest("compiled")
convolution = _fastest("convolution")
fake_quantize = _fastest("fake_quantize")
fold = _fastest("fold")
folds_noted = _fastest("folds_noted")
is_compiling = _fastest("is_compiling")
is_watched = _fastest("is_watched")
known = _fastest("known")
lay_out = _fastest("lay_out")
moving_average = _fastest("moving_average")
network_in_chunks = _fastest("network_in_chunks")
normalize = _fastest("normalize")
note = _fastest("note")
numbers = _fastest("numbers")
relu6 = _fastest("relu6")
resize = _fastest("resize")
round_to_multiples = _fastest("round_to_multiples")
run_later = _fastest("run_later")
runs_directly = _fastest("runs_directly")
settled = _fastest("settled")
take_of_rows = _fastest("take_of_rows")
train_block = _fastest("train_block")
uncompiled = _fastest("uncompiled")
versions = _fastest("versions")
