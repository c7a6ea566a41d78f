"""Transfer learning: a new classifier on the features of a frozen network, then the last blocks at a low rate."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mnv2

from ..data.batches import Batches, read_scores
from ..data.inputs import Inputs
from ..report import metrics
from ..report.summary import duration
from ..state import checkpoints
from ..state.checkpoints import State
from ..state.run_folder import Run
from .fitting import fit

# Feature vectors a step: they are small, and a step costs its overhead alone.
HEAD_BATCH = 128
# Of 1280 features for some thousand images: chosen on the validation images of the clothes (docs/training.md).
HEAD_DROPOUT, HEAD_DECAY = 0.5, 0.5
# Of each worker, after which features are written: some seconds of work.
FEATURE_BATCHES = 64


def train_head(run: Run, model: keras.Model, inputs: Inputs) -> dict[str, list[float]]:
    """Trains a classifier on features that are computed once, and puts its weights into `model`.

    The workers share the features, and the first one trains.

    Args:
        run: this run; `head_epochs` and `head_learning_rate` of its config.
        model: of `MobileNetV2`, with its classifier.
        inputs: of which each training image gives one feature vector, as it is in an evaluation; the classifier with
            the least loss on the validation images is kept.

    Returns:
        The history, as `fit` gives it; nothing in other processes than the first.
    """
    with run.engine.scope():
        features = keras_mnv2.fold_batch_norm(keras.Model(model.input, pooled(model)))
    predict = run.engine.predictor(features)
    train = features_of(run, "train", predict, inputs.ordered)
    validation = features_of(run, "validation", predict, inputs.validation)
    history: dict[str, list[float]] = {}
    content = b""
    if run.channel.main:
        with run.engine.alone():
            kernel, bias, history = _train_classifier(run.config, train, validation, inputs.class_weight)
        content = np.vstack([kernel, bias]).astype("float32").tobytes()
    rows = np.frombuffer(run.channel.broadcast(content), "float32").reshape(-1, len(inputs.class_names))
    model.get_layer("predictions").set_weights([rows[:-1], rows[-1]])
    return history


def pooled(model: keras.Model) -> keras.KerasTensor:
    """The vector of features (batch, channels) that a model's classifier reads, before its dropout."""
    return next(layer for layer in model.layers if isinstance(layer, keras.layers.GlobalAveragePooling2D)).output


def features_of(
    run: Run, name: str, predict: Callable[[np.ndarray], np.ndarray], batches: Batches
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors and one-hot labels of all images, some batches after the other.

    What is known is kept beside the checkpoints, so that a run that is stopped here goes on here.
    """
    at_once = FEATURE_BATCHES * run.channel.of
    vectors, labels = [], []
    for start in range(0, len(batches), at_once):
        run.stop.check()
        path = run.checkpoints.path / f"{name}_features_{start:08d}{checkpoints.SUFFIX}"
        part = _kept_part(run, path) if run.channel.main else None
        # Only the first process keeps parts, and all read those that are missing.
        if not run.channel.agree(part is not None):
            x, y = read_scores(predict, batches, run.channel, start, min(start + at_once, len(batches)))
            position = {"fingerprint": run.fingerprint, "unreadable": dict(batches.unreadable)}
            part = State({"x": x.astype("float32"), "y": y}, position)
            if run.channel.main:
                run.checkpoints.write_beside(path, part)
        if part is not None and run.channel.main:
            batches.unreadable |= part.position["unreadable"]
            vectors.append(part.arrays["x"])
            labels.append(part.arrays["y"])
    if not run.channel.main:
        return np.zeros((0, 0), "float32"), np.zeros((0, batches.classes), "float32")
    return np.concatenate(vectors), keras.utils.to_categorical(np.concatenate(labels), batches.classes)


def _kept_part(run: Run, path: Path) -> State | None:
    try:
        part = State.decode(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return part if part.position.get("fingerprint") == run.fingerprint else None


def _train_classifier(config, train, validation, class_weight):
    """Kernel (features, classes), bias (classes,) and history of a classifier on vectors and one-hot labels."""
    x, y = train
    # One scale for all backbones, folded back into the classifier below.
    mean, spread = x.mean(0), x.std(0) + 1e-3
    classifier = keras.layers.Dense(y.shape[1], activation="softmax", kernel_initializer="zeros")
    head = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dropout(HEAD_DROPOUT), classifier])
    steps = config.head_epochs * -(-len(x) // HEAD_BATCH)
    rates = keras.optimizers.schedules.CosineDecay(config.head_learning_rate, steps)
    optimizer = keras.optimizers.AdamW(rates, weight_decay=HEAD_DECAY)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    head.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    history = head.fit(
        (x - mean) / spread,
        y,
        batch_size=HEAD_BATCH,
        epochs=config.head_epochs,
        validation_data=((validation[0] - mean) / spread, validation[1]),
        class_weight=class_weight,
        callbacks=[keras.callbacks.EarlyStopping("val_loss", patience=config.head_epochs, restore_best_weights=True)],
        verbose=0,
    )
    kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in classifier.weights)
    kernel = kernel / spread[:, None]
    return kernel, bias - mean @ kernel, history.history


def freeze(model: keras.Model, unfreeze_from: str) -> None:
    """Freezes what lies before the layer or block `unfreeze_from`, and the batch norms everywhere.

    Raises:
        ValueError: where the model has no such layer.
    """
    try:
        keras_mnv2.freeze(model, before=unfreeze_from)
    except ValueError as error:
        raise ValueError(str(error).replace("before must", "unfreeze_from must", 1)) from None


def head_phase(run: Run, model: keras.Model, inputs: Inputs) -> dict[str, Any]:
    """Trains the classifier alone, and gives its seconds and its accuracy on the test images."""
    config = run.config
    begun = run.phase("head_begun", lambda: run.seconds)
    if config.cache_features:
        run.done["head_history"] = train_head(run, model, inputs)
    else:
        freeze(model, "predictions")
        alone = dataclasses.replace(config, learning_rate=config.head_learning_rate, epochs=config.head_epochs)
        run.done["head_history"] = fit(run, alone, "head_history", model, inputs)
    seconds = run.seconds - begun
    scores, labels = read_scores(run.engine.predictor(model), inputs.test, run.channel)
    if not run.channel.main:
        return {}
    accuracy = metrics.top_k(scores, labels, 1)
    print(f"head alone: test accuracy {accuracy:.2%}, {duration(seconds)}", flush=True)
    return {"head_test_accuracy": accuracy, "head_seconds": round(seconds, 1)}
