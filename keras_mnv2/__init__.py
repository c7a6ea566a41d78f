"""MobileNetV2 for Keras 3 on TensorFlow, JAX and PyTorch."""

from keras_mnv2 import layers
from keras_mnv2.cost import CostProfile, cost_profile
from keras_mnv2.export import export
from keras_mnv2.fold import fold_batch_norm
from keras_mnv2.model import MobileNetV2
from keras_mnv2.preprocessing import preprocess_input

__version__ = "0.1.0"
__all__ = ["CostProfile", "MobileNetV2", "cost_profile", "export", "fold_batch_norm", "layers", "preprocess_input"]
