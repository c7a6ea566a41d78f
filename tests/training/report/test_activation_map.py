import keras
import numpy as np
import pytest

import keras_mnv2
from tests.conftest import ONCE, once
from tests.helpers import note, randomise
from training.data.batches import ordered_batches
from training.data.sets import ArraySplit
from training.report import mistakes
from training.report.activation_map import COLOURS, activation_maps, overlay

STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 1, 2))
SIDES = 64, 96


def network(rng, data_format="channels_last", **arguments):
    """A network with weights of all kinds, and images for it."""
    shape = (*SIDES, 3) if data_format == "channels_last" else (3, *SIDES)
    options = {"weights": None, "classes": 5, "inverted_residual_setting": STAGES, "data_format": data_format}
    model = keras_mnv2.MobileNetV2(shape, 0.35, include_preprocessing=True, **options, **arguments)
    images = rng.uniform(0, 255, (6, *shape)).astype("float32")
    randomise(model, rng, images)
    return model, images


def gradients(function, x):
    """Of a sum of scores with respect to an array, by the backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = function(x)
        return tape.gradient(total, x).numpy()
    if keras.backend.backend() == "jax":
        import jax

        return np.asarray(jax.grad(function)(x))
    x = keras.ops.convert_to_tensor(x).requires_grad_()
    function(x).backward()
    return x.grad.cpu().numpy()


def grad_cam(model, images, classes, data_format):
    """Equations 1 and 2 of Selvaraju et al. 2017, from gradients; each map divided by its largest value."""
    number = next(i for i, layer in enumerate(model.layers) if isinstance(layer, keras.layers.GlobalAveragePooling2D))
    tail = model.layers[number:]
    features = keras.Model(model.input, tail[0].input).predict_on_batch(images)
    channels = -1 if data_format == "channels_last" else 1
    chosen = keras.utils.to_categorical(classes, 5)

    def total(x):
        for layer in tail:
            x = layer(x, training=False) if isinstance(layer, keras.layers.Dropout) else layer(x)
        return keras.ops.sum(keras.ops.multiply(x, chosen))

    found = gradients(total, features)
    places = tuple(axis for axis in (1, 2, 3) if axis != channels % 4)
    importance = found.mean(axis=places, keepdims=True)
    maps = (importance * features).sum(axis=channels).clip(min=0)
    large = keras.ops.image.resize(maps[..., None], SIDES, interpolation="bilinear", data_format="channels_last")
    large = keras.ops.convert_to_numpy(large)[..., 0]
    return large / large.max(axis=(1, 2), keepdims=True)


@once
@pytest.mark.parametrize(
    ("activation", "dropout", "data_format"),
    [
        ("softmax", 0.2, "channels_last"),
        pytest.param(None, 0.0, "channels_last", marks=ONCE),
        pytest.param("softmax", 0.5, "channels_first", marks=ONCE),
    ],
)
def test_the_maps_are_those_of_grad_cam(activation, dropout, data_format, rng, monkeypatch):
    model, images = network(rng, data_format, classifier_activation=activation, dropout=dropout)
    classes = np.array([0, 1, 2, 3, 4, 1])
    found = activation_maps(model, images, classes)
    # The gradient is that of the score before the softmax.
    monkeypatch.setattr(model.get_layer("predictions"), "activation", keras.activations.linear)
    expected = grad_cam(model, images, classes, data_format)
    note("activation maps, largest difference from Grad-CAM by gradients", np.abs(found - expected).max())
    assert found.shape == (6, *SIDES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.std(axis=(1, 2)).min() > 0.05, "the maps must tell places apart"
    assert np.abs(found[1] - activation_maps(model, images, (classes + 1) % 5)[1]).max() > 0.05, "and classes"


def test_other_tops_with_the_same_layers(rng):
    """A softmax of its own, as Keras's guide to mixed precision has it, and a backbone that is one layer."""
    model, images = network(rng, classifier_activation=None)
    classes = np.arange(6) % 5
    softmax = keras.Model(model.input, keras.layers.Activation("softmax")(model.output))
    backbone = keras.Model(model.input, model.layers[-3].input)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dropout(0.1), keras.layers.Dense(5)]
    nested = keras.Sequential([keras.Input((*SIDES, 3)), backbone, *head])
    head[-1].set_weights(model.get_layer("predictions").get_weights())
    expected = activation_maps(model, images, classes)
    for other in (softmax, nested):
        np.testing.assert_allclose(activation_maps(other, images, classes), expected, atol=1e-5)


@once
def test_in_mixed_precision_the_maps_are_nearly_the_same(rng):
    model, images = network(rng)
    half, _ = network(rng, dtype="mixed_bfloat16")
    half.set_weights(model.get_weights())
    classes = np.arange(6) % 5
    found, expected = activation_maps(half, images, classes), activation_maps(model, images, classes)
    assert found.dtype == np.float32
    assert np.abs(found - expected).mean() < 0.05


def test_where_nothing_speaks_for_a_class_the_map_is_zero(rng):
    model, images = network(rng)
    kernel, bias = model.get_layer("predictions").get_weights()
    # The features are at least 0.
    model.get_layer("predictions").set_weights([-np.abs(kernel), bias])
    assert not activation_maps(model, images, np.zeros(6, int)).any()


def test_a_model_with_another_end_is_refused():
    model = keras_mnv2.MobileNetV2((64, 64, 3), 0.35, weights=None, include_top=False, pooling="avg")
    with pytest.raises(ValueError, match="model must end in GlobalAveragePooling2D and Dense, got "):
        activation_maps(model, np.zeros((1, 64, 64, 3)), np.array([0]))
    flat = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="got Flatten, Dense"):
        activation_maps(flat, np.zeros((1, 8, 8, 3)), np.array([0]))


def test_colours_lie_where_the_map_is():
    image = np.zeros((2, 2, 3), "uint8") + np.array([30, 60, 90], "uint8")
    found = overlay(image, np.array([[0.0, 1.0], [0.0, 0.5]]))
    assert found[0, 0].tolist() == found[1, 0].tolist() == [60, 60, 60]
    assert found[0, 1] == pytest.approx(0.25 * 60 + 0.75 * COLOURS[-1], abs=0.5)
    assert overlay(image[..., :1], np.zeros((2, 2))).shape == (2, 2, 3)


def test_the_worst_mistakes_are_shown_as_the_network_saw_them(rng):
    model, images = network(rng, dropout=0.0)
    pixels = images.round().astype("uint8")
    split = ArraySplit(pixels, np.arange(6) % 5)
    how = keras_mnv2.Preprocessing(64, 64, crop_rounding="round")
    batches = ordered_batches(split, 5, how, 4)
    batches.prepare = lambda image, rng: image.astype("float32")
    scores = np.eye(5)[[0, 2, 2, 3, 0, 1]] * 0.6 + 0.08
    scores[4] = [0.9, 0.025, 0.025, 0.025, 0.025]
    batches.unreadable["image 3"] = "broken"
    kept = [0, 1, 2, 4, 5]
    names = ["ant", "bee", "cat", "dog", "elk"]
    found = mistakes.worst(scores[kept], split.labels[kept], batches, names)
    assert [(one.name, one.label, one.prediction) for one in found] == [
        ("image 4", "elk", "ant"),
        ("image 1", "bee", "cat"),
        ("image 5", "ant", "bee"),
    ]
    assert (found[0].probability, found[0].label_probability) == pytest.approx((0.9, 0.025))
    np.testing.assert_array_equal(found[0].image, pixels[4])
    explained = mistakes.explained(found, lambda images, classes: activation_maps(model, images, classes))
    expected = activation_maps(model, pixels[[4, 1, 5]].astype("float32"), np.array([0, 2, 1]))
    for one, heat in zip(explained, expected, strict=True):
        np.testing.assert_array_equal(one.heat, heat)
    assert mistakes.explained([], None) == []
