"""What well-known tutorials do with keras.applications.MobileNetV2, done with both models from equal weights.

After TensorFlow's "Transfer learning and fine-tuning" and "Image segmentation", and keras.io's "Grad-CAM class
activation visualization", in words of our own.
"""

import keras
import numpy as np

from tests import twins
from tests.conftest import once
from tests.helpers import relative_difference

SKIPS = (
    "block_1_expand_relu",
    "block_3_expand_relu",
    "block_6_expand_relu",
    "block_13_expand_relu",
    "block_16_project",
)


def agree(models, x, y):
    found = [twins.losses_of(model, x, y) for model in models]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) <= 1e-4


@once
def test_transfer_learning_and_fine_tuning():
    x, y = twins.batch()
    models = []
    for base in twins.pair(include_top=False):
        base.trainable = False
        image = keras.Input(twins.SIZE)
        features = keras.layers.GlobalAveragePooling2D()(base(image, training=False))
        scores = keras.layers.Dense(twins.CLASSES, kernel_initializer=keras.initializers.Constant(0.01))(features)
        models.append(keras.Model(image, scores))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    twins.compile_alike(models, loss=loss)
    agree(models, x, y)
    for model in models:
        base = model.layers[1]
        base.trainable = True
        for layer in base.layers[:100]:
            layer.trainable = False
        # Statistics of eight images would make the rest of the network chaotic.
        for norm in twins.norms_of(base):
            norm.trainable = False
    twins.compile_alike(models, rate=1e-5, loss=loss)
    assert len(models[0].trainable_weights) == len(models[1].trainable_weights)
    agree(models, x, y)


@once
def test_image_segmentation():
    x, _ = twins.batch(4)
    masks = np.random.default_rng(2).integers(0, 3, (4, *twins.SIZE[:2]))
    models = []
    for base in twins.pair(include_top=False):
        down = keras.Model(base.input, [base.get_layer(name).output for name in SKIPS])
        down.trainable = False
        image = keras.Input(twins.SIZE)
        *skips, y = down(image)
        for skip, filters in zip(reversed(skips), (32, 16, 8, 8), strict=True):
            draw = keras.initializers.RandomNormal(stddev=0.02, seed=filters)
            y = keras.layers.Conv2DTranspose(filters, 3, strides=2, padding="same", kernel_initializer=draw)(y)
            y = keras.layers.Concatenate()([keras.layers.ReLU()(y), skip])
        draw = keras.initializers.RandomNormal(stddev=0.02, seed=0)
        y = keras.layers.Conv2DTranspose(3, 3, strides=2, padding="same", kernel_initializer=draw)(y)
        models.append(keras.Model(image, y))
    twins.compile_alike(models, rate=1e-3, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected, found = (model.predict(x, verbose=0) for model in models)
    assert relative_difference(found, expected) <= 1e-5
    agree(models, x, masks)


def gradient_at(model, name, x):
    """The map of a layer, and the gradient of the best class's score with respect to it."""
    both = keras.Model(model.input, [model.get_layer(name).output, model.output])
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            feature_map, scores = both(x, training=False)
            best = tf.reduce_max(scores, 1)
        return feature_map.numpy(), tape.gradient(best, feature_map).numpy()
    rest = keras.Model(model.get_layer(name).output, model.output)
    if backend == "jax":
        import jax

        # Compiled at once: operation by operation it takes a minute.
        feature_map = jax.jit(lambda x: both(x, training=False)[0])(x)
        gradient = jax.jit(jax.grad(lambda feature_map: rest(feature_map, training=False).max(1).sum()))(feature_map)
        return np.asarray(feature_map), np.asarray(gradient)
    feature_map = both(x, training=False)[0].detach().requires_grad_()
    rest(feature_map, training=False).max(1).values.sum().backward()
    return feature_map.detach().numpy(), feature_map.grad.numpy()


@once
def test_class_activation_maps():
    x, _ = twins.batch(2)
    maps = []
    for model in twins.pair():
        last = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)][-1]
        assert last == "Conv_1"
        feature_map, gradient = gradient_at(model, last, x)
        maps.append(np.maximum((feature_map * gradient.mean((1, 2), keepdims=True)).sum(-1), 0))
    assert maps[0].max() > 0
    assert relative_difference(maps[1], maps[0]) <= 1e-4
