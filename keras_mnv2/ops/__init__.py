"""The network's operations: the fastest form that was measured for the active backend.

Each backend's module has the functions of `keras_mnv2.ops.default`, which describes them.
"""

import importlib

import keras

_FAST = ("tensorflow", "jax", "torch")
_backend = keras.backend.backend()
_implementation = importlib.import_module(f"keras_mnv2.ops.{'default' if True else _backend}")

batch_normalization = _implementation.batch_normalization
convolution = _implementation.convolution
depthwise_convolution = _implementation.depthwise_convolution
