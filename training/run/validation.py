"""Validation: the loss and accuracy of all images, on any number of processes."""

import keras
import numpy as np

from ..config import Config
from ..data.batches import Batches
from ..parallel import engines
from ..state.run_folder import Run


def validate(run: Run, config: Config, model: keras.Model, batches: Batches) -> dict[str, float]:
    """`val_loss` and `val_accuracy`. Keras's own would know one process's images alone, and take means over batches.

    Raises:
        Stopped: where a signal has come.
    """
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing, reduction="none")
    predict = run.engine.predictor(model)
    sums = np.zeros(3)
    for images, labels in batches.stream(epochs=1):
        run.stop.check()
        scores = predict(images)
        with engines.own_cpu():
            losses = keras.ops.convert_to_numpy(loss(labels, scores))
        right = scores.argmax(1) == labels.argmax(1)
        sums += len(labels), losses.sum(dtype="float64"), right.sum()
    count, loss_sum, right = run.channel.sum(sums)
    # Of the weights alone, as `fit` reports it too.
    penalty = sum(float(keras.ops.convert_to_numpy(part)) for part in model.losses)
    return {"val_accuracy": float(right / count), "val_loss": float(loss_sum / count) + penalty}
