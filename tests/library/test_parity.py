"""The same numbers as `keras.applications`, torchvision, and this package on the other backends."""

import keras
import numpy as np
import pytest
import torch
import torchvision

import keras_mnv2
from tests.conftest import BACKENDS, ONCE
from tests.helpers import double_precision, note, randomise, relative_difference, relative_norm, run_python
from tests.peers import copy_keras_applications, copy_torchvision, exact_batch_norms, torch_pairs

# weights/test_weights.py has all six in float32. XLA compiles keras.applications for most of a minute each.
WIDTHS = [
    pytest.param(alpha, marks=[] if alpha == 0.35 and keras.backend.backend() == "torch" else pytest.mark.slow)
    for alpha in (0.35, 1.0, 1.4)
]
# Beside the model with its top, each width has one of the others.
TOPS = {0.35: {"pooling": "avg"}, 1.0: {"pooling": "max"}, 1.4: {}}


def outputs_beside_keras_applications(alpha, size, top, rng):
    arguments = {"input_shape": (size, size, 3), "alpha": alpha, "weights": None, **top}
    source = keras.applications.MobileNetV2(**arguments)
    model = keras_mnv2.MobileNetV2(**arguments)
    assert model.output_shape == source.output_shape
    assert model.count_params() == source.count_params()
    assert model.name == source.name
    randomise(source, rng)
    copy_keras_applications(source, model)
    if keras.config.dtype_policy().name == "float64":
        exact_batch_norms(source)
    x = rng.uniform(-1, 1, (2, size, size, 3))
    return model.predict(x, verbose=0), source.predict(x, verbose=0)


@pytest.mark.parametrize("alpha", WIDTHS)
def test_keras_applications(alpha, rng):
    # In float64: in float32 both models are about 2e-5 off these numbers, each by its own rounding.
    largest = 0.0
    with double_precision():
        for size, top in ((96, {}), (128, {"include_top": False, **TOPS[alpha]})):
            found, expected = outputs_beside_keras_applications(alpha, size, top, rng)
            assert found.dtype == "float64"
            largest = max(largest, relative_difference(found, expected))
    note(f"keras.applications in float64, alpha {alpha}: largest relative difference", largest)
    assert largest <= 1e-5


def model_and_torchvision(alpha, rng, **arguments):
    torch.manual_seed(0)
    source = torchvision.models.mobilenet_v2(width_mult=alpha, dropout=0.0)
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            channels = module.weight.shape[0]
            module.weight.data.copy_(torch.from_numpy(rng.uniform(0.8, 1.2, channels)))
            module.bias.data.copy_(torch.from_numpy(rng.normal(0, 0.3, channels)))
            module.momentum = 1.0
    with torch.no_grad():
        source.train()(torch.from_numpy(rng.normal(size=(8, 3, 96, 96)).astype("float32")))
    model = keras_mnv2.MobileNetV2(
        (96, 96, 3),
        alpha=alpha,
        weights=None,
        classifier_activation=None,
        padding="symmetric",
        norm_epsilon=1e-5,
        dropout=0.0,
        **arguments,
    )
    copy_torchvision(source, model)
    return model, source


@pytest.mark.parametrize("alpha", [0.35, 1.4])
def test_torchvision_logits(alpha, rng):
    model, source = model_and_torchvision(alpha, rng)
    x = rng.normal(size=(2, 96, 96, 3)).astype("float32")
    with torch.no_grad():
        expected = source.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    difference = float(np.abs(model.predict(x, verbose=0) - expected).max())
    note(f"torchvision, alpha {alpha}: largest difference of logits", difference)
    assert difference <= 1e-4


def loss_gradients(model, x, labels):
    """Gradients of the mean cross entropy in training mode, by variable path."""
    variables = model.trainable_variables

    def loss_of(logits):
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(model(x, training=True))
        found = tape.gradient(loss, [v.value for v in variables])
    elif keras.backend.backend() == "jax":
        import jax

        def run(values):
            other = [v.value for v in model.non_trainable_variables]
            return loss_of(model.stateless_call(values, other, x, training=True)[0])

        found = jax.jit(jax.grad(run))([v.value for v in variables])
    else:
        loss_of(model(x, training=True)).backward()
        found = [v.value.grad for v in variables]
    return {v.path: keras.ops.convert_to_numpy(g) for v, g in zip(variables, found, strict=True)}


def largest_gradient_difference(model, source, x):
    """Relative to the gradient of the same weight, or to a thousandth of the whole gradient where it is smaller.

    (The shift of a projection's batch norm has no gradient at all: the next batch norm takes it out.)
    """
    labels = np.arange(len(x))
    logits = source.train()(torch.from_numpy(x).permute(0, 3, 1, 2))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    found = loss_gradients(model, x, labels)
    pairs = [(v, np.transpose(t.grad.numpy(), axes)) for v, t, axes in torch_pairs(source, model) if t.grad is not None]
    assert {v.path for v, _ in pairs} == set(found)
    whole = np.sqrt(sum(np.sum(np.square(expected, dtype="float64")) for _, expected in pairs))
    return max(
        float(np.linalg.norm(found[v.path] - expected) / max(np.linalg.norm(expected), 1e-3 * whole))
        for v, expected in pairs
    )


@pytest.mark.parametrize("alpha", [0.35, *(pytest.param(alpha, marks=ONCE) for alpha in (1.0, 1.4))])
def test_torchvision_gradients_in_training_mode(alpha, rng):
    # With a smooth activation: with ReLU6 torchvision's own float32 gradients are 4 % off its float64
    # ones, since rounding moves activations across the kinks, and no comparison could be sharp.
    model, source = model_and_torchvision(alpha, rng, activation="silu")
    for module in source.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU6):
                setattr(module, name, torch.nn.SiLU())
    largest = largest_gradient_difference(model, source, rng.normal(size=(8, 96, 96, 3)).astype("float32"))
    note(f"torchvision with SiLU, alpha {alpha}: largest relative difference of a weight's gradient", largest)
    assert largest <= 1e-3


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="is about a path of PyTorch's; see the test above")
@pytest.mark.parametrize("alpha", [0.35, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (1.0, 1.4))])
def test_torchvision_gradients_with_relu6(alpha, rng):
    # In double precision, so that rounding moves no activation across the kinks.
    model, source = model_and_torchvision(alpha, rng, dtype="float64")
    x = rng.normal(size=(8, 96, 96, 3)).astype("float32").astype("float64")  # The input of a model is float32.
    largest = largest_gradient_difference(model, source.double(), x)
    note(f"torchvision, alpha {alpha}: largest relative difference of a weight's gradient", largest)
    # Keras (3.15.1) averages the pixels in float32.
    assert largest <= 1e-4


def test_initial_weights_are_distributed_as_torchvisions(rng):
    source = torchvision.models.mobilenet_v2()
    model = keras_mnv2.MobileNetV2(weights=None)
    for variable, tensor, _ in torch_pairs(source, model):
        found, expected = keras.ops.convert_to_numpy(variable), tensor.detach().numpy()
        if expected.std() == 0:
            assert (found == expected.flat[0]).all(), variable.path
            continue
        # Four standard errors of a standard deviation and of a mean, for two samples.
        margin = 4 * np.sqrt(2 / expected.size)
        assert abs(found.std() / expected.std() - 1) < margin, variable.path
        assert abs(found.mean() - expected.mean()) < margin * expected.std(), variable.path


ELSEWHERE = """
import sys, keras, keras_mnv2, numpy as np
folder, backend = sys.argv[1:]
batch = np.load(f"{folder}/batch.npz")
scores = keras.models.load_model(f"{folder}/infers.keras").predict(batch["x"], verbose=0)
model = keras.models.load_model(f"{folder}/learns.keras")
model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
model.train_on_batch(batch["x"], batch["y"])
np.savez(f"{folder}/{backend}.npz", scores, *model.get_weights())
"""


def flat(weights):
    return np.concatenate([weight.ravel() for weight in weights])


# ReLU6 turns rounding into gradients that differ by percents (see above): there the whole step is compared.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "of_a_weight", "of_the_step"),
    [("silu", 1e-5, 1e-3), pytest.param("relu6", None, 0.1, marks=pytest.mark.slow)],
)
def test_keras_files_infer_and_learn_alike_on_all_backends(activation, of_a_weight, of_the_step, tmp_path, rng):
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 1, 1)]
    common = {"input_shape": (64, 64, 3), "weights": None, "classes": 10, "inverted_residual_setting": rows}
    infers = keras_mnv2.MobileNetV2(**common, stochastic_depth=0.1)
    randomise(infers, rng)
    infers.save(tmp_path / "infers.keras")
    learns = keras_mnv2.MobileNetV2(**common, dropout=0.0, activation=activation)
    learns.save(tmp_path / "learns.keras")
    x, y = rng.uniform(-1, 1, (8, 64, 64, 3)).astype("float32"), np.arange(8)
    np.savez(tmp_path / "batch.npz", x=x, y=y)
    scores, before = infers.predict(x, verbose=0), flat(learns.get_weights())
    learns.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    learns.train_on_batch(x, y)
    after = flat(learns.get_weights())
    assert np.abs(after - before).max() > 1e-3
    for backend in set(BACKENDS) - {keras.backend.backend()}:
        run_python(ELSEWHERE, backend, tmp_path, backend)
        with np.load(tmp_path / f"{backend}.npz") as file:
            found, *weights = file.values()
        difference = relative_difference(found, scores)
        note(f"the same .keras file on {backend}: relative difference", difference)
        assert difference <= 1e-5
        of_step = relative_norm(flat(weights) - before, after - before)
        note(f"one SGD step on {backend}, {activation}: relative difference of the step", of_step)
        assert of_step <= of_the_step
        if of_a_weight is not None:
            assert np.abs(flat(weights) - after).max() <= of_a_weight
