"""The two losses of SSD (Liu et al. 2016, arXiv 1512.02325, section 2.2), for `compile`."""

from typing import Any

import keras

from keras_mnv2.annotations import Tensor
from keras_mnv2.checks import check_positive


@keras.saving.register_keras_serializable("keras_mnv2")
class BoxLoss(keras.losses.Loss):
    """Smooth L1 of the matched boxes (Girshick 2015, arXiv 1504.08083, equation 3), over their number in the batch.

    Of a batch without any it is 0. Data-parallel replicas divide by the number in their own part.

    Args:
        reduction: of Keras's losses, over the images of the batch.
        name: of the loss.
        **kwargs: of `keras.losses.Loss`: dtype.

    Call arguments:
        y_true: (batch, boxes, 5), the `"boxes"` of `keras_mnv2.TargetEncoder`.
        y_pred: (batch, boxes, 4), the `"boxes"` of `keras_mnv2.SSDLite`.

    Examples:
        >>> y_true = np.array([[[0.0, 0, 0, 0, 1], [0.0, 0, 0, 0, 0]]])
        >>> float(BoxLoss()(y_true, np.full((1, 2, 4), 0.5)))
        0.5
    """

    def __init__(
        self, reduction: str | None = "sum_over_batch_size", name: str | None = "box_loss", **kwargs: Any
    ) -> None:
        super().__init__(name=name, reduction=reduction, **kwargs)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        y_true = keras.ops.cast(y_true, y_pred.dtype)
        matched = y_true[..., 4]
        error = keras.ops.abs(y_pred - y_true[..., :4])
        smooth = keras.ops.sum(keras.ops.where(error < 1, 0.5 * error * error, error - 0.5), axis=-1)
        return _of_images(keras.ops.sum(smooth * matched, axis=-1), matched)


@keras.saving.register_keras_serializable("keras_mnv2")
class ClassLoss(keras.losses.Loss):
    """Cross-entropy of the matched boxes and of the hardest others, over the number of matched ones in the batch.

    Of each image the boxes of background that the network is most wrong about count, up to three for each matched box
    (hard negative mining). An image without objects counts nothing.

    Args:
        negatives: how many of them for each matched box.
        reduction: of Keras's losses, over the images of the batch.
        name: of the loss.
        **kwargs: of `keras.losses.Loss`: dtype.

    Call arguments:
        y_true: (batch, boxes), the `"classes"` of `keras_mnv2.TargetEncoder`: 0 is background.
        y_pred: (batch, boxes, classes + 1), the `"classes"` of `keras_mnv2.SSDLite`.

    Raises:
        ValueError: on a number of negatives that is not above 0.

    Examples:
        >>> round(float(ClassLoss()(np.array([[1, 0, 0, 0, 0]]), np.zeros((1, 5, 2)))), 3)  # 4 log 2
        2.773
    """

    def __init__(
        self,
        negatives: float = 3.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = "class_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, reduction=reduction, **kwargs)
        self.negatives = check_positive("negatives", negatives)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        labels = keras.ops.cast(y_true, "int32")
        matched = keras.ops.cast(labels > 0, y_pred.dtype)
        loss = keras.ops.sparse_categorical_crossentropy(labels, y_pred, from_logits=True)
        # Of the others the largest: a sum over sorted values has the gradient of the sum over those that were chosen.
        hardest = -keras.ops.sort(-loss * (1 - matched), axis=-1)
        ranks = keras.ops.cast(keras.ops.arange(y_pred.shape[1]), y_pred.dtype)
        chosen = keras.ops.cast(
            ranks[None] < self.negatives * keras.ops.sum(matched, axis=-1, keepdims=True), y_pred.dtype
        )
        return _of_images(keras.ops.sum(loss * matched + hardest * chosen, axis=-1), matched)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "negatives": self.negatives}


def _of_images(loss: Tensor, matched: Tensor) -> Tensor:
    """The loss of each image such that its mean is the sum over the number of matched boxes in the batch."""
    images = keras.ops.cast(keras.ops.shape(matched)[0], loss.dtype)
    return loss * (images / keras.ops.maximum(keras.ops.sum(matched), 1.0))
