"""Validation: the loss and the measure of all images, on any number of processes."""

import keras
import numpy as np

from ..config import Config
from ..data.batches import Batches
from ..parallel import engines
from ..report import metrics
from ..state.run_folder import Run
from .optimizers import loss_of


def validate(run: Run, config: Config, model: keras.Model, batches: Batches) -> dict[str, float]:
    """`val_loss` and `val_accuracy`, or `val_mean_iou` of all pixels.

    Keras's own would know one process's images alone, and take means over batches.

    Raises:
        Stopped: where a signal has come.
    """
    loss = loss_of(config, reduction="none")
    predict = run.engine.predictor(model)
    loss_sum, counts = 0.0, np.zeros((batches.classes,) * 2 if config.task == "segmentation" else 2)
    for images, labels in batches.stream(epochs=1):
        run.stop.check()
        scores = predict(images)
        with engines.own_cpu():
            loss_sum += keras.ops.convert_to_numpy(loss(labels, scores)).sum(dtype="float64")
        if config.task == "segmentation":
            counts += metrics.pixel_matrix(labels, scores.argmax(-1), batches.classes)
        else:
            counts += (scores.argmax(1) == labels.argmax(1)).sum(), len(labels)
    loss_sum, *found = run.channel.sum([loss_sum, *counts.ravel()])
    counts = np.reshape(found, counts.shape)
    if config.task == "segmentation":
        count, measure = counts.sum(), metrics.mean_iou(counts)
    else:
        count, measure = counts[1], counts[0] / counts[1]
    # Of the weights alone, as `fit` reports it too.
    penalty = sum(float(keras.ops.convert_to_numpy(part)) for part in model.losses)
    return {f"val_{config.measure}": float(measure), "val_loss": float(loss_sum / count) + penalty}
