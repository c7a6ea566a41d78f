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
calls_directly = _module.calls_directly
convolution = _module.convolution
depthwise_convolution = _module.depthwise_convolution
fake_quantize = _module.fake_quantize
lay_out_kernel = _module.lay_out_kernel
network_in_chunks = _module.network_in_chunks
relu6 = _module.relu6
