"""The network's operations: the fastest form that was measured for the active backend.

Each backend's module has the functions of `keras_mnv2.ops.default`, which describes them.
"""

import importlib

import keras

_fast = {"tensorflow", "jax", "torch"}
_name = keras.backend.backend() if keras.backend.backend() in _fast else "default"
_module = importlib.import_module(f"keras_mnv2.ops.{_name}")

batch_normalization = _module.batch_normalization
convolution = _module.convolution
depthwise_convolution = _module.depthwise_convolution
relu6 = _module.relu6
