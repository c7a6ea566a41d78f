"""The training itself: `model.fit` with what makes it exact to go on, on one device or many."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training import checkpoints, engines, schedules
from training.batches import Batches
from training.checkpoints import Checkpoint
from training.config import Config
from training.engines import Engine
from training.progress import Progress
from training.stopping import GRACE, Stop, Stopped
from training.workers import Workers

STOP, BAD = 1, 2  # Flags on which the workers agree after each step.


@dataclasses.dataclass
class Run:
    """What all parts of a run share.

    Attributes:
        config: the settings, the learning rate and the batch as the workers have scaled them.
        path: the run folder.
        engine: of the backend.
        workers: the processes.
        stop: the signals.
        folder: the checkpoints.
        resumed: the checkpoint that the run goes on from, until its phase has taken it.
        done: what the phases that have ended have found, by their names.
        fingerprint: of the data set.
        before: seconds of the run before this start.
    """

    config: Config
    path: Path
    engine: Engine
    workers: Workers
    stop: Stop
    folder: checkpoints.Folder
    resumed: Checkpoint | None = None
    done: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: dict[str, str] = dataclasses.field(default_factory=dict)
    before: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Of the run until now, over all its starts."""
        return self.before + time.perf_counter() - self.started

    def place(self, phase: str, epoch: int, step: int, **more: Any) -> dict[str, Any]:
        """What a checkpoint says of where it was taken."""
        own = {"backend": keras.backend.backend(), "seconds": self.seconds, "fingerprint": self.fingerprint}
        return {"phase": phase, "epoch": epoch, "step": step, "done": self.done, **own, **more}

    def phase(self, name: str, make: Callable[[], Any]) -> Any:
        """What the phase `name` found: of an earlier start, or of `make` now."""
        if name not in self.done:
            self.done[name] = make()
        return self.done[name]


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
    return next(metric for metric in model.metrics if metric.name == "loss"), accuracy


def make_optimizer(config: Config, steps: int) -> keras.optimizers.Optimizer:
    """The recipe's optimiser with its schedule."""
    rates = schedules.learning_rates(config, steps)
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


def fit(
    run: Run,
    config: Config,
    phase: str,
    model: keras.Model,
    train: Batches,
    validation: Batches,
    class_weight: dict[int, float] | None,
    beside: Sequence[np.ndarray] = (),
) -> dict[str, list[float]]:
    """Compiles and trains, from the run's checkpoint if it is of this phase.

    Args:
        run: this run.
        config: of this phase.
        phase: its name, and that of the CSV file in the run folder that gets a line an epoch.
        model: of the engine.
        train: of this process.
        validation: of this process.
        class_weight: of each class, or None.
        beside: the weights of an earlier phase that checkpoints shall hold, too, as the group `trained`.

    Returns:
        The history.

    Raises:
        Stopped: where a signal came; the last step is saved.
        ValueError: where the loss is no number any more; the last good weights are saved.
    """
    steps = config.steps_per_epoch or len(train)
    means = compile_model(model, config, steps, run.engine)
    with run.engine.scope():
        model.optimizer.build(model.trainable_variables)
    history = keras.callbacks.History()
    stopping = None
    if config.early_stopping:
        stopping = keras.callbacks.EarlyStopping(
            "val_accuracy", patience=config.early_stopping, restore_best_weights=True, mode="max"
        )
    safety = Safety(run, config, phase, steps, means, history, stopping, beside)
    progress = Progress(train, config.epochs, steps)
    callbacks: list[keras.callbacks.Callback] = [safety]
    if config.ema is not None:
        # What follows sees the average.
        callbacks.append(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    callbacks += [Validation(run, config, validation), progress, history]
    if run.workers.main:
        callbacks.append(Table(history, run.path / f"{phase}.csv"))
        if config.tensorboard:
            callbacks.append(keras.callbacks.TensorBoard(run.path / "tensorboard" / phase, write_graph=False))
    if stopping is not None:
        callbacks.append(stopping)
    whole = keras.callbacks.CallbackList(callbacks, model=model, epochs=config.epochs, steps=steps)
    whole.on_train_begin()
    epoch, step, state = 0, 0, None
    if run.resumed is not None and run.resumed.place["phase"] == phase:
        state, run.resumed = run.resumed, None
        epoch, step = state.place["epoch"], state.place["step"]
        checkpoints.put(model, state)
        safety.restore(state)
    run.engine.spread_seeds(checkpoints.seeds(model), 1)
    run.engine.install(model, *means)
    model.stop_training = False
    leg = Leg(whole, progress, means, config.ema is not None)
    with run.stop.waiting(), safety.saved_when_stopped():
        if state is not None and step == steps:
            leg.finish(epoch, state.place["logs"])
            epoch, step = epoch + 1, 0
        while epoch < config.epochs and not model.stop_training:
            # A call for what is left of an epoch, and one for all others.
            last = epoch + 1 if step else config.epochs
            leg.start(step, state)
            model.fit(
                train.for_fit(*divmod(epoch * steps + step, len(train)), class_weight),
                initial_epoch=epoch,
                epochs=last,
                steps_per_epoch=steps - step,
                shuffle=False,  # Keras warns of a generator that it cannot shuffle.
                callbacks=[leg],
                verbose=0,
            )
            if config.ema is not None:
                # `fit` ends with the optimiser's average in their place, which at the end of an epoch it is not.
                model.set_weights(leg.weights)
            epoch, step = last, 0
        whole.on_train_end()
    run.stop.check()
    run.engine.spread_seeds(checkpoints.seeds(model), -1)
    return history.history


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

    def start(self, step: int, state: Checkpoint | None) -> None:
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
        self.last: Checkpoint | None = None
        self.pending: Checkpoint | None = None
        self.last_write = float("-inf")

    def restore(self, state: Checkpoint) -> None:
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
        if self.run.workers.main and self.last is None:
            # Before anything is lost: what cannot be written is known now.
            self._write(self._take(0, None))

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = time.monotonic()
        self.run.engine.seed_step((self.config.seed, self.epoch, batch))

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        bad = not all(map(np.isfinite, logs.values()))
        flags = self.run.workers.agree(BAD * bad + STOP * (self.run.stop.signal is not None))
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
        if self.run.workers.main and (stopping or due or step == self.steps):
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
                self.run.workers.leave()
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
        self.run.folder.write(state)
        self.last = state
        self.last_write = time.monotonic()

    def _told(self, step):
        return (
            f"Stopped after step {step} of {self.steps} in epoch {self.epoch + 1}, which is saved: the same command "
            "with --resume goes on."
        )

    def _diverged(self, what, step):
        told = f"{what} after step {step} of {self.steps} in epoch {self.epoch + 1}"
        self.run.workers.leave()
        good = self.run.folder.newest() if self.run.workers.main else None
        raise Diverged(f"{told}: a smaller learning_rate than {self.config.learning_rate:g} may help.", good)


class Diverged(ValueError):
    """The loss or a weight is no number any more; `checkpoint` is the last good one."""

    def __init__(self, message: str, checkpoint: Checkpoint | None):
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
        images, loss_sum, right = self.run.workers.sum(sums)
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
        checkpoints.write_file(self.path, ("\n".join(lines) + "\n").encode())
