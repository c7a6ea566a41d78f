"""When a phase's state is saved, what it holds beside the model, and how a phase goes on from it."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from .. import files
from ..config import Config
from ..state import checkpoints
from ..state.checkpoints import State
from ..state.run_folder import Run
from ..state.signals import Stopped
from .network import for_inference

# What Keras's early stopping knows, beside its best weights.
STOPPING = ("best", "wait", "best_epoch", "stopped_epoch")


class Diverged(ValueError):
    """The loss or a weight is no number any more; `state` is the last good one."""

    def __init__(self, message: str, state: State | None):
        super().__init__(message)
        self.state = state


@dataclass(eq=False)
class Saver:
    """Takes the state after a step, writes it when it is due, and puts it back.

    A state is that of the weights that are trained: it is taken within `fit`, before their average takes their place.

    Args:
        run: this run; its first process alone writes.
        config: of the phase.
        phase: its name.
        steps: of an epoch.
        model: compiled.
        means: its running means.
        stopping: Keras's early stopping, whose state is part of it, or None.
        beside: the weights of an earlier phase that checkpoints shall hold, too.
    """

    run: Run
    config: Config
    phase: str
    steps: int
    model: keras.Model
    means: Sequence[keras.Metric]
    stopping: keras.callbacks.EarlyStopping | None
    beside: Sequence[np.ndarray]
    epoch: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    """What each epoch's logs were, for the whole phase."""
    logs: dict[str, float] = field(default_factory=dict)
    """Of the last step of the epoch."""
    trained: list[np.ndarray] = field(default_factory=list)
    """The weights after that step, where an average takes their place."""
    _written: State | None = None
    _last_step: State | None = None
    _written_at: float = float("-inf")
    _found_means: list[np.ndarray] = field(default_factory=list)

    def restore(self) -> tuple[int, int]:
        """Puts back what the run goes on from, if it is of this phase, and gives the epoch and step (both done)."""
        state = self.run.taken(self.phase)
        if state is None:
            return 0, 0
        checkpoints.put(self.model, state)
        position = state.position
        self._written, self._written_at = state, time.monotonic()
        self.history = position["history"]
        if self.stopping is not None:
            for name, value in position["stopping"].items():
                setattr(self.stopping, name, value)
            self.stopping.best_weights = state.group("best") or None
        epoch, step = position["epoch"], position["step"]
        if step == self.steps:
            self._end_of_epoch(position["logs"])
        elif step:
            self._found_means = state.group("metrics")
        return epoch, step

    def restore_means(self) -> None:
        """Gives the running means what they had in an epoch that goes on."""
        if self._found_means:
            checkpoints.assign(self._means_variables(), self._found_means)
            self._found_means = []

    def begin(self, epoch: int) -> None:
        """An epoch; before the first one of all, what cannot be written is known."""
        self.epoch = epoch
        if self.run.channel.main and self._written is None:
            self._write(self._take(0, None))

    def after(self, step: int, logs: Mapping[str, float], stopping: bool) -> None:
        """Saves what is due after a step, and always the last one before the end.

        Raises:
            Stopped: where the training shall stop.
            Diverged: where a weight is no number.
        """
        last = step == self.steps
        if last:
            self._end_of_epoch(logs)
        every = self.config.checkpoint_steps
        due = time.monotonic() - self._written_at >= self.config.checkpoint_seconds
        due |= every is not None and (self.epoch * self.steps + step) % every == 0
        if self.run.channel.main and (stopping or due or last):
            state = self._take(step, logs)
            if not all(np.isfinite(array).all() for array in state.group("weights")):
                raise self.diverged("A weight is no number any more", step)
            self._last_step = state
            if stopping or due:
                self._write(state)
        if stopping:
            raise Stopped(self._told(step), agreed=True)

    @contextlib.contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Writes the last step of an epoch if the signal comes in its validation."""
        try:
            yield
        except Stopped as stopped:
            if self._last_step is not None and self._last_step is not self._written:
                self.run.channel.leave()
                self._write(self._last_step)
                raise Stopped(self._told(self.steps)) from stopped
            raise

    def diverged(self, what: str, step: int) -> Diverged:
        """The error that ends this process; the others may end from now on."""
        self.run.channel.leave()
        good = self.run.checkpoints.newest() if self.run.channel.main else None
        told = f"{what} after step {step} of {self.steps} in epoch {self.epoch + 1}"
        return Diverged(f"{told}: a smaller learning_rate than {self.config.learning_rate:g} may help.", good)

    def _end_of_epoch(self, logs):
        self.logs = dict(logs)
        if self.config.ema is not None:
            self._synchronize()
            # Copies: on a CPU an array may be a view of what the next step overwrites.
            self.trained = [np.array(weight) for weight in self.model.get_weights()]

    def _take(self, step, logs):
        self._synchronize()
        early = {name: getattr(self.stopping, name) for name in STOPPING} if self.stopping else {}
        history = {name: list(values) for name, values in self.history.items()}
        more = {"logs": logs and dict(logs), "history": history, "stopping": early}
        position = self.run.position(self.phase, self.epoch, step, **more)
        state = checkpoints.take(self.model, self._means_variables(), position)
        best = (self.stopping and self.stopping.best_weights) or []
        for name, group in (("best", best), ("trained", self.beside)):
            state.arrays |= {f"{name}/{i:04d}": array for i, array in enumerate(group)}
        return state

    def _write(self, state):
        self.run.checkpoints.write(state)
        self._written = state
        self._written_at = time.monotonic()

    def _synchronize(self):
        """On JAX `fit` keeps the variables' values to itself."""
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()

    def _means_variables(self):
        return [variable for metric in self.means for variable in metric.variables]

    def _told(self, step):
        return (
            f"Stopped after step {step} of {self.steps} in epoch {self.epoch + 1}, which is saved: the same command "
            "with --resume goes on."
        )


def trained_weights(run: Run, model: keras.Model) -> list[np.ndarray]:
    """The weights after the training, which a checkpoint holds from now on."""
    state, run.resumed = run.resumed, None
    if state is None:
        weights = model.get_weights()
        if run.channel.main:
            arrays = {f"weights/{i:04d}": weight for i, weight in enumerate(weights)}
            run.checkpoints.write(State(arrays, run.position("trained", 0, 0)))
        return weights
    if state.position["phase"] != "trained":
        # Of the quantisation: it has the trained weights beside its own.
        run.resumed = state
    weights = state.group("trained" if run.resumed else "weights")
    model.set_weights(weights)
    return weights


def keep_good_weights(run: Run, model: keras.Model, size: int, error: Diverged) -> str:
    """Saves the last good weights as a model, and gives a sentence for the error."""
    if error.state is None or not run.channel.main:
        return str(error)
    position = error.state.position
    if position["phase"] == "quantize_history":
        return f"{error} {run.folder / 'model.keras'} has the weights before the quantisation."
    path = run.folder / "last_good.keras"
    with files.beside(path) as part:
        for_inference(model, size, error.state.group("weights")).save(part)
    return (
        f"{error} The last good weights, after step {position['step']} in epoch {position['epoch'] + 1}, are in {path}."
    )
