"""What happens around the steps of `fit`: checkpoints, signals, validation, the table of the history."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from .. import files
from ..config import Config
from ..data.batches import Batches
from ..parallel import engines
from ..state import checkpoints
from ..state.checkpoints import State
from ..state.run_folder import Run
from ..state.signals import GRACE, Stopped

STOP, BAD = 1, 2  # Flags on which the workers agree after each step.


def metrics_variables(metrics: Sequence[keras.metrics.Metric]) -> list[keras.Variable]:
    """The variables of running means."""
    return [variable for metric in metrics for variable in metric.variables]


class Leg(keras.callbacks.Callback):
    """Hands what happens in a call of `fit` on to the callbacks of the whole training, which see no break."""

    def __init__(self, whole, progress, means, averaged):
        super().__init__()
        self.whole = whole
        self.progress = progress
        self.means = means
        self.averaged = averaged
        self.weights: list[np.ndarray] = []

    def start(self, step: int, state: State | None) -> None:
        """Says at which step the first epoch starts, and which running means it has then."""
        self.first = self.progress.first = step
        self.found_means = state.group("metrics") if state is not None and step else None

    def finish(self, epoch: int, logs: dict[str, float]) -> None:
        """Ends an epoch whose steps an earlier start has done."""
        self.progress.first = self.progress.steps
        self.whole.on_epoch_begin(epoch)
        self.whole.on_epoch_end(epoch, dict(logs))

    def on_epoch_begin(self, epoch, logs=None):
        for metric in self.means:
            # Keras knows of those alone that its own step has used.
            metric.reset_state()
        if self.found_means is not None:
            checkpoints.assign(metrics_variables(self.means), self.found_means)
        self.whole.on_epoch_begin(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        self.whole.on_train_batch_begin(self.first + batch)

    def on_train_batch_end(self, batch, logs=None):
        self.logs = logs
        self.whole.on_train_batch_end(self.first + batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        # The last step's: `finish` has no others.
        self.whole.on_epoch_end(epoch, dict(self.logs))
        if self.averaged:
            self.weights = self.model.get_weights()
        self.first = self.progress.first = 0
        self.found_means = None


class Safety(keras.callbacks.Callback):
    """Writes checkpoints, and ends the training at a signal or a loss that is no number.

    It stands first: what it takes at the beginning of an epoch and after a step are the weights that are trained.
    """

    def __init__(self, run, config, phase, steps, means, history, stopping, beside):
        super().__init__()
        self.run = run
        self.config = config
        self.phase = phase
        self.steps = steps
        self.means = means
        self.history = history
        self.stopping = stopping
        self.beside = beside
        self.epoch = 0
        self.last: State | None = None
        self.pending: State | None = None
        self.last_write = float("-inf")

    def restore(self, state: State) -> None:
        """Gives the callbacks what they had; their training has begun."""
        place = state.place
        self.last = state
        self.last_write = time.monotonic()
        self.history.history, self.history.epoch = place["history"], list(range(place["epoch"]))
        if self.stopping is not None:
            for name, value in place["stopping"].items():
                setattr(self.stopping, name, value)
            self.stopping.best_weights = state.group("best") or None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        if self.run.channel.main and self.last is None:
            # Before anything is lost: what cannot be written is known now.
            self._write(self._take(0, None))

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = time.monotonic()
        self.run.engine.seed_step((self.config.seed, self.epoch, batch))

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        bad = not all(map(np.isfinite, logs.values()))
        flags = self.run.channel.agree(BAD * bad + STOP * (self.run.stop.signal is not None))
        # A signal in the next step waits for it, however slow the steps are.
        self.run.stop.grace = max(GRACE, 2 * (time.monotonic() - self.begun))
        if flags & BAD:
            self._diverged(f"The loss is {logs['loss']}", step)
        stopping = bool(flags & STOP)
        if stopping:
            self.run.stop.in_time()
        every = self.config.checkpoint_steps
        due = time.monotonic() - self.last_write >= self.config.checkpoint_seconds
        due |= every is not None and (self.epoch * self.steps + step) % every == 0
        if self.run.channel.main and (stopping or due or step == self.steps):
            state = self._take(step, logs)
            if not all(np.isfinite(array).all() for array in state.group("weights")):
                self._diverged("A weight is no number any more", step)
            self.pending = state
            if stopping or due:
                self._write(state)
        if stopping:
            raise Stopped(self._told(step), agreed=True)

    @contextlib.contextmanager
    def saved_when_stopped(self):
        """Writes the last step of an epoch if the signal comes in its validation."""
        try:
            yield
        except Stopped as stopped:
            if not stopped.agreed and self.pending is not None and self.pending is not self.last:
                self.run.channel.leave()
                self._write(self.pending)
                raise Stopped(self._told(self.pending.place["step"])) from stopped
            raise

    def _take(self, step, logs):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        names = ("best", "wait", "best_epoch", "stopped_epoch") if self.stopping else ()
        early = {name: getattr(self.stopping, name) for name in names}
        history = {name: list(values) for name, values in self.history.history.items()}
        more = {"logs": logs and dict(logs), "history": history, "stopping": early}
        place = self.run.place(self.phase, self.epoch, step, **more)
        state = checkpoints.take(self.model, metrics_variables(self.means), place)
        best = (self.stopping and self.stopping.best_weights) or []
        for name, group in (("best", best), ("trained", self.beside)):
            state.arrays |= {f"{name}/{i:04d}": array for i, array in enumerate(group)}
        return state

    def _write(self, state):
        self.run.checkpoints.write(state)
        self.last = state
        self.last_write = time.monotonic()

    def _told(self, step):
        return (
            f"Stopped after step {step} of {self.steps} in epoch {self.epoch + 1}, which is saved: the same command "
            "with --resume goes on."
        )

    def _diverged(self, what, step):
        told = f"{what} after step {step} of {self.steps} in epoch {self.epoch + 1}"
        self.run.channel.leave()
        good = self.run.checkpoints.newest() if self.run.channel.main else None
        raise Diverged(f"{told}: a smaller learning_rate than {self.config.learning_rate:g} may help.", good)


class Diverged(ValueError):
    """The loss or a weight is no number any more; `checkpoint` is the last good one."""

    def __init__(self, message: str, checkpoint: State | None):
        super().__init__(message)
        self.checkpoint = checkpoint


class Validation(keras.callbacks.Callback):
    """Adds `val_loss` and `val_accuracy` to the logs of an epoch: those of all images, on any number of workers."""

    def __init__(self, run: Run, config: Config, batches: Batches):
        super().__init__()
        self.run = run
        self.config = config
        self.batches = batches

    def on_epoch_end(self, epoch, logs=None):
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=self.config.label_smoothing, reduction="none")
        predict = self.run.engine.predictor(self.model)
        sums = np.zeros(3)
        for images, labels in self.batches.stream(epochs=1):
            self.run.stop.check()
            scores = predict(images)
            with engines.own_cpu():
                losses = keras.ops.convert_to_numpy(loss(labels, scores))
            right = scores.argmax(1) == labels.argmax(1)
            sums += len(labels), losses.sum(dtype="float64"), right.sum()
        images, loss_sum, right = self.run.channel.sum(sums)
        # Of the weights alone, as `fit` reports it too.
        penalty = sum(float(keras.ops.convert_to_numpy(part)) for part in self.model.losses)
        logs["val_accuracy"] = float(right / images)
        logs["val_loss"] = float(loss_sum / images) + penalty


class Table(keras.callbacks.Callback):
    """Writes the history as a CSV file, a line an epoch."""

    def __init__(self, history: keras.callbacks.History, path: Path):
        super().__init__()
        self.history = history
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        columns = self.history.history
        lines = [",".join(["epoch", *columns])]
        lines += [",".join(map(str, [i, *row])) for i, row in enumerate(zip(*columns.values(), strict=True))]
        files.write(self.path, ("\n".join(lines) + "\n").encode())
