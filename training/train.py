"""A run from its configuration to its folder of results."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from pathlib import Path

import keras
import matplotlib.figure

import keras_mnv2
from training import augment, data, schedules
from training.config import Config


def run(config: Config) -> dict:
    """Trains, tests, saves and exports as `config` says.

    The run folder gets `config.json`, `history.csv` (a line an epoch, written as it ends), `model.keras`,
    `curves.png`, `saved_model/`, the LiteRT files of `quantize` where it asks for them, and, last, `metrics.json`.

    Returns:
        The metrics.

    Raises:
        ValueError: on an unfit configuration or a run folder that is not empty.
        ImportError: where the SavedModel is wanted and TensorFlow is missing; before the training starts.
    """
    start = time.perf_counter()
    if config.saved_model and importlib.util.find_spec("tensorflow") is None:
        raise ImportError("saved_model needs TensorFlow: pip install tensorflow, or pass --no-saved-model.")
    needed = ("tensorflow", "ai_edge_litert") if config.quantize_epochs else ()
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise ImportError(f'quantize_epochs needs {" and ".join(needed)}: pip install "keras_mnv2[litert]".')
    keras.utils.set_random_seed(config.seed)
    dataset = data.load(config.dataset, config.image_size)
    model = build_model(config, dataset)
    batches = data.Batches(dataset.train, config.batch_size, config.seed, augment.small_shifts(config))
    compile_model(model, config, len(batches))
    run_dir = make_run_dir(config)
    print(f"{config.recipe} on {keras.backend.backend()}: {model.count_params():,} parameters, results in {run_dir}")

    history = model.fit(
        batches,
        epochs=config.epochs,
        validation_data=(dataset.validation.images, dataset.validation.labels),
        callbacks=[keras.callbacks.CSVLogger(run_dir / "history.csv")],
    )
    fit_seconds = time.perf_counter() - start
    draw_curves(history.history, run_dir / "curves.png")
    _, accuracy = model.evaluate(dataset.test.images, dataset.test.labels, verbose=0)
    print(f"test accuracy {accuracy:.2%} on {len(dataset.test.labels)} images")
    model.save(run_dir / "model.keras")
    difference = None
    if config.saved_model:
        report = keras_mnv2.export(
            model, run_dir / "saved_model", labels=dataset.class_names, sample=dataset.test.images
        )
        difference = report.largest_difference
    quantized = quantize(model, config, dataset, batches, run_dir) if config.quantize_epochs else {}
    metrics = {
        "test_accuracy": accuracy,
        **quantized,
        "seconds": round(time.perf_counter() - start, 1),
        "fit_seconds": round(fit_seconds, 1),
        "saved_model_largest_difference": difference,
        "parameters": model.count_params(),
        "backend": keras.backend.backend(),
        "versions": versions(),
    }
    write_json(run_dir / "metrics.json", metrics)
    print(f"{metrics['seconds']:.0f} seconds in all, results in {run_dir}")
    return metrics


def build_model(config: Config, dataset: data.Dataset) -> keras.Model:
    """The recipe's model, which takes raw images."""
    return keras_mnv2.MobileNetV2(
        input_shape=dataset.train.images.shape[1:],
        alpha=config.alpha,
        weights=None,
        classes=len(dataset.class_names),
        stem_stride=config.stem_stride,
        dropout=config.dropout,
        include_preprocessing=True,
        name=f"mobilenetv2_{config.recipe}",
    )


def compile_model(model: keras.Model, config: Config, steps: int) -> None:
    """Gives `model` the recipe's optimiser, schedule and loss, for epochs of so many steps."""
    optimizer = keras.optimizers.AdamW(
        schedules.warmup_cosine(config.learning_rate, steps * config.epochs, steps),
        weight_decay=config.weight_decay,
    )
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])


def quantize(
    model: keras.Model, config: Config, dataset: data.Dataset, batches: data.Batches, run_dir: Path
) -> dict[str, float]:
    """Writes `model` as LiteRT files in float32, in int8, and in int8 after quantisation-aware training.

    Returns:
        The test accuracy of each file, run by LiteRT.
    """
    images, labels = dataset.test.images, dataset.test.labels.argmax(1)
    # Some hundred images give the ranges of the activations.
    calibration = dataset.train.images[:500]
    aware = keras_mnv2.quantize_aware(model)
    compile_model(
        aware,
        dataclasses.replace(config, learning_rate=config.quantize_learning_rate, epochs=config.quantize_epochs),
        len(batches),
    )
    validation = (dataset.validation.images, dataset.validation.labels)
    aware.fit(batches, epochs=config.quantize_epochs, validation_data=validation)
    accuracies = {}
    for name, source, options in (
        ("float32", model, {}),
        ("int8", model, {"precision": "int8", "calibration": calibration, "io_dtype": "uint8"}),
        ("int8_aware", aware, {"precision": "int8", "io_dtype": "uint8"}),
    ):
        path = run_dir / f"model_{name}.tflite"
        keras_mnv2.export(source, path, "litert", sample=images, **options)
        (scores,) = keras_mnv2.load_export(path)(images).values()
        accuracies[f"{name}_tflite_test_accuracy"] = float((scores.argmax(1) == labels).mean())
        print(f"{path.name}: test accuracy {accuracies[f'{name}_tflite_test_accuracy']:.2%} in LiteRT")
    return accuracies


def make_run_dir(config: Config) -> Path:
    """Makes the run folder and writes `config.json` into it."""
    name = f"{config.recipe}-{keras.backend.backend()}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = config.run_dir or Path("runs") / name
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"run_dir must be a new or empty folder, got {str(run_dir)!r}.")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", dataclasses.asdict(config) | {"run_dir": str(run_dir)})
    return run_dir


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("keras_mnv2", "keras", "numpy", "tensorflow", "jax", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, content: dict) -> None:
    """Writes beside and moves into place, so that no half file has the final name."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(part, path)


def draw_curves(history: dict[str, list[float]], path: Path) -> None:
    """Draws loss and accuracy of training and validation over the epochs as a PNG."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        epochs = range(1, len(history[metric]) + 1)
        axes.plot(epochs, history[metric], label="training")
        axes.plot(epochs, history[f"val_{metric}"], label="validation")
        axes.set(xlabel="epoch", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)
