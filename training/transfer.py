"""Transfer learning: a new classifier on the features of a frozen network, then the last blocks at a low rate."""

import keras

import keras_mnv2
from training.batches import Batches, read_scores
from training.config import Config

# Feature vectors a step: they are small, and a step costs its overhead alone.
HEAD_BATCH = 128
# Of 1280 features for some thousand images: chosen on the validation images of the clothes (docs/training.md).
HEAD_DROPOUT, HEAD_DECAY = 0.5, 0.5


def train_head(
    model: keras.Model, train: Batches, validation: Batches, config: Config, class_weight: dict[int, float] | None
) -> dict[str, list[float]]:
    """Trains a classifier on features that are computed once, and puts its weights into `model`.

    Args:
        model: of `MobileNetV2`, with its classifier.
        train: training images in order, as for an evaluation: each gives one feature vector.
        validation: likewise; the classifier with the least loss on these is kept.
        config: its `head_epochs` and `head_learning_rate`.
        class_weight: of each class, or None.

    Returns:
        The history, as `fit` gives it.
    """
    pooled = model.get_layer("global_pool").output
    features = keras_mnv2.fold_batch_norm(keras.Model(model.input, pooled))
    pairs = []
    for batches in (train, validation):
        vectors, labels = read_scores(features.predict_on_batch, batches)
        pairs.append((vectors.astype("float32"), keras.utils.to_categorical(labels, batches.classes)))
    (x, y), validation_data = pairs
    # One scale for all backbones, folded back into the classifier below.
    mean, spread = x.mean(0), x.std(0) + 1e-3
    classifier = keras.layers.Dense(train.classes, activation="softmax", kernel_initializer="zeros")
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
        validation_data=((validation_data[0] - mean) / spread, validation_data[1]),
        class_weight=class_weight,
        callbacks=[keras.callbacks.EarlyStopping("val_loss", patience=config.head_epochs, restore_best_weights=True)],
        verbose=0,
    )
    kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in classifier.weights)
    kernel = kernel / spread[:, None]
    model.get_layer("predictions").set_weights([kernel, bias - mean @ kernel])
    return history.history


def freeze(model: keras.Model, unfreeze_from: str) -> None:
    """Freezes what lies before the layer `unfreeze_from`, and the batch norms everywhere.

    A frozen batch norm works with its moving statistics, so that the few images of the new task do not blur what the
    many of the old one have given (Keras's guide to transfer learning).

    Raises:
        ValueError: where the model has no such layer.
    """
    names = [layer.name for layer in model.layers]
    if unfreeze_from not in names:
        blocks = [name for name in names if name.startswith("block_")]
        raise ValueError(
            f"unfreeze_from must be a layer of the model, such as {blocks[0]!r} to {blocks[-1]!r} or 'predictions', "
            f"got {unfreeze_from!r}."
        )
    first = names.index(unfreeze_from)
    for number, layer in enumerate(model.layers):
        layer.trainable = number >= first
        for part in (layer, *(getattr(layer, name, None) for name in ("expand", "depthwise", "project"))):
            if isinstance(getattr(part, "norm", None), keras.layers.BatchNormalization):
                part.norm.trainable = False
