"""The network's operations: the fastest form that was measured for the active backend.

Each backend's module has the functions of `keras_mnv2.ops.default`, which describes them.
"""

import importlib

import keras

_fast = {"tensorflow", "jax", "torch"}
_name = keras.backend.backend() if keras.backend.backend() in _fast else "default"
_module = importlib.import_module(f"keras_mnv2.ops.{_name}")

batch_normalization = _module.batch_normalization
block_in_chunks = _module.block_in_chunks
call_of = _module.call_of
compiled = _module.compiled
convolution = _module.convolution
depthwise_convolution = _module.depthwise_convolution
fake_quantize = _module.fake_quantize
fold = _module.fold
folds_noted = _module.folds_noted
is_compiling = _module.is_compiling
is_watched = _module.is_watched
known = _module.known
lay_out = _module.lay_out
moving_average = _module.moving_average
network_in_chunks = _module.network_in_chunks
normalize = _module.normalize
note = _module.note
numbers = _module.numbers
relu6 = _module.relu6
resize = _module.resize
run_later = _module.run_later
runs_directly = _module.runs_directly
settled = _module.settled
train_block = _module.train_block
uncompiled = _module.uncompiled
versions = _module.versions
