"""The network that a recipe trains, and the one that is left of it for inference."""

from typing import Any

import keras
import numpy as np

import keras_mnv2

from ..config import Config


def build_model(
    config: Config, classes: int, channels: int, size: int | None, norm_layer: str = "batch_norm"
) -> keras.Model:
    """The recipe's model, which takes raw images of `size` pixels a side, or of any."""
    common: dict[str, Any] = {
        "input_shape": (size, size, channels),
        "alpha": config.alpha,
        "weights": config.weights,
        "classes": classes,
        "dropout": config.dropout,
        "include_preprocessing": True,
        "dtype": "float32" if config.precision == "float32" else f"mixed_{config.precision}",
    }
    if config.task == "segmentation":
        return keras_mnv2.DeepLabV3(
            **common,
            weights_backbone=config.weights_backbone,
            output_stride=config.output_stride,
            aspp=config.aspp or None,
            # The loss is that of logits: that of the probabilities of pixels fails on PyTorch 2.14
            # (findings/keras-torch-sparse-crossentropy.sh).
            classifier_activation=None,
            name=f"deeplabv3_{config.recipe}",
        )
    if config.task == "detection":
        del common["dropout"]
        scales: dict[str, Any] = {} if config.box_scales is None else {"scales": config.box_scales}
        return keras_mnv2.SSDLite(
            **common,
            weights_backbone=config.weights_backbone,
            reduce_lowest=config.reduce_lowest,
            name=f"ssdlite_{config.recipe}",
            **scales,
        )
    return keras_mnv2.MobileNetV2(
        **common,
        inverted_residual_setting=config.stages,
        stem_stride=config.stem_stride,
        norm_layer=norm_layer,
        name=f"mobilenetv2_{config.recipe}",
    )


def for_inference(model: keras.Model, size: int, weights: list[np.ndarray] | None = None) -> keras.Model:
    """The trained network as a model that is not compiled, for images of `size`: no optimiser goes into its file.

    Of detection it is `keras_mnv2.detector`, which gives boxes, scores and classes.

    Args:
        model: that was trained.
        size: side of the images, in pixels.
        weights: by default the model's.
    """
    config = model.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, size, size, model.input.shape[-1])
    for layer in config["layers"]:
        if layer["config"].get("norm_layer") == "sync_batch_norm":
            layer["config"]["norm_layer"] = "batch_norm"
        if layer["config"]["name"] == "mask":
            # Of segmentation, which is trained on logits.
            layer["config"]["activation"] = "softmax"
    # Not `clone_model`, which compiles its copy of a compiled model.
    final = type(model).from_config(config)
    final.set_weights(model.get_weights() if weights is None else weights)
    final.trainable = True
    return keras_mnv2.detector(final) if isinstance(final.output, dict) else final
