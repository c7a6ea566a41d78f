"""Images of the size of other images."""

from typing import Any

import keras

from keras_mnv2 import ops
from keras_mnv2.annotations import Shape, Tensor
from keras_mnv2.arguments import data_format_name
from keras_mnv2.layers.fusing import Simple


@keras.saving.register_keras_serializable("keras_mnv2")
class ResizeLike(Simple):
    """Resizes images to the height and width of others, bilinearly, whatever these are.

    Corners are not aligned: pixels are areas, as in `torch.nn.functional.interpolate(align_corners=False)` and
    `tf.image.resize`. An image of one pixel is repeated.

    Args:
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras's setting.
        **kwargs: of `keras.layers.Layer`: name, dtype, trainable.

    Input shape:
        A list of two: the images (batch, height, width, channels), and those whose size they get.

    Output shape:
        (batch, height and width of the second, channels of the first).

    Raises:
        ValueError: on an unknown data format, or inputs that are not two images.

    Examples:
        >>> tuple(ResizeLike()([np.ones((2, 3, 3, 8)), np.ones((2, 33, 47, 3))]).shape)
        (2, 33, 47, 8)
    """

    def __init__(self, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_format = data_format_name(data_format)

    def build(self, input_shape: Any) -> None:
        if len(input_shape) != 2 or any(len(shape) != 4 for shape in input_shape):
            raise ValueError(f"inputs must be a list of two batches of images, got the shapes {input_shape}.")

    def call(self, inputs: list[Tensor]) -> Tensor:
        x, like = inputs
        axes = (1, 2) if self.data_format == "channels_last" else (2, 3)
        size = [keras.ops.shape(like)[axis] for axis in axes]
        if all(x.shape[axis] == 1 for axis in axes):
            shape = list(keras.ops.shape(x))
            for axis, side in zip(axes, size, strict=True):
                shape[axis] = side
            return keras.ops.broadcast_to(x, shape)
        return ops.resize(x, size, self.data_format)

    def compute_output_shape(self, input_shape: Any) -> Shape:
        x, like = (list(shape) for shape in input_shape)
        axes = slice(1, 3) if self.data_format == "channels_last" else slice(2, 4)
        x[axes] = like[axes]
        return tuple(x)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "data_format": self.data_format}
