"""The layers of the network.

`MobileNetV2` is a graph of Keras's layers, one for each operation (`parts`); what runs is `fusing`'s. A block as one
layer is `InvertedResidual` (`compact`), of three `ConvNormActivation`.
"""

from keras_mnv2.layers.compact import ConvNormActivation, InvertedResidual, ScaleShift
from keras_mnv2.layers.detections import DefaultBoxes, Detections, JoinMaps
from keras_mnv2.layers.parts import Add, BatchNormalization, Conv2D, DepthwiseConv2D, ReLU, ZeroPadding2D
from keras_mnv2.layers.resize import ResizeLike

__all__ = [
    "Add",
    "BatchNormalization",
    "Conv2D",
    "ConvNormActivation",
    "DefaultBoxes",
    "DepthwiseConv2D",
    "Detections",
    "InvertedResidual",
    "JoinMaps",
    "ReLU",
    "ResizeLike",
    "ScaleShift",
    "ZeroPadding2D",
]
