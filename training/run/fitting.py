"""The training of one phase. `fit` is its whole course, an epoch after the other, and `Step` all that a step is.

A step, in this order: `Batches` has made the batch ahead, `Step.on_train_batch_begin` seeds what it draws, Keras's own
train step (on several devices the engine's) computes it, and `Step.on_train_batch_end` looks at the loss, agrees with
the other processes, saves, stops, and shows the progress.
"""

import contextlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from .. import files
from ..config import Config
from ..data.inputs import Inputs
from ..state import checkpoints
from ..state.run_folder import Run
from .optimizers import compile_model, use_average
from .progress import Progress
from .saving import Saver
from .validation import validate

STOP, BAD = 1, 2  # Flags on which the processes agree after each step.


def fit(
    run: Run,
    config: Config,
    phase: str,
    model: keras.Model,
    inputs: Inputs,
    beside: Sequence[np.ndarray] = (),
) -> dict[str, list[float]]:
    """Compiles and trains, from the run's checkpoint if it is of this phase. Each epoch is a call of `model.fit`.

    Args:
        run: this run.
        config: of this phase.
        phase: its name, and that of the CSV file in the run folder that gets a line an epoch.
        model: of the engine.
        inputs: of this process.
        beside: the weights of an earlier phase that checkpoints shall hold, too, as the group `trained`.

    Returns:
        The history.

    Raises:
        Stopped: where a signal came; the last step is saved.
        ValueError: where the loss is no number any more; the last good weights are saved.
    """
    train = inputs.train
    steps = config.steps_per_epoch or len(train)
    means = compile_model(model, config, steps, run.engine)
    stopping = early_stopping(config)
    hearing = [stopping] if stopping else []
    if config.tensorboard and run.channel.main:
        hearing.append(keras.callbacks.TensorBoard(run.folder / "tensorboard" / phase, write_graph=False))
    # Keras's own callbacks that hear of epochs alone. What happens at a step is in `Step`.
    listeners = keras.callbacks.CallbackList(hearing, model=model, epochs=config.epochs, steps=steps)
    listeners.on_train_begin()
    saver = Saver(run, config, phase, steps, model, means, stopping, beside)
    epoch, step = saver.restore()
    run.engine.spread_seeds(checkpoints.seeds(model), 1)
    run.engine.install(model, *means)
    model.stop_training = False
    progress = Progress(train, model, config.epochs, steps)
    each_step = Step(run, config, means, saver, progress)
    with contextlib.closing(train.stream(*divmod(epoch * steps + step, len(train)))) as stream, run.stop.waiting():
        while epoch < config.epochs and not model.stop_training:
            progress.begin(epoch, step)
            listeners.on_epoch_begin(epoch)
            saver.begin(epoch)
            each_step.begin(epoch, step)
            if step < steps:
                model.fit(
                    train.for_fit(itertools.islice(stream, steps - step), inputs.class_weight),
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    steps_per_epoch=steps - step,
                    shuffle=False,  # Keras warns of a generator that it cannot shuffle.
                    callbacks=[each_step],
                    verbose=0,
                )
            if config.ema is not None:
                use_average(model)
            with saver.saved_when_stopped():
                logs = {**saver.logs, **validate(run, config, model, inputs.validation)}
            logs |= progress.end(logs)
            for name, value in logs.items():
                saver.history.setdefault(name, []).append(value)
            if run.channel.main:
                write_table(saver.history, run.folder / f"{phase}.csv")
            listeners.on_epoch_end(epoch, logs)
            epoch, step = epoch + 1, 0
            if config.ema is not None and epoch < config.epochs and not model.stop_training:
                model.set_weights(saver.trained)
        listeners.on_train_end()
    run.stop.check()
    run.engine.spread_seeds(checkpoints.seeds(model), -1)
    return saver.history


class Step(keras.callbacks.Callback):
    """What happens before and after each step of `fit`, in the order of the lines."""

    def __init__(self, run: Run, config: Config, means: Sequence[keras.Metric], saver: Saver, progress: Progress):
        super().__init__()
        self.run = run
        self.config = config
        self.means = means
        self.saver = saver
        self.progress = progress
        self.epoch = 0
        self.first = 0
        """Step of the epoch that the next call of `fit` starts with."""
        self.begun = 0.0

    def begin(self, epoch: int, first: int) -> None:
        """An epoch, of which `fit` will do the steps from `first` on."""
        self.epoch, self.first = epoch, first

    def on_epoch_begin(self, epoch, logs=None):
        for metric in self.means:
            # Keras knows of those alone that its own step has used.
            metric.reset_state()
        self.saver.restore_means()

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = time.monotonic()
        self.run.engine.seed_step((self.config.seed, self.epoch, self.first + batch))

    def on_train_batch_end(self, batch, logs=None):
        step = self.first + batch + 1
        bad = not all(map(np.isfinite, logs.values()))
        flags = self.run.channel.agree(BAD * bad + STOP * (self.run.stop.signal is not None))
        self.run.stop.took(time.monotonic() - self.begun)
        if flags & BAD:
            raise self.saver.diverged(f"The loss is {logs['loss']}", step)
        if flags & STOP:
            self.run.stop.in_time()
        self.saver.after(step, logs, stopping=bool(flags & STOP))
        self.progress.show(step, logs)


def early_stopping(config: Config) -> keras.callbacks.EarlyStopping | None:
    """Keras's callback, which keeps the weights of the best epoch."""
    if not config.early_stopping:
        return None
    return keras.callbacks.EarlyStopping(
        f"val_{config.measure}", patience=config.early_stopping, restore_best_weights=True, mode="max"
    )


def write_table(history: dict[str, list[float]], path: Path) -> None:
    """Writes the history as a CSV file, a line an epoch."""
    lines = [",".join(["epoch", *history])]
    lines += [",".join(map(str, [i, *row])) for i, row in enumerate(zip(*history.values(), strict=True))]
    files.write(path, ("\n".join(lines) + "\n").encode())
