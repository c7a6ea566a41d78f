"""The network that a recipe trains, and the one that is left of it for inference."""

import keras
import numpy as np

import keras_mnv2

from ..config import Config


def build_model(
    config: Config, classes: int, channels: int, size: int | None, norm_layer: str = "batch_norm"
) -> keras.Model:
    """The recipe's model, which takes raw images of `size` pixels a side, or of any."""
    return keras_mnv2.MobileNetV2(
        input_shape=(size, size, channels),
        alpha=config.alpha,
        weights=config.weights,
        classes=classes,
        inverted_residual_setting=config.stages,
        stem_stride=config.stem_stride,
        dropout=config.dropout,
        norm_layer=norm_layer,
        include_preprocessing=True,
        dtype="float32" if config.precision == "float32" else f"mixed_{config.precision}",
        name=f"mobilenetv2_{config.recipe}",
    )


def for_inference(model: keras.Model, size: int, weights: list[np.ndarray] | None = None) -> keras.Model:
    """The trained network as a model that is not compiled, for images of `size`: no optimiser goes into its file.

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
    # Not `clone_model`, which compiles its copy of a compiled model.
    final = type(model).from_config(config)
    final.set_weights(model.get_weights() if weights is None else weights)
    final.trainable = True
    return final
