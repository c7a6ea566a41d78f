"""A run from its configuration to its folder of results."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import keras
import numpy as np

import keras_mnv2

from .. import files
from ..config import Config
from ..data import sets
from ..data.batches import Batches, evaluation_batches, read_scores, share_unreadable, training_batches
from ..parallel import engines
from ..parallel.channel import Channel, connect
from ..parallel.engines import Engine
from ..process import status_of
from ..report import metrics, mistakes, page, summary
from ..report.activation_map import activation_maps
from ..state import run_folder
from ..state.checkpoints import State
from ..state.run_folder import Run, write_json
from ..state.signals import Stop, Stopped
from . import transfer
from .callbacks import Diverged
from .fitting import fit
from .progress import duration

# Images on which exported files are compared with the model.
SAMPLE = 64
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
                found = run_with(config, command, engine, channel, stop)
        except (Exception, Stopped) as error:
            if isinstance(error, Stopped):
                error.signal = stop.signal or error.signal
            if channel.of > 1:
                end_at_once(error, channel)
            raise
        channel.close()
        engine.close()
    return found


def run_with(config: Config, command: str, engine: Engine, channel: Channel, stop: Stop) -> dict:
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
    dataset = sets.load(config.dataset, config.image_size, config.data_dir, config.held_out)
    classes = len(dataset.class_names)
    train = training_batches(dataset.train, classes, config, channel.share)
    validation, test = (
        evaluation_batches(split, classes, config, channel.share) for split in (dataset.validation, dataset.test)
    )
    if len(dataset.train) < config.batch_size and engine.replicas > 1:
        count = len(dataset.train)
        raise ValueError(f"batch_size must be at most the {count} training images, got {config.batch_size}.")
    channels = train.image_shape[-1]
    size, evaluation_size = config.image_size, config.evaluation_size or config.image_size
    with engine.scope():
        built = build_model(config, classes, channels, size if size == evaluation_size else None, engine.norm_layer)
    model = engine.trained(built)
    this = run_folder.open_run(config, engine, channel, stop, dataset)
    images = " + ".join(f"{len(split):,}" for split in (dataset.train, dataset.validation, dataset.test))
    print(f"{config.dataset}: {images} images of {classes} classes for training, validation and test")
    where = f" on {engine.replicas} devices of {channel.of} processes" if engine.replicas > 1 else ""
    found = f"{model.count_params():,} parameters, results in {this.folder}"
    print(f"{config.recipe} on {keras.backend.backend()}{where}: {found}", flush=True)
    class_weight = balanced(dataset.train.labels, classes) if config.class_weights else None

    results: dict[str, Any] = {}
    history: dict[str, list[float]] = {}
    try:
        if config.head_epochs:
            results |= this.phase(
                "head", lambda: head_phase(this, model, dataset, train, validation, test, class_weight)
            )
        if config.unfreeze_from is not None:
            transfer.freeze(model, config.unfreeze_from)
        if config.epochs:
            history = this.phase(
                "history", lambda: fit(this, config, "history", model, train, validation, class_weight)
            )
        fit_seconds = this.phase("fit_seconds", lambda: this.seconds)
        weights = trained_weights(this, model)
        if channel.main:
            with engine.alone():
                final = for_inference(model, evaluation_size, weights)
                # Before the test: its images may have faults that end the run.
                with files.beside(this.folder / "model.keras") as part:
                    final.save(part)
        scores, labels = read_scores(engine.predictor(model), test, channel)
        for batches in (train, validation):
            share_unreadable(batches, channel)
        if not channel.main:
            return {}
        results["test_accuracy"] = metrics.top_k(scores, labels, 1)
        print(f"test accuracy {results['test_accuracy']:.2%} on {len(labels)} images")
        with engine.alone():
            if config.saved_model:
                sample = test[0][0][:SAMPLE]
                report = keras_mnv2.export(
                    final, this.folder / "saved_model", labels=dataset.class_names, sample=sample
                )
                results["saved_model_largest_difference"] = report.largest_difference
            if config.quantize_epochs:
                results |= quantize(this, final, dataset)
    except Diverged as error:
        with engine.alone():
            raise ValueError(keep_good_weights(this, model, evaluation_size, error)) from error
    results |= {
        "test_images": len(labels),
        "test_top5_accuracy": metrics.top_k(scores, labels, 5),
        "calibration_error": metrics.calibration_error(scores, labels),
        "unreadable_images": {**train.unreadable, **validation.unreadable, **test.unreadable},
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
    for batches in (train, validation, test):
        if told := batches.told():
            print(told)
    write_report(this, final, results, test, scores, labels, dataset, command)
    write_json(this.folder / "metrics.json", results)
    this.checkpoints.remove()
    print(f"{duration(results['seconds'])} in all, results in {this.folder}")
    return results


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed: the first process tells what all do. Errors are."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def end_at_once(error: BaseException, channel: Channel) -> NoReturn:
    """Ends one process of several: what runs when Python ends would wait for the others."""
    if isinstance(error, Stopped):
        if error.agreed:
            channel.close()
        told, code = str(error) if channel.main else "", 128 + error.signal
    else:
        plain = isinstance(error, (ValueError, ImportError, OSError))
        told, code = (f"{error}", status_of(error)) if plain else ("".join(traceback.format_exception(error)), 1)
    sys.stdout.flush()
    if told:
        print(told, file=sys.stderr, flush=True)
    os._exit(code)


def check_packages(config: Config) -> None:
    """Raises an ImportError where a package is missing that the run needs later."""
    needed = {
        "saved_model": ("tensorflow",) if config.saved_model else (),
        "tensorboard": ("tensorflow", "tensorboard") if config.tensorboard else (),
        "quantize_epochs": ("tensorflow", "ai_edge_litert") if config.quantize_epochs else (),
    }
    extras = {"saved_model": "tensorflow", "tensorboard": "train", "quantize_epochs": "litert"}
    for field, packages in needed.items():
        if any(importlib.util.find_spec(name) is None for name in packages):
            raise ImportError(
                f'{field} needs {" and ".join(packages)}: pip install "keras_mnv2[{extras[field]}]", '
                f"or pass {'--quantize-epochs 0' if field == 'quantize_epochs' else f'--no-{field}'.replace('_', '-')}."
            )


def build_model(
    config: Config, classes: int, channels: int, size: int | None, norm_layer: str = "batch_norm"
) -> keras.Model:
    """The recipe's model, which takes raw images of `size` pixels a side, or of any."""
    return keras_mnv2.MobileNetV2(
        input_shape=(size, size, channels),
        alpha=config.alpha,
        weights=config.weights,
        classes=classes,
        inverted_residual_setting=config.stages,
        stem_stride=config.stem_stride,
        dropout=config.dropout,
        norm_layer=norm_layer,
        include_preprocessing=True,
        dtype="float32" if config.precision == "float32" else f"mixed_{config.precision}",
        name=f"mobilenetv2_{config.recipe}",
    )


def head_phase(
    run: Run,
    model: keras.Model,
    dataset: sets.Dataset,
    train: Batches,
    validation: Batches,
    test: Batches,
    class_weight: dict[int, float] | None,
) -> dict[str, Any]:
    """Trains the classifier alone, and gives its seconds and its accuracy on the test images."""
    config = run.config
    begun = run.phase("head_begun", lambda: run.seconds)
    if config.cache_features:
        ordered = evaluation_batches(dataset.train, train.classes, config, run.channel.share)
        run.done["head_history"] = transfer.train_head(run, model, ordered, validation, class_weight)
    else:
        transfer.freeze(model, "predictions")
        alone = dataclasses.replace(config, learning_rate=config.head_learning_rate, epochs=config.head_epochs)
        run.done["head_history"] = fit(run, alone, "head_history", model, train, validation, class_weight)
    seconds = run.seconds - begun
    scores, labels = read_scores(run.engine.predictor(model), test, run.channel)
    if not run.channel.main:
        return {}
    accuracy = metrics.top_k(scores, labels, 1)
    print(f"head alone: test accuracy {accuracy:.2%}, {duration(seconds)}", flush=True)
    return {"head_test_accuracy": accuracy, "head_seconds": round(seconds, 1)}


def trained_weights(run: Run, model: keras.Model) -> list[np.ndarray]:
    """The weights after the training, which a checkpoint holds from now on."""
    state, run.resumed = run.resumed, None
    if state is None:
        weights = model.get_weights()
        if run.channel.main:
            arrays = {f"weights/{i:04d}": weight for i, weight in enumerate(weights)}
            run.checkpoints.write(State(arrays, run.place("trained", 0, 0)))
        return weights
    if state.place["phase"] != "trained":
        # Of the quantisation: it has the trained weights beside its own.
        run.resumed = state
    weights = state.group("trained" if run.resumed else "weights")
    model.set_weights(weights)
    return weights


def for_inference(model: keras.Model, size: int, weights: list[np.ndarray] | None = None) -> keras.Model:
    """The trained network as a model that is not compiled, for images of `size`: no optimiser goes into its file.

    Args:
        model: that was trained.
        size: side of the images, in pixels.
        weights: by default the model's.
    """
    config = model.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, size, size, model.input.shape[-1])
    for layer in config["layers"]:
        if layer["config"].get("norm_layer") == "sync_batch_norm":
            layer["config"]["norm_layer"] = "batch_norm"
    # Not `clone_model`, which compiles its copy of a compiled model.
    final = type(model).from_config(config)
    final.set_weights(model.get_weights() if weights is None else weights)
    final.trainable = True
    return final


def keep_good_weights(run: Run, model: keras.Model, size: int, error: Diverged) -> str:
    """Saves the last good weights as a model, and gives a sentence for the error."""
    if error.checkpoint is None or not run.channel.main:
        return str(error)
    place = error.checkpoint.place
    if place["phase"] == "quantize_history":
        return f"{error} {run.folder / 'model.keras'} has the weights before the quantisation."
    path = run.folder / "last_good.keras"
    with files.beside(path) as part:
        for_inference(model, size, error.checkpoint.group("weights")).save(part)
    return f"{error} The last good weights, after step {place['step']} in epoch {place['epoch'] + 1}, are in {path}."


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
    if config.batch_size % devices:
        raise ValueError(f"batch_size must be a multiple of the {devices} devices, got {config.batch_size}.")
    return config


def balanced(labels: np.ndarray, classes: int) -> dict[int, float]:
    """Weights of the classes: the mean number of images of a class over its own."""
    counts = np.bincount(labels, minlength=classes)
    return {label: len(labels) / classes / max(1, int(count)) for label, count in enumerate(counts)}


def quantize(run: Run, model: keras.Model, dataset: sets.Dataset) -> dict[str, float]:
    """Writes `model` as LiteRT files in float32, in int8, and in int8 after quantisation-aware training.

    That training runs on one device of the first process, however many there are.

    Returns:
        The test accuracy of each file, run by LiteRT.
    """
    config, classes = run.config, len(dataset.class_names)
    run = dataclasses.replace(run, engine=engines.alone(), channel=Channel())
    train = training_batches(dataset.train, classes, config)
    ordered, validation, test = (
        evaluation_batches(split, classes, config) for split in (dataset.train, dataset.validation, dataset.test)
    )
    # Some hundred images give the ranges of the activations.
    calibration = np.concatenate([ordered[i][0] for i in range(min(len(ordered), -(-500 // config.batch_size)))])
    aware = keras_mnv2.quantize_aware(model)
    again = dataclasses.replace(
        config,
        learning_rate=config.quantize_learning_rate,
        epochs=config.quantize_epochs,
        schedule="cosine",
        ema=None,
        early_stopping=0,
    )
    run.done["quantize_history"] = fit(
        run, again, "quantize_history", aware, train, validation, None, beside=model.get_weights()
    )
    sample, accuracies = test[0][0][:SAMPLE], {}
    for name, source, options in (
        ("float32", model, {}),
        ("int8", model, {"precision": "int8", "calibration": calibration, "io_dtype": "uint8"}),
        ("int8_aware", aware, {"precision": "int8", "io_dtype": "uint8"}),
    ):
        path = run.folder / f"model_{name}.tflite"
        keras_mnv2.export(source, path, "litert", sample=sample, **options)
        read = keras_mnv2.load_export(path)
        scores, labels = read_scores(lambda images, read=read: next(iter(read(images).values())), test)
        accuracies[f"{name}_tflite_test_accuracy"] = metrics.top_k(scores, labels, 1)
        print(f"{path.name}: test accuracy {accuracies[f'{name}_tflite_test_accuracy']:.2%} in LiteRT")
    return accuracies


def write_report(
    run: Run,
    model: keras.Model,
    found: dict[str, Any],
    test: Batches,
    scores: np.ndarray,
    labels: np.ndarray,
    dataset: sets.Dataset,
    command: str,
) -> None:
    """Writes `report.html` and `report.md` of a run whose metrics are `found` and whose test gave these scores."""
    config, names = run.config, dataset.class_names
    worst = mistakes.worst(scores, labels, test, names)
    with run.engine.alone():
        worst = mistakes.explained(worst, lambda images, classes: activation_maps(model, images, classes))
    tuned = "fine-tuning" if config.head_epochs else "training"
    phases = {"head_history": "head alone", "history": tuned, "quantize_history": "quantisation-aware"}
    images = " + ".join(f"{len(split):,}" for split in (dataset.train, dataset.validation, dataset.test))
    report = page.Report(
        title=f"{config.recipe} on {found['backend']}",
        subtitle=f"MobileNetV2 on {config.dataset}, {images} images of {len(names)} classes for training, validation "
        "and test.",
        results=summary.results(found, run.done.get("history", {}), len(names)),
        matrix=metrics.confusion_matrix(scores, labels),
        class_names=names,
        mistakes=worst,
        unreadable=found["unreadable_images"],
        command=command,
        settings=dataclasses.asdict(config),
        versions=found["versions"],
        phases={phases[name]: run.done[name] for name in phases if run.done.get(name)},
    )
    page.write(run.folder / "report.html", report)
    summary.write(run.folder / "report.md", report.title, report.results, "report.html")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("keras_mnv2", "keras", "numpy", "tensorflow", "jax", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
