"""Copies weights between this package's model and its peers."""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_mnv2.layers import ConvNormActivation, InvertedResidual


class Convolution(NamedTuple):
    """What the weights of a convolution lie in: a kernel, whether it is depthwise, and the batch norm behind it."""

    kernel: Any
    depthwise: bool
    norm: Any


def convs(model):
    """Every `Convolution` in the order of computation, of a model of either form."""
    for layer in model.layers:
        if isinstance(layer, InvertedResidual | ConvNormActivation):
            parts = layer.convolutions().values() if isinstance(layer, InvertedResidual) else [layer]
            yield from (Convolution(conv.kernel, conv.groups > 1, conv.norm) for conv in parts)
        elif isinstance(layer, keras.layers.BatchNormalization):
            conv = layer.input._keras_history.operation
            yield Convolution(conv.kernel, isinstance(conv, keras.layers.DepthwiseConv2D), layer)


def exact_batch_norms(model):
    """Lets Keras's batch norms infer in the model's own precision.

    Keras's `BatchNormalization` asks `result_type(dtype, "float32")` for its precision, which is float32 for
    float64 on JAX and PyTorch (3.15.1).
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.call = functools.partial(_infer_batch_norm, layer)


def _infer_batch_norm(layer, inputs, training=None, mask=None):
    scale = layer.gamma / keras.ops.sqrt(layer.moving_variance + layer.epsilon)
    return (inputs - layer.moving_mean) * scale + layer.beta


def copy_keras_applications(source, model):
    """From `keras.applications.MobileNetV2`, whose layers come in the same order."""
    kernels = [layer for layer in source.layers if "Conv2D" in type(layer).__name__]
    norms = [layer for layer in source.layers if type(layer).__name__ == "BatchNormalization"]
    ours = list(convs(model))
    assert len(ours) == len(kernels) == len(norms)
    for conv, kernel, norm in zip(ours, kernels, norms, strict=True):
        conv.kernel.assign(np.array(kernel.get_weights()[0]))
        conv.norm.set_weights(norm.get_weights())
    if any(layer.name == "predictions" for layer in model.layers):
        model.get_layer("predictions").set_weights(source.get_layer("predictions").get_weights())


def torch_pairs(source, model):
    """(variable, tensor, axes that bring the tensor to the variable's layout) of torchvision's model."""
    import torch

    kernels = [m for m in source.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in source.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    ours = list(convs(model))
    assert len(ours) == len(kernels) == len(norms)
    for conv, kernel, norm in zip(ours, kernels, norms, strict=True):
        yield conv.kernel, kernel.weight, (2, 3, 0, 1) if conv.depthwise else (2, 3, 1, 0)
        yield conv.norm.gamma, norm.weight, (0,)
        yield conv.norm.beta, norm.bias, (0,)
        yield conv.norm.moving_mean, norm.running_mean, (0,)
        yield conv.norm.moving_variance, norm.running_var, (0,)
    dense = model.get_layer("predictions")
    yield dense.kernel, source.classifier[1].weight, (1, 0)
    yield dense.bias, source.classifier[1].bias, (0,)


def copy_torchvision(source, model):
    """From torchvision's `mobilenet_v2`."""
    for variable, tensor, axes in torch_pairs(source, model):
        variable.assign(np.transpose(tensor.detach().numpy(), axes))
