"""`keras.applications`' names: a script for it needs one word changed, `keras` to `keras_mnv2`."""

from keras_mnv2.applications import mobilenet_v2
from keras_mnv2.applications.mobilenet_v2 import MobileNetV2

__all__ = ["MobileNetV2", "mobilenet_v2"]
