"""The optimiser of a recipe, and its learning rates over the steps."""

import keras
import numpy as np

from ..config import Config
from ..parallel import engines
from ..parallel.engines import Engine


def compile_model(
    model: keras.Model, config: Config, steps: int, engine: Engine = engines.ONE_DEVICE
) -> tuple[keras.metrics.Metric, keras.metrics.Metric]:
    """Gives `model` the recipe's optimiser, schedule and loss, for epochs of so many steps.

    Returns:
        The running means of the loss and of the accuracy.
    """
    with engine.scope():
        optimizer = make_optimizer(config, steps)
        if config.optimizer != "adamw" and config.weight_decay:
            # Keras's `weight_decay` is decoupled; this adds `weight_decay * w` to the gradient, before the momentum.
            for variable in model.trainable_variables:
                if variable.name == "kernel":
                    variable.regularizer = keras.regularizers.L2(config.weight_decay / 2)
    accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
    model.compile(optimizer, loss=loss, metrics=None if engine.own_step else [accuracy])
    with engine.scope():
        # A checkpoint has its variables from the first step on.
        optimizer.build(model.trainable_variables)
    return next(metric for metric in model.metrics if metric.name == "loss"), accuracy


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
    """The schedule of a run: linear warm-up, then a cosine to 0, a staircase, or a constant.

    The cosine is Loshchilov and Hutter's (2017), the staircase `learning_rate * decay_rate ** epoch`, the paper's
    (section 6.1) and torchvision's, counted from the end of the warm-up.

    Args:
        config: its `schedule`, `learning_rate`, `decay_rate`, `warmup_epochs` and `epochs`.
        steps_per_epoch: steps of the optimiser.
    """
    schedules = keras.optimizers.schedules
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        left = max(1, steps_per_epoch * config.epochs - warmup)
        if warmup:
            return schedules.CosineDecay(0.0, left, warmup_target=config.learning_rate, warmup_steps=warmup)
        return schedules.CosineDecay(config.learning_rate, left)
    rate = config.decay_rate if config.schedule == "exponential" else 1.0
    after = schedules.ExponentialDecay(config.learning_rate, steps_per_epoch, rate, staircase=True)
    return Warmup(after, warmup) if warmup else after
