import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2.layers import ConvNormActivation, InvertedResidual
from keras_mnv2.quantize import (
    FakeQuantize,
    QuantizedConvNormActivation,
    QuantizedDense,
    QuantizedInvertedResidual,
)
from tests.conftest import once_on
from tests.exports import pictures, small
from tests.helpers import note, randomise, relative_difference, relative_norm
from tests.library.ops.test_ops import gradients


def pair_sums(kernel):
    """`pairs` of integers in ONNX's order, (outputs, inputs, height, width)."""
    return pairs(kernel.transpose(2, 3, 1, 0).astype(int))


def pairs(kernel):
    """Sums of the neighbours of a kernel (height, width, inputs, outputs), with the inputs as last or first axis."""
    for row in (kernel, np.moveaxis(kernel, 2, 0)):
        flat = row.reshape(-1, kernel.shape[-1])
        yield np.stack([flat[i] + flat[i + 1] for i in range(0, len(flat) - 1, 2)])


def steps(kernel):
    """The step of each channel of symmetric 8-bit integers. No sum of two neighbours is above 127 steps."""
    if kernel.shape[-1] == 1:
        return np.abs(kernel).max((0, 1, 3), keepdims=True) / 127
    found = [np.abs(kernel).max((0, 1, 2)), *(np.abs(sums).max(0) for sums in pairs(kernel))]
    return np.max(found, axis=0).reshape(1, 1, 1, -1) / 127


def numpy(x):
    return keras.ops.convert_to_numpy(x)


# The compact form's layers fold and round by the same code.
@pytest.fixture(
    scope="module", params=[None, pytest.param(InvertedResidual, marks=pytest.mark.slow)], ids=["open", "compact"]
)
def trained(request):
    """A small model, its quantisation-aware copy after two epochs on pictures of four colours, and the pictures."""
    rng = np.random.default_rng(2)
    keras.utils.set_random_seed(0)
    labels = np.arange(96) % 4
    colours = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])[labels][:, None, None]
    images = np.clip(pictures(rng, 96) * 0.6 - 20 + 130 * colours, 0, 255)
    model = small(include_preprocessing=True, classes=4, dropout=0, block=request.param)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(images, labels, batch_size=32, epochs=8, verbose=0)
    quantized = keras_mnv2.quantize_aware(model)
    quantized.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = quantized.fit(images, labels, batch_size=32, epochs=3, verbose=0)
    return model, quantized, images.astype("float32"), labels, history.history


def test_it_trains_with_fit_and_predicts_well(trained):
    _, quantized, images, labels, history = trained
    assert history["loss"][-1] <= 0.1
    found = quantized.predict(images, verbose=0)
    assert (found.argmax(1) == labels).mean() >= 0.97
    _, accuracy = quantized.evaluate(images, labels, verbose=0)
    assert accuracy >= 0.97


def test_names_outputs_and_weights_are_those_of_the_model(trained):
    model, quantized = trained[:2]
    # A convolution has its padding, batch norm and activation inside.
    inside = (keras.layers.ZeroPadding2D, keras.layers.BatchNormalization, keras.layers.ReLU)
    assert [layer.name for layer in quantized.layers if layer.name != "input_range"] == [
        layer.name for layer in model.layers if not isinstance(layer, inside)
    ]
    assert quantized.output_shape == model.output_shape
    assert quantized.input_shape == model.input_shape
    fresh = keras_mnv2.quantize_aware(model)
    # The norm inside a convolution's layer is called `norm`.
    convs = {
        layer.name: layer.input._keras_history.operation.name
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    }

    def path(weight):
        name, _, rest = weight.path.partition("/")
        return f"{convs[name]}/norm/{rest}" if name in convs else weight.path

    given = {path(weight): numpy(weight) for weight in model.weights}
    kept = [weight for weight in fresh.weights if weight.path in given]
    assert len(kept) == len(given)
    assert all(np.array_equal(numpy(weight), given[weight.path]) for weight in kept)
    # Trained are those of the model: neither the ranges nor the scaling of the pixels.
    assert {w.path for w in fresh.trainable_weights} == {path(w) for w in model.trainable_weights}


def test_it_is_saved_and_loaded(trained, tmp_path):
    quantized, images = trained[1], trained[2]
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict(images, verbose=0), quantized.predict(images, verbose=0))


def test_folding_its_batch_norms_changes_no_bit_of_its_kernels(trained):
    quantized, images = trained[1], trained[2]
    folded = keras_mnv2.fold_batch_norm(quantized)
    assert not [weight.path for weight in folded.weights if "moving" in weight.path]
    assert np.abs(folded.predict(images, verbose=0) - quantized.predict(images, verbose=0)).max() <= 1e-5


@pytest.mark.slow
def test_the_8_bit_onnx_file_gives_its_predictions_and_holds_its_integers(trained, tmp_path):
    import onnx

    _, quantized, images, _, _ = trained
    path = tmp_path / "model.onnx"
    report = keras_mnv2.export(quantized, path, "onnx", precision="int8", sample=images, verbose=False)
    note("int8 of quantisation-aware training as ONNX: mean absolute error", report.mean_absolute_error)
    assert report.top1_agreement >= 0.97
    assert report.mean_absolute_error <= 0.01
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    # Each activation's rounding is a pair of its own, and nothing limits what the integers limit.
    assert "Round" not in kinds
    assert "Clip" not in kinds
    arrays = [onnx.numpy_helper.to_array(w) for w in graph.initializer if len(w.dims) == 4]
    stored = [array for array in arrays if array.dtype == np.int8]
    kernels = [w for w in keras_mnv2.fold_batch_norm(quantized).weights if w.path.endswith("/kernel")]
    kernels = [numpy(w) for w in kernels if len(w.shape) == 4]
    assert len(stored) == len(kernels)
    for kernel in kernels:
        # ONNX's order: (out, in, height, width), and (channels, 1, height, width) where it is depthwise.
        depthwise = kernel.shape[-1] == 1
        integers = np.round(kernel / steps(kernel)).transpose((2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
        assert min((s != integers).mean() for s in stored if s.shape == integers.shape) <= 0.01
    assert max(np.abs(sums).max() for s in stored if s.shape[1] > 1 for sums in pair_sums(s)) <= 128


@once_on("tensorflow")
def test_the_int8_file_gives_its_predictions_and_holds_its_integers(trained, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    _, quantized, images, labels, _ = trained
    path = tmp_path / "model.tflite"
    common = {"precision": "int8", "io_dtype": "uint8", "verbose": False}
    report = keras_mnv2.export(quantized, path, "litert", sample=images, **common)
    note("int8 of quantisation-aware training: mean absolute error", report.mean_absolute_error)
    assert report.top1_agreement >= 0.97
    assert report.mean_absolute_error <= 0.01
    (found,) = keras_mnv2.load_export(path)(images).values()
    assert (found.argmax(1) == labels).mean() >= 0.95
    interpreter = Interpreter(model_path=str(path))
    # Raw bytes go in as they are: the level of 0 is 0 and levels are 1 apart.
    assert interpreter.get_input_details()[0]["quantization"] == (pytest.approx(1, abs=0.02), 0)
    interpreter.allocate_tensors()
    tensors = interpreter.get_tensor_details()
    assert not [tensor["name"] for tensor in tensors if tensor["dtype"] == np.float32]
    folded = keras_mnv2.fold_batch_norm(quantized)
    # LiteRT's order: (out, height, width, in), and (1, height, width, channels) where it is depthwise.
    kernels = [w for w in folded.weights if w.path.endswith("/kernel") and len(w.shape) == 4]
    wanted = [np.round(numpy(w) / steps(numpy(w))).transpose(3, 0, 1, 2) for w in kernels]
    shapes = {k.shape for k in wanted}
    stored = [
        interpreter.get_tensor(t["index"]) for t in tensors if tuple(t["shape"]) in shapes and t["dtype"] == np.int8
    ]
    for integers in wanted:
        alike = [s for s in stored if s.shape == integers.shape and np.abs(s - integers).max() <= 1]
        assert alike, f"no tensor of the file is the kernel {integers.shape}"
        assert min((s != integers).mean() for s in alike) <= 0.01


def test_a_first_step_takes_the_range_and_later_ones_follow_it():
    layer = FakeQuantize(momentum=0.75)
    one, two = (np.array(x, "float32") for x in ([-1.0, 0.5, 3.0], [0.5, 7.0, 2.0]))
    layer(one, training=False)
    assert (float(layer.minimum), float(layer.maximum)) == (-6, 6)
    layer(one, training=True)
    assert (float(layer.minimum), float(layer.maximum)) == (-1, 3)
    layer(two, training=True)
    # The range holds 0, so the least of the second batch counts as 0.
    assert (float(layer.minimum), float(layer.maximum)) == (-0.75, 4)
    layer.trainable = False
    layer(two, training=True)
    assert float(layer.maximum) == 4.75


@pytest.mark.parametrize("groups", [1, 8])
def test_in_inference_the_folded_kernel_is_rounded_for_each_channel(groups, rng):
    x = rng.normal(size=(2, 6, 5, 8)).astype("float32")
    layer = QuantizedConvNormActivation(8, groups=groups, stride=2)
    layer(x)
    randomise(layer, rng, x)
    scale = numpy(layer.norm.gamma) / np.sqrt(numpy(layer.norm.moving_variance) + layer.norm.epsilon)
    kernel = numpy(layer.kernel) * (scale if groups == 1 else scale[:, None])
    plain = ConvNormActivation(8, groups=groups, stride=2, norm_layer=None)
    plain.build(x.shape)
    kernel = np.round(kernel / steps(kernel)) * steps(kernel)
    plain.set_weights([kernel, numpy(layer.norm.beta) - numpy(layer.norm.moving_mean) * scale])
    low, high = float(layer.output_range.minimum), float(layer.output_range.maximum)
    step = (high - low) / 255
    found = numpy(layer(x))
    assert np.abs(found - np.clip(numpy(plain(x)), low, high)).max() <= step / 2 + 1e-5
    levels = found / step
    assert np.abs(levels - np.round(levels)).max() <= 1e-2


@pytest.mark.parametrize(("groups", "training"), [(1, True), (8, True), (1, False)])
def test_statistics_and_gradients_are_those_of_the_float_layer(groups, training, rng):
    x = rng.normal(size=(4, 6, 6, 8)).astype("float32")
    common = {"groups": groups, "activation": "silu", "norm_momentum": 0.0}
    layers = [ConvNormActivation(8, **common), QuantizedConvNormActivation(8, **common)]
    found = []
    for layer in layers:
        layer.build(x.shape)
        layer.kernel.assign(np.random.default_rng(3).normal(size=layer.kernel.shape))
        layer(x, training=True)

        def run(t, layer=layer):
            with keras.StatelessScope():
                return layer(t, training=training)

        found.append(gradients(run, [x])[1])
    float_layer, layer = layers
    for name in ("moving_mean", "moving_variance"):
        assert relative_difference(*(numpy(getattr(one.norm, name)) for one in (layer, float_layer))) <= 1e-5
    # Rounding to 8 bits moves a gradient by some percent.
    assert relative_norm(found[1], found[0]) <= 0.06


def test_a_kernels_gradient_passes_the_rounding(rng):
    x = rng.normal(size=(4, 6, 6, 8)).astype("float32")
    kernel = rng.normal(size=(3, 3, 8, 8)).astype("float32")
    found = []
    for kind in (ConvNormActivation, QuantizedConvNormActivation):
        layer = kind(8, activation=None)
        layer(x, training=True)

        def run(value, layer=layer):
            with keras.StatelessScope(state_mapping=[(layer.kernel, value)]):
                return layer(x, training=True)

        found.append(gradients(run, [kernel])[1])
    assert relative_norm(found[1], found[0]) <= 0.06


def test_the_sum_of_a_shortcut_is_rounded(rng):
    x = rng.normal(size=(2, 6, 6, 8)).astype("float32")
    for shortcut in ("bottleneck", "expansion"):
        common = {"expand_ratio": 2, "shortcut": shortcut, "norm_momentum": 0.0}
        block, plain = QuantizedInvertedResidual(8, **common), InvertedResidual(8, **common)
        block(x, training=True)
        assert float(block.sum_range.updates) == 1
        plain.build(x.shape)
        given = {weight.path.partition("/")[2]: numpy(weight) for weight in block.weights}
        for weight in plain.weights:
            weight.assign(given[weight.path.partition("/")[2]])
        assert relative_norm(numpy(block(x)), numpy(plain(x))) <= 0.05


def test_dense_rounds_kernel_logits_and_output(rng):
    x = rng.normal(size=(64, 16)).astype("float32")
    layer = QuantizedDense(4, activation="softmax")
    layer(x, training=True)
    kernel = numpy(layer.kernel)
    step = steps(kernel[None, None]).max()
    logits = x @ (np.round(kernel / step) * step)
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.abs(numpy(layer(x)) - scores).max() <= 0.02
    linear = QuantizedDense(4)
    linear(x, training=True)
    assert linear.output_range is None
    assert len(np.unique(numpy(linear(x)))) <= 256


@pytest.mark.slow
def test_a_users_model_with_a_nested_backbone(rng, tmp_path):
    backbone = small(include_top=False, pooling="avg", weights=None)
    user = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Normalization(mean=[120.0, 110, 100], variance=[60.0**2, 55**2, 50**2]),
            backbone,
            keras.layers.Dropout(0.1),
            keras.layers.Dense(8, activation="relu"),
            # Scores that differ by more than the steps of 1/256 in which the file gives them.
            keras.layers.Dense(3, "softmax", kernel_initializer=keras.initializers.RandomNormal(0, 4), name="scores"),
        ],
        name="mine",
    )
    user.compile("sgd", "sparse_categorical_crossentropy")
    images = pictures(rng, 16)
    quantized = keras_mnv2.quantize_aware(user)
    assert quantized.compiled
    quantized.fit(images, np.arange(16) % 3, batch_size=8, verbose=0)
    report = keras_mnv2.export(
        quantized, tmp_path / "a.tflite", "litert", precision="int8", sample=images, verbose=False
    )
    note("int8 of a user's model: mean absolute error", report.mean_absolute_error)
    assert report.mean_absolute_error <= 0.02


def own_layer():
    class Own(keras.layers.Layer):
        def call(self, x):
            return x

    image = keras.Input((32, 32, 3))
    return keras.Model(image, Own(name="odd")(image))


def own_norm():
    """A batch norm of the caller's, whose formula is another."""

    class Own(keras.layers.BatchNormalization):
        def call(self, x, training=None, mask=None):
            return 2 * super().call(x, training=training)

    image = keras.Input((32, 32, 3))
    return keras.Model(image, Own()(keras.layers.Conv2D(4, 3, use_bias=False, name="odd")(image)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (own_layer, "got the layer 'odd' of type Own"),
        (own_norm, "a batch norm of its own or a bias, got the layer 'odd' with neither"),
        (lambda: small(dtype="mixed_bfloat16"), "must compute in float32 to be quantised, got mixed_bfloat16"),
        (
            lambda: small(norm_layer="group_norm", block=InvertedResidual),
            'must have norm_layer="batch_norm" or None .* got .group_norm. in the layer .stem.',
        ),
        *(
            (
                lambda norm_layer=norm_layer: small(norm_layer=norm_layer),
                'must have norm_layer="batch_norm" or None .* got the layer .Conv1. with neither',
            )
            for norm_layer in ("group_norm", "sync_batch_norm")
        ),
        (lambda: keras_mnv2.quantize_aware(small()), "must not be quantised yet"),
        (lambda: "model", "must be a built functional or sequential Keras model with one input, got 'model'"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), "must be a built functional"),
    ],
)
def test_what_cannot_be_quantised_is_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        keras_mnv2.quantize_aware(make())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "float32"}, 'precision must be "int8" for a model of quantize_aware'),
        ({"precision": "int8", "calibration": np.zeros((4, 32, 32, 3))}, "calibration must be left out"),
    ],
)
def test_its_export_refuses_what_contradicts_its_ranges(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        keras_mnv2.export(keras_mnv2.quantize_aware(small()), tmp_path / "a.tflite", "litert", **arguments)
    assert not list(tmp_path.iterdir())
