"""The optimiser of a recipe, and its learning rates over the steps."""

from typing import Any

import keras
import numpy as np

import keras_mnv2

from ..config import Config
from ..data.masks import IGNORED
from ..parallel import engines
from ..parallel.engines import Engine


def compile_model(
    model: keras.Model, config: Config, steps: int, engine: Engine = engines.ONE_DEVICE
) -> tuple[keras.metrics.Metric, ...]:
    """Gives `model` the recipe's optimiser, schedule and loss, for epochs of so many steps.

    Returns:
        The running means of the loss and of the task's measure; of detection of the loss and its two parts.
    """
    with engine.scope():
        optimizer = make_optimizer(config, steps)
        if config.optimizer != "adamw" and config.weight_decay:
            # Keras's `weight_decay` is decoupled; this adds `weight_decay * w` to the gradient, before the momentum.
            for variable in model.trainable_variables:
                if variable.name == "kernel":
                    variable.regularizer = keras.regularizers.L2(config.weight_decay / 2)
    measure: keras.metrics.Metric
    if config.task == "detection":
        model.compile(optimizer, loss=box_losses())
        with engine.scope():
            optimizer.build(model.trainable_variables)
            # Keras makes the means of the two losses when it computes them first; a checkpoint holds them.
            found = {name: keras.ops.zeros((1, *y.shape[1:])) for name, y in model.output.items()}
            boxes = found["boxes"].shape[1]
            nothing = {"boxes": keras.ops.zeros((1, boxes, 5)), "classes": keras.ops.zeros((1, boxes), "int32")}
            model.compute_loss(None, nothing, found)
            model.reset_metrics()
        return tuple(model.metrics)
    if config.task == "segmentation":
        classes = model.output_shape[-1]
        measure = PixelIoU(classes, config.measure, ignore_class=IGNORED, sparse_y_pred=False)
    else:
        measure = keras.metrics.CategoricalAccuracy(name=config.measure)
    model.compile(optimizer, loss=loss_of(config), metrics=None if engine.own_step else [measure])
    with engine.scope():
        # A checkpoint has its variables from the first step on.
        optimizer.build(model.trainable_variables)
    return next(metric for metric in model.metrics if metric.name == "loss"), measure


class PixelIoU(keras.metrics.MeanIoU):
    """Keras's, counted by a product of matrices: its scatter takes seconds for a batch of images on PyTorch 2.14."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Counts the pixels of labels (batch, height, width) and scores (batch, height, width, classes)."""
        ops = keras.ops
        # A row for each pixel; that of an ignored label has no 1.
        labels, found = (
            ops.cast(ops.reshape(each, (-1, 1)) == ops.arange(self.num_classes, dtype="int32"), "float32")
            for each in (ops.cast(y_true, "int32"), ops.cast(ops.argmax(y_pred, -1), "int32"))
        )
        counts = ops.matmul(ops.transpose(labels), found)
        self.total_cm.assign_add(ops.cast(counts, self.total_cm.dtype))


def loss_of(config: Config, reduction: str = "sum_over_batch_size") -> keras.losses.Loss:
    """The task's loss: the cross-entropy of images, or of the pixels that count."""
    if config.task == "segmentation":
        return keras.losses.SparseCategoricalCrossentropy(True, ignore_class=IGNORED, reduction=reduction)
    return keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing, reduction=reduction)


def box_losses() -> dict[str, keras.losses.Loss]:
    """The losses of detection, which are added up, by the outputs of `SSDLite`."""
    return {"boxes": keras_mnv2.losses.BoxLoss(), "classes": keras_mnv2.losses.ClassLoss()}


def make_optimizer(config: Config, steps: int) -> keras.optimizers.Optimizer:
    """The recipe's optimiser with its schedule."""
    rates = learning_rates(config, steps)
    ema = {"use_ema": config.ema is not None, "ema_momentum": config.ema or 0.99}
    optimizer: keras.optimizers.Optimizer
    if config.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(rates, weight_decay=config.weight_decay, **ema)
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    elif config.optimizer == "sgd":
        optimizer = keras.optimizers.SGD(rates, config.momentum, nesterov=config.nesterov, **ema)
    else:
        # Decay and epsilon of the authors' training script (tensorflow/models, research/slim).
        optimizer = keras.optimizers.RMSprop(rates, rho=0.9, momentum=config.momentum, epsilon=1.0, **ema)
    return optimizer


def use_average(model: keras.Model) -> None:
    """Puts the average of the weights in their place, which `fit` of Keras does too, at its end."""
    model.optimizer.finalize_variable_values(model.trainable_variables)
    if keras.backend.backend() == "jax":
        # Keras 3.15 leaves both in one buffer, which the next call gives away: findings/keras-jax-ema-one-buffer.sh.
        model.set_weights([np.array(weight) for weight in model.get_weights()])


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly from 0 over the first steps (Goyal et al. 2017, section 2.2), then follows another schedule.

    Args:
        after: the schedule that follows, counted from the end of the rise.
        steps: of the rise.
    """

    def __init__(self, after: keras.optimizers.schedules.LearningRateSchedule, steps: int):
        self.after = after
        self.steps = steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        fraction = keras.ops.minimum(step / self.steps, 1.0)
        return fraction * self.after(keras.ops.maximum(step - self.steps, 0.0))

    def get_config(self):
        return {"after": keras.saving.serialize_keras_object(self.after), "steps": self.steps}


def learning_rates(config: Config, steps_per_epoch: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """The schedule of a run: linear warm-up, then a cosine to 0, a power of what is left, a staircase, or a constant.

    The cosine is Loshchilov and Hutter's (2017). The power is DeepLab's "poly" (Chen et al. 2017, arXiv 1606.00915,
    section 4.1): `learning_rate * (1 - step / steps) ** power`, over the steps after the warm-up. The staircase is
    `learning_rate * decay_rate ** epoch`, the paper's (section 6.1) and torchvision's, counted from the end of the
    warm-up.

    Args:
        config: its `schedule`, `learning_rate`, `power`, `decay_rate`, `warmup_epochs` and `epochs`.
        steps_per_epoch: steps of the optimiser.
    """
    schedules = keras.optimizers.schedules
    warmup = round(config.warmup_epochs * steps_per_epoch)
    left = max(1, steps_per_epoch * config.epochs - warmup)
    after: keras.optimizers.schedules.LearningRateSchedule
    if config.schedule == "cosine":
        if warmup:
            return schedules.CosineDecay(0.0, left, warmup_target=config.learning_rate, warmup_steps=warmup)
        return schedules.CosineDecay(config.learning_rate, left)
    if config.schedule == "poly":
        after = schedules.PolynomialDecay(config.learning_rate, left, end_learning_rate=0.0, power=config.power)
    else:
        rate = config.decay_rate if config.schedule == "exponential" else 1.0
        after = schedules.ExponentialDecay(config.learning_rate, steps_per_epoch, rate, staircase=True)
    return Warmup(after, warmup) if warmup else after
