"""What the operations on TensorFlow do in graphs: gradients of their own, which leave no trace in files."""

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2 import ops
from tests.helpers import relative_difference

# Other backends' processes stay without it.
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's graphs")


def own(x, kernel):
    return ops.convolution(x, kernel)


def plain(x, kernel):
    return tf.nn.conv2d(x, kernel, 1, "SAME")


@pytest.fixture
def arrays(rng):
    shapes = (2, 5, 7, 3), (1, 1, 3, 4)
    return [tf.constant(rng.normal(size=shape), "float32") for shape in shapes]


def both(make, arrays, shapes=None):
    """What `make` computes in a graph with the convolution of each, as arrays."""
    shapes = shapes or [a.shape for a in arrays]
    specs = [tf.TensorSpec(shape, "float32") for shape in shapes]
    return [
        [a.numpy() for a in tf.nest.flatten(tf.function(make(convolution), specs)(*arrays))]
        for convolution in (own, plain)
    ]


def assert_equal(results):
    found, expected = results
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert relative_difference(a, b) <= 1e-5


def gradients(convolution):
    def compute(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            y = convolution(x, kernel)
            loss = tf.reduce_sum(tf.sin(y))
        return y, tape.gradient(loss, (x, kernel))

    return compute


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (None, None, None, 3)])
def test_gradients_of_a_pointwise_convolution(arrays, shape):
    assert_equal(both(gradients, arrays, [shape, (1, 1, 3, 4)]))


def test_second_derivatives_of_a_pointwise_convolution(arrays):
    def second(convolution):
        def compute(x, kernel):
            with tf.GradientTape() as tape:
                tape.watch((x, kernel))
                _, (of_x, of_kernel) = gradients(convolution)(x, kernel)
                total = tf.reduce_sum(of_x**2) + tf.reduce_sum(of_kernel**2)
            return tape.gradient(total, (x, kernel))

        return compute

    assert_equal(both(second, arrays))


def test_forward_mode_of_a_pointwise_convolution(arrays):
    def forward(convolution):
        def compute(x, kernel):
            with tf.autodiff.ForwardAccumulator((x, kernel), (tf.cos(x), tf.cos(kernel))) as accumulator:
                y = convolution(x, kernel)
            return accumulator.jvp(y)

        return compute

    assert_equal(both(forward, arrays))


def test_a_vectorised_pointwise_convolution(arrays):
    def each(convolution):
        def compute(x, kernel):
            return tf.vectorized_map(lambda image: gradients(convolution)(image[None], kernel), x)

        return compute

    assert_equal(both(each, arrays))


def test_files_that_keras_and_tensorflow_write_say_nothing_of_it(tmp_path, capfd, rng):
    from ai_edge_litert.interpreter import Interpreter

    keras.utils.set_random_seed(0)
    model = keras_mnv2.MobileNetV2(
        (32, 32, 3), weights=None, classes=3, inverted_residual_setting=[(1, 8, 1, 1), (6, 8, 1, 2)]
    )
    images = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    expected = model.predict(images, verbose=0)
    model.export(tmp_path / "saved", verbose=False)
    capfd.readouterr()
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    assert "gradient" not in capfd.readouterr().err
    assert relative_difference(loaded.serve(images).numpy(), expected) <= 1e-5
    with tf.GradientTape() as tape:
        tape.watch(variable := tf.constant(images))
        scores = loaded.serve(variable)
    assert np.isfinite(tape.gradient(scores, variable).numpy()).all()
    interpreter = Interpreter(model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert())
    kinds = {operator["op_name"] for operator in interpreter._get_ops_details()}
    assert kinds <= {"CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "MEAN", "FULLY_CONNECTED", "SOFTMAX", "PAD", "DELEGATE"}
