"""MobileNetV2 for Keras 3 on TensorFlow, JAX and PyTorch."""

import keras_mnv2.start

import keras_mnv2.backend  # noqa: F401  It chooses what Keras starts.  isort: skip

from keras_mnv2 import applications, layers, losses
from keras_mnv2.classifier import Classifier, load_classifier
from keras_mnv2.cost import CostProfile, cost_profile
from keras_mnv2.drawing import draw_detections, draw_mask, palette
from keras_mnv2.fold import fold_batch_norm
from keras_mnv2.folders import class_folders
from keras_mnv2.formats.accelerate import Accelerated, accelerate
from keras_mnv2.formats.comparison import ExportReport
from keras_mnv2.formats.export import export
from keras_mnv2.formats.runtimes import load_export
from keras_mnv2.freeze import freeze, unfreeze
from keras_mnv2.model import MobileNetV2
from keras_mnv2.photographs import evaluation_data
from keras_mnv2.predictors import Detector, Segmenter, load_detector, load_segmenter
from keras_mnv2.preprocessing import (
    decode_predictions,
    load_image,
    preprocess_input,
    probabilities,
    resize_and_crop,
)
from keras_mnv2.quantize import quantize_aware
from keras_mnv2.stock import from_keras
from keras_mnv2.tasks.detection import SSDLite, TargetEncoder, detector
from keras_mnv2.tasks.segmentation import DeepLabV3
from keras_mnv2.weights.load import load_weights, save_weights
from keras_mnv2.weights.table import Checkpoint, Preprocessing, SegmentationCheckpoint, list_weights

__version__ = "0.1.0"
__all__ = [
    "Accelerated",
    "Checkpoint",
    "Classifier",
    "CostProfile",
    "DeepLabV3",
    "Detector",
    "ExportReport",
    "MobileNetV2",
    "Preprocessing",
    "SSDLite",
    "SegmentationCheckpoint",
    "Segmenter",
    "TargetEncoder",
    "accelerate",
    "applications",
    "class_folders",
    "cost_profile",
    "decode_predictions",
    "detector",
    "draw_detections",
    "draw_mask",
    "evaluation_data",
    "export",
    "fold_batch_norm",
    "freeze",
    "from_keras",
    "layers",
    "list_weights",
    "load_classifier",
    "load_detector",
    "load_export",
    "load_image",
    "load_segmenter",
    "load_weights",
    "losses",
    "palette",
    "preprocess_input",
    "probabilities",
    "quantize_aware",
    "resize_and_crop",
    "save_weights",
    "unfreeze",
]
