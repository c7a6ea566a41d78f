"""A run from its configuration to its folder of results."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mnv2
from training import data, metrics, pictures, schedules, summary, transfer
from training.batches import Batches, evaluation_batches, read_scores, training_batches
from training.config import Config
from training.progress import Progress, duration

# Images on which exported files are compared with the model.
SAMPLE = 64
MISTAKES = 24


def run(config: Config, command: str = "") -> dict:
    """Trains, tests, saves and exports as `config` says.

    The run folder gets `config.json`, `history.csv` (a line an epoch, written as it ends), `model.keras`, the pictures
    `curves.png`, `confusion.png` and `mistakes.png`, `report.md`, `saved_model/`, TensorBoard's and LiteRT's files
    where they are asked for, and, last, `metrics.json`.

    Args:
        config: the settings.
        command: what to run to repeat it, for the report.

    Returns:
        The metrics.

    Raises:
        ValueError: on an unfit configuration or a run folder that is not empty.
        ImportError: where a package is missing that a later part needs; before the training starts.
    """
    start = time.perf_counter()
    check_packages(config)
    keras.utils.set_random_seed(config.seed)
    dataset = data.load(config.dataset, config.image_size, config.data_dir, config.held_out)
    classes = len(dataset.class_names)
    train = training_batches(dataset.train, classes, config)
    validation, test = (evaluation_batches(split, classes, config) for split in (dataset.validation, dataset.test))
    channels = train.image_shape[-1]
    size, evaluation_size = config.image_size, config.evaluation_size or config.image_size
    model = build_model(config, classes, channels, size if size == evaluation_size else None)
    run_dir = make_run_dir(config)
    images = " + ".join(f"{len(split):,}" for split in (dataset.train, dataset.validation, dataset.test))
    print(f"{config.dataset}: {images} images of {classes} classes for training, validation and test")
    print(f"{config.recipe} on {keras.backend.backend()}: {model.count_params():,} parameters, results in {run_dir}")
    class_weight = balanced(dataset.train.labels, classes) if config.class_weights else None

    found: dict[str, Any] = {}
    if config.head_epochs:
        found |= head_phase(model, config, dataset, train, validation, test, class_weight, run_dir)
    if config.unfreeze_from is not None:
        transfer.freeze(model, config.unfreeze_from)
    history: dict[str, list[float]] = {}
    if config.epochs:
        history = fit(model, config, train, validation, class_weight, run_dir / "history.csv")
    fit_seconds = time.perf_counter() - start
    model = for_inference(model, evaluation_size)
    # Before the test: its images may have faults that end the run.
    model.save(run_dir / "part.keras")
    os.replace(run_dir / "part.keras", run_dir / "model.keras")
    scores, labels = read_scores(model.predict_on_batch, test)
    found["test_accuracy"] = metrics.top_k(scores, labels, 1)
    print(f"test accuracy {found['test_accuracy']:.2%} on {len(labels)} images")
    if config.saved_model:
        sample = test[0][0][:SAMPLE]
        report = keras_mnv2.export(model, run_dir / "saved_model", labels=dataset.class_names, sample=sample)
        found["saved_model_largest_difference"] = report.largest_difference
    if config.quantize_epochs:
        found |= quantize(model, config, train, validation, test, run_dir)
    found |= {
        "test_images": len(labels),
        "test_top5_accuracy": metrics.top_k(scores, labels, 5),
        "calibration_error": metrics.calibration_error(scores, labels),
        "unreadable_images": {**train.unreadable, **validation.unreadable, **test.unreadable},
        "seconds": round(time.perf_counter() - start, 1),
        "fit_seconds": round(fit_seconds, 1),
        "parameters": model.count_params(),
        "backend": keras.backend.backend(),
        "versions": versions(),
    }
    if history:
        found["seconds_per_epoch"] = float(np.median(history["seconds"]))
        found["waiting_for_input"] = float(np.median(history["waiting"]))
        pictures.draw_curves(history, run_dir / "curves.png")
    for batches in (train, validation, test):
        if told := batches.told():
            print(told)
    draw(scores, labels, test, dataset.class_names, run_dir)
    matrix = metrics.confusion_matrix(scores, labels)
    summary.write(run_dir / "report.md", config, found, history, matrix, dataset.class_names, command)
    write_json(run_dir / "metrics.json", found)
    print(f"{duration(found['seconds'])} in all, results in {run_dir}")
    return found


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


def build_model(config: Config, classes: int, channels: int, size: int | None) -> keras.Model:
    """The recipe's model, which takes raw images of `size` pixels a side, or of any."""
    return keras_mnv2.MobileNetV2(
        input_shape=(size, size, channels),
        alpha=config.alpha,
        weights=config.weights,
        classes=classes,
        inverted_residual_setting=config.stages,
        stem_stride=config.stem_stride,
        dropout=config.dropout,
        include_preprocessing=True,
        dtype="float32" if config.precision == "float32" else f"mixed_{config.precision}",
        name=f"mobilenetv2_{config.recipe}",
    )


def compile_model(model: keras.Model, config: Config, steps: int) -> None:
    """Gives `model` the recipe's optimiser, schedule and loss, for epochs of so many steps."""
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
    if config.optimizer != "adamw" and config.weight_decay:
        # Keras's `weight_decay` is decoupled; this adds `weight_decay * w` to the gradient, before the momentum.
        for variable in model.trainable_variables:
            if variable.name == "kernel":
                variable.regularizer = keras.regularizers.L2(config.weight_decay / 2)
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])


def fit(
    model: keras.Model,
    config: Config,
    train: Batches,
    validation: Batches,
    class_weight: dict[int, float] | None,
    path: Path,
) -> dict[str, list[float]]:
    """Compiles and trains, and gives the history, of which the CSV file `path` gets a line an epoch."""
    steps = config.steps_per_epoch or len(train)
    compile_model(model, config, steps)
    callbacks: list[keras.callbacks.Callback] = []
    if config.ema is not None:
        # First: what follows sees the average.
        callbacks.append(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    callbacks += [Progress(train, config.epochs, steps), keras.callbacks.CSVLogger(path)]
    if config.early_stopping:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                "val_accuracy", patience=config.early_stopping, restore_best_weights=True, mode="max"
            )
        )
    if config.tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(path.parent / "tensorboard" / path.stem, write_graph=False))
    history = model.fit(
        train.for_fit(),
        steps_per_epoch=steps,
        epochs=config.epochs,
        shuffle=False,  # Keras warns of a generator that it cannot shuffle.
        validation_data=validation,
        class_weight=class_weight,
        callbacks=callbacks,
        verbose=0,
    )
    return history.history


def head_phase(
    model: keras.Model,
    config: Config,
    dataset: data.Dataset,
    train: Batches,
    validation: Batches,
    test: Batches,
    class_weight: dict[int, float] | None,
    run_dir: Path,
) -> dict[str, Any]:
    """Trains the classifier alone, and gives its seconds and its accuracy on the test images."""
    start = time.perf_counter()
    if config.cache_features:
        ordered = evaluation_batches(dataset.train, train.classes, config)
        transfer.train_head(model, ordered, validation, config, class_weight)
    else:
        transfer.freeze(model, "predictions")
        alone = dataclasses.replace(config, learning_rate=config.head_learning_rate, epochs=config.head_epochs)
        fit(model, alone, train, validation, class_weight, run_dir / "head_history.csv")
    seconds = time.perf_counter() - start
    accuracy = metrics.top_k(*read_scores(model.predict_on_batch, test), 1)
    print(f"head alone: test accuracy {accuracy:.2%}, {duration(seconds)}")
    return {"head_test_accuracy": accuracy, "head_seconds": round(seconds, 1)}


def for_inference(model: keras.Model, size: int) -> keras.Model:
    """The trained network as a model that is not compiled, for images of `size`: no optimiser goes into its file."""
    config = model.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, size, size, model.input.shape[-1])
    # Not `clone_model`, which compiles its copy of a compiled model.
    final = type(model).from_config(config)
    final.set_weights(model.get_weights())
    final.trainable = True
    return final


def balanced(labels: np.ndarray, classes: int) -> dict[int, float]:
    """Weights of the classes: the mean number of images of a class over its own."""
    counts = np.bincount(labels, minlength=classes)
    return {label: len(labels) / classes / max(1, int(count)) for label, count in enumerate(counts)}


def quantize(
    model: keras.Model, config: Config, train: Batches, validation: Batches, test: Batches, run_dir: Path
) -> dict[str, float]:
    """Writes `model` as LiteRT files in float32, in int8, and in int8 after quantisation-aware training.

    Returns:
        The test accuracy of each file, run by LiteRT.
    """
    # Some hundred images give the ranges of the activations.
    ordered = evaluation_batches(train.split, train.classes, config)
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
    fit(aware, again, train, validation, None, run_dir / "quantize_history.csv")
    accuracies = {}
    for name, source, options in (
        ("float32", model, {}),
        ("int8", model, {"precision": "int8", "calibration": calibration, "io_dtype": "uint8"}),
        ("int8_aware", aware, {"precision": "int8", "io_dtype": "uint8"}),
    ):
        path = run_dir / f"model_{name}.tflite"
        keras_mnv2.export(source, path, "litert", sample=test[0][0][:SAMPLE], **options)
        read = keras_mnv2.load_export(path)
        scores, labels = read_scores(lambda images, read=read: next(iter(read(images).values())), test)
        accuracies[f"{name}_tflite_test_accuracy"] = metrics.top_k(scores, labels, 1)
        print(f"{path.name}: test accuracy {accuracies[f'{name}_tflite_test_accuracy']:.2%} in LiteRT")
    return accuracies


def draw(scores: np.ndarray, labels: np.ndarray, test: Batches, class_names: tuple[str, ...], run_dir: Path) -> None:
    """Draws the confusion matrix, and the test images that were most surely taken for another class."""
    pictures.draw_confusion(metrics.confusion_matrix(scores, labels), class_names, run_dir / "confusion.png")
    probabilities = metrics.probabilities(scores)
    readable = test.readable()
    images, titles = [], []
    for i in metrics.worst_mistakes(probabilities, labels, MISTAKES):
        image = test.prepare(test.split[readable[i]][0], np.random.default_rng(0))
        images.append(np.clip(image, 0, 255).astype("uint8"))
        found = probabilities[i].argmax()
        titles.append(f"{class_names[found]}, not {class_names[labels[i]]}\n{probabilities[i, found]:.0%}")
    pictures.draw_mistakes(images, titles, run_dir / "mistakes.png")


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
