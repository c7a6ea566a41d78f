"""Learning rates over the steps of a run."""

import keras

from ..config import Config


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
        share = keras.ops.minimum(step / self.steps, 1.0)
        return share * self.after(keras.ops.maximum(step - self.steps, 0.0))

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
