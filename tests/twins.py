"""The same network twice, by `keras.applications` and by this package, with equal weights."""

import keras
import numpy as np

import keras_mnv2

SIZE = (64, 64, 3)
CLASSES = 3


def theirs(**arguments):
    """`keras.applications`' small model; arguments are its own."""
    common = {"input_shape": SIZE, "alpha": 0.35, "weights": None, "classes": CLASSES}
    return keras.applications.MobileNetV2(**{**common, **arguments})


def ours(**arguments):
    """This package's, by the function that has the same arguments and defaults."""
    common = {"input_shape": SIZE, "alpha": 0.35, "weights": None, "classes": CLASSES}
    return keras_mnv2.applications.MobileNetV2(**{**common, **arguments})


def pair(**arguments):
    """Both, with weights like those of a trained network."""
    source, model = theirs(**arguments), ours(**arguments)
    enliven(source)
    model.set_weights(source.get_weights())
    return source, model


def layers_of(model):
    """The layers of a model and of the models in it, in order."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from layers_of(layer)
        else:
            yield layer


def norms_of(model):
    """The batch norms of a model, nested ones too."""
    return [layer for layer in layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]


def statistics(model):
    """The moving statistics, as arrays."""
    found = [weight for weight in model.weights if "moving" in weight.path]
    return [keras.ops.convert_to_numpy(weight).copy() for weight in found]


def moved(before, after):
    """How many arrays have changed."""
    return sum(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def enliven(model, seed=0):
    """Weights drawn anew, and statistics that keep the signal alive without a pass of images: the same on each backend.

    A convolution with independent weights gives each channel the variance that its kernel's squares and the mean square
    of its input make.
    """
    rng = np.random.default_rng(seed)
    square, kernel = 1 / 3, None
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.DepthwiseConv2D | keras.layers.Conv2D):
            kernel = layer.kernel
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            fan_in = np.prod(kernel.shape[:2] if depthwise else kernel.shape[:3])
            value = rng.normal(0, np.sqrt(1 / fan_in), kernel.shape)
            kernel.assign(value)
            variance = square * (value**2).sum((0, 1, 3) if depthwise else (0, 1, 2))
        elif isinstance(layer, keras.layers.BatchNormalization):
            channels = variance.shape
            gamma, beta = rng.uniform(0.8, 1.2, channels), rng.normal(0, 0.3, channels)
            layer.set_weights([gamma, beta, rng.normal(0, 0.1, channels), variance * rng.uniform(0.8, 1.2, channels)])
            square = 1.1
        elif isinstance(layer, keras.layers.ReLU):
            square = 0.55
        elif isinstance(layer, keras.layers.Dense):
            shape = layer.kernel.shape
            layer.set_weights([rng.normal(0, np.sqrt(1 / shape[0]), shape), rng.normal(0, 0.1, shape[1])])


def batch(count=8, seed=1, size=SIZE):
    """Images and labels."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, *size)).astype("float32"), rng.integers(0, CLASSES, count)


def compile_alike(models, rate=1e-4, **arguments):
    """Plain gradient descent, so that equal gradients give equal steps."""
    for model in models:
        arguments.setdefault("loss", "sparse_categorical_crossentropy")
        model.compile(keras.optimizers.SGD(rate), **arguments)


def losses_of(model, x, y, epochs=2):
    """The loss of each of some steps over all images."""
    return model.fit(x, y, batch_size=len(x), epochs=epochs, shuffle=False, verbose=0).history["loss"]
