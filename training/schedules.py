"""Learning rates over the steps of a run."""

import keras


def warmup_cosine(peak: float, steps: int, warmup_steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Rises linearly from 0 to `peak`, then falls along a cosine to 0 (Loshchilov and Hutter 2017).

    Args:
        peak: the highest learning rate.
        steps: of the whole run.
        warmup_steps: of the rise, less than `steps`.
    """
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup_steps), warmup_target=peak, warmup_steps=warmup_steps
    )
