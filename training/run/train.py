"""A run from its configuration to its folder of results."""

import contextlib
import dataclasses
import importlib.util
from typing import Any

import keras
import numpy as np

import keras_mnv2

from .. import files
from ..config import Config
from ..data.batches import share_unreadable
from ..data.inputs import Inputs, read
from ..parallel import engines
from ..parallel.channel import Channel, connect
from ..parallel.engines import Engine
from ..report.summary import duration
from ..report.versions import versions
from ..state import run_folder
from ..state.run_folder import Run
from ..state.signals import Stop, Stopped
from . import transfer
from .fitting import fit
from .network import build_model, for_inference
from .processes import end_at_once, quiet
from .quantization import SAMPLE, quantize
from .saving import Diverged, keep_good_weights, trained_weights
from .testing import TESTS

# Of Goyal et al. 2017, section 2.2, for a learning rate that was multiplied.
WARMUP_EPOCHS = 5.0


def run(config: Config, command: str = "") -> dict:
    """Trains, tests, saves and exports as `config` says.

    The run folder gets `config.json`, `history.csv` (a line an epoch, written as it ends), `model.keras`,
    `saved_model/`, TensorBoard's and LiteRT's files where they are asked for, the page `report.html` and its summary
    `report.md`, and, last, `metrics.json`. Until then `checkpoints/` holds what `resume` goes on from.
    With several processes the first one alone writes, prints and exports.

    Args:
        config: the settings.
        command: what to run to repeat it, for the report.

    Returns:
        The metrics; nothing in other processes than the first.

    Raises:
        ValueError: on an unfit configuration, a run folder that is not empty or another run's, a data set that has
            changed since, another run that is in the run folder, or a loss that is no number any more.
        ImportError: where a package is missing that a later part needs; before the training starts.
        OSError: where the run folder cannot be written.
        Stopped: where a signal asked for the end.
    """
    check_packages(config)
    engine = engines.start(config.devices, config.deterministic)
    channel = connect(engine.number, engine.processes, engine.host, engine.exchange)
    stop = Stop()
    # Not before: until all workers are there an engine waits in code that no handler of Python's reaches, and JAX's and
    # TensorFlow's coordination bring handlers of their own, which nobody would ask.
    with stop.handled():
        try:
            with contextlib.nullcontext() if channel.main else quiet():
                found = run_on(engine, channel, stop, config, command)
        except (Exception, Stopped) as error:
            if isinstance(error, Stopped):
                error.signal = stop.signal or error.signal
            if channel.of > 1:
                end_at_once(error, channel)
            raise
        channel.close()
        engine.close()
    return found


def run_on(engine: Engine, channel: Channel, stop: Stop, config: Config, command: str) -> dict:
    """The run on an engine that has started."""
    config = scaled(config, engine)
    complete = run_folder.look(config) if channel.main else None
    if channel.agree(complete is not None):
        print(f"The run in {config.run_dir} is complete.", flush=True)
        return complete or {}
    with run_folder.claimed(config) if channel.main else contextlib.nullcontext(config) as claimed:
        return run_in_folder(claimed, command, engine, channel, stop)


def run_in_folder(config: Config, command: str, engine: Engine, channel: Channel, stop: Stop) -> dict:
    """The run in the folder that its first process holds."""
    keras.utils.set_random_seed(config.seed)
    inputs = read(config, channel.shard)
    count, classes = len(inputs.dataset.train), len(inputs.class_names)
    if count < config.batch_size and engine.replicas > 1:
        raise ValueError(f"batch_size must be at most the {count} training images, got {config.batch_size}.")
    size, evaluation_size = config.image_size, config.evaluation_size or config.image_size
    with engine.scope():
        channels, any_size = inputs.train.image_shape[-1], size != evaluation_size
        built = build_model(config, classes, channels, None if any_size else size, engine.norm_layer)
    model = engine.trained(built)
    inputs.for_model(model)
    this = run_folder.open_run(config, engine, channel, stop, inputs.dataset)
    introduce(this, inputs, model)
    results: dict[str, Any] = {}
    try:
        # Each phase that has ended is in the checkpoints, and is not done again when the run goes on.
        if config.head_epochs:
            results |= this.phase("head", lambda: transfer.head_phase(this, model, inputs))
        if config.unfreeze_from is not None:
            transfer.freeze(model, config.unfreeze_from)
        history: dict[str, list[float]] = {}
        if config.epochs:
            history = this.phase("history", lambda: fit(this, config, "history", model, inputs))
        fit_seconds = this.phase("fit_seconds", lambda: this.seconds)
        weights = trained_weights(this, model)
        if channel.main:
            with engine.alone():
                final = for_inference(model, evaluation_size, weights)
                # Before the test: its images may have faults that end the run.
                with files.beside(this.folder / "model.keras") as part:
                    final.save(part)
        test = TESTS[config.task](this, engine.predictor(model), inputs)
        for batches in (inputs.train, inputs.validation):
            share_unreadable(batches, channel)
        if not channel.main:
            return {}
        results |= test.results()
        print(test.told())
        with engine.alone():
            if config.saved_model is not False and installed("tensorflow"):
                sample = inputs.test[0][0][:SAMPLE]
                # Detections are no scores that names could be written at.
                labels = None if config.task == "detection" else inputs.class_names
                exported = keras_mnv2.export(final, this.folder / "saved_model", labels=labels, sample=sample)
                results["saved_model_largest_difference"] = exported.largest_difference
            if config.quantize_epochs:
                results |= quantize(this, final, inputs.dataset)
    except Diverged as error:
        with engine.alone():
            raise ValueError(keep_good_weights(this, model, evaluation_size, error)) from error
    results |= {
        "unreadable_images": {**inputs.train.unreadable, **inputs.validation.unreadable, **inputs.test.unreadable},
        "seconds": round(this.seconds, 1),
        "fit_seconds": round(fit_seconds, 1),
        "parameters": model.count_params(),
        "backend": keras.backend.backend(),
        "devices": engine.replicas,
        "versions": versions(),
    }
    if history:
        results["seconds_per_epoch"] = float(np.median(history["seconds"]))
        results["waiting_for_input"] = float(np.median(history["waiting"]))
    for batches in (inputs.train, inputs.validation, inputs.test):
        if told := batches.told():
            print(told)
    test.write_report(final, results, command)
    files.write_json(this.folder / "metrics.json", results)
    this.checkpoints.remove()
    print(f"{duration(results['seconds'])} in all, results in {this.folder}")
    return results


def introduce(run: Run, inputs: Inputs, model: keras.Model) -> None:
    """Prints what is trained on what."""
    config, data, engine = run.config, inputs.dataset, run.engine
    images = " + ".join(f"{len(split):,}" for split in (data.train, data.validation, data.test))
    print(f"{config.dataset}: {images} images of {len(data.class_names)} classes for training, validation and test")
    where = f" on {engine.replicas} devices of {run.channel.of} processes" if engine.replicas > 1 else ""
    found = f"{model.count_params():,} parameters, results in {run.folder}"
    print(f"{config.recipe} on {keras.backend.backend()}{where}: {found}", flush=True)
    if config.saved_model is None and not installed("tensorflow"):
        print('no SavedModel will be written, which needs pip install "keras_mnv2[tensorflow]"', flush=True)


def check_packages(config: Config) -> None:
    """Raises an ImportError where a package is missing that the run needs later."""
    for field, packages, extra, without in (
        ("saved_model", ("tensorflow",), "tensorflow", "--no-saved-model"),
        ("tensorboard", ("tensorflow",), "tensorflow", "--no-tensorboard"),
        ("quantize_epochs", ("tensorflow", "ai_edge_litert"), "litert", "--quantize-epochs 0"),
    ):
        if getattr(config, field) and not installed(*packages):
            told = f'{field} needs {" and ".join(packages)}: pip install "keras_mnv2[{extra}]"'
            raise ImportError(f"{told}, or pass {without}.")
    if config.task == "detection" and not installed("pycocotools"):
        raise ImportError('detection needs pycocotools for its mAP: pip install "keras_mnv2[train]".')


def installed(*packages: str) -> bool:
    """Whether all of these packages are."""
    return all(importlib.util.find_spec(name) is not None for name in packages)


def scaled(config: Config, engine: Engine) -> Config:
    """The settings with the batch and the learning rate of all workers."""
    devices = engine.replicas
    if config.scale_with_devices != "no" and devices > 1:
        factor = devices if config.scale_with_devices == "linear" else devices**0.5
        config = dataclasses.replace(
            config,
            batch_size=config.batch_size * devices,
            learning_rate=config.learning_rate * factor,
            warmup_epochs=max(config.warmup_epochs, WARMUP_EPOCHS),
        )
    if config.task != "classification" and devices > 1:
        raise ValueError(f"task must be classification on several devices, got {config.task!r} on {devices}.")
    if config.batch_size % devices:
        raise ValueError(f"batch_size must be a multiple of the {devices} devices, got {config.batch_size}.")
    return config
