"""The training itself: `model.fit` with what makes it exact to go on, on one device or many."""

from collections.abc import Sequence

import keras
import numpy as np

from ..config import Config
from ..data.batches import Batches
from ..parallel import engines
from ..parallel.engines import Engine
from ..state import checkpoints
from ..state.run_folder import Run
from . import schedules
from .callbacks import Leg, Safety, Table, Validation
from .progress import Progress


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
    if run.channel.main:
        callbacks.append(Table(history, run.folder / f"{phase}.csv"))
        if config.tensorboard:
            callbacks.append(keras.callbacks.TensorBoard(run.folder / "tensorboard" / phase, write_graph=False))
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
