import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2.files import move_results
from keras_mnv2.formats import export
from tests.conftest import once, once_on
from tests.exports import FORMATS, LABELS, marks_of, small
from tests.helpers import note

MATRIX = [pytest.param(*row, marks=marks_of(*row[:2])) for row in FORMATS]
# Most that is lost of float32: largest difference, mean absolute error, share of images with another class.
LOSSES = {"float32": (5e-5, 5e-6, 0), "float16": (0.01, 1e-3, 0.03), "dynamic_int8": (0.1, 0.02, 0.1)}
# A format that the backend writes in this process, or on JAX a cheap one.
NATIVE = ("torch", "model.pt2") if keras.backend.backend() == "torch" else ("tf_saved_model", "model")
LOSSES["int8"] = (0.3, 0.03, 0.2)


@pytest.mark.parametrize(("format", "precision", "name"), MATRIX)
def test_every_format_gives_the_models_numbers_in_its_own_runtime(format, precision, name, decided, exported):
    model, images = decided
    report = exported(format, precision)
    folder = report.path.parent
    assert {file.name for file in folder.iterdir()} == ({name, "model.bin"} if format == "openvino" else {name})
    assert report.size == sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    largest, mean, others = LOSSES[precision]
    for part in (images, images[:1], images[:5]):
        (found,) = keras_mnv2.load_export(report.path)(part).values()
        expected = model.predict(part, verbose=0)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= largest
        assert np.abs(found - expected).mean() <= mean
        if len(part) == len(images):
            assert (found.argmax(1) != expected.argmax(1)).mean() <= others
            # What was reported is what anybody finds.
            assert report.largest_difference == pytest.approx(np.abs(found - expected).max(), rel=0.3, abs=2e-6)
            assert report.top1_agreement == pytest.approx((found.argmax(1) == expected.argmax(1)).mean(), abs=0.021)
    note(f"{format} {precision}: largest difference", report.largest_difference)
    note(f"{format} {precision}: mean absolute error", report.mean_absolute_error)


@once_on("tensorflow")
def test_a_saved_model_has_names_labels_and_any_batch(decided, exported):
    import tensorflow as tf

    images, path = decided[1], exported("tf_saved_model").path
    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]
    ((name, specification),) = serve.structured_input_signature[1].items()
    assert (name, specification.shape.as_list()) == ("image", [None, 32, 32, 3])
    assert list(serve.structured_outputs) == ["predictions"]
    assert serve(image=images[:3])["predictions"].shape == (3, 5)
    listing = loaded.labels.asset_path.numpy().decode()
    assert os.path.dirname(listing) == str(path / "assets")
    assert tf.io.gfile.GFile(listing).read().splitlines() == LABELS
    # Batch norms are folded: a kernel and a bias each.
    names = {node.op for node in serve.graph.as_graph_def().node}
    assert not [name for name in names if "BatchNorm" in name or name == "Rsqrt"]


@once
@pytest.mark.parametrize("precision", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_an_onnx_file_is_standard_and_lean(precision, exported):
    import onnx

    model = onnx.load(exported("onnx", precision).path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 13)]
    assert model.ir_version <= 8
    assert not model.graph.value_info
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 1 + 2 + 2 * 3 + 1
    # The input's layout.
    assert kinds.count("Transpose") == 1
    assert {"GlobalAveragePool", "Flatten", "Gemm"} <= set(kinds)
    assert not {"BatchNormalization", "Pad", "ReduceMean"} & set(kinds)
    (image,), (scores,) = model.graph.input, model.graph.output
    assert (image.name, scores.name) == ("image", "predictions")
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 32, 32, 3]
    assert [d.dim_param or d.dim_value for d in scores.type.tensor_type.shape.dim] == ["batch", 5]
    assert {v.type.tensor_type.elem_type for v in (image, scores)} == {onnx.TensorProto.FLOAT}
    kernels = {tuple(w.dims[2:]) for w in model.graph.initializer if len(w.dims) == 4 and w.dims[0] > 1}
    assert kernels == {(1, 1), (3, 3)}
    halves = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[precision]
    assert {w.data_type for w in model.graph.initializer if len(w.dims) == 4} == {halves}


def kinds_that_run(path, folder):
    """The operations that ONNX Runtime makes of a file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.slow
def test_an_8_bit_onnx_file_runs_with_integers(exported, tmp_path):
    report = exported("onnx", "int8")
    kinds = kinds_that_run(report.path, tmp_path)
    assert kinds.count("QLinearConv") == 1 + 2 + 2 * 3 + 1
    assert kinds.count("QLinearAdd") == 1
    assert {"QLinearGlobalAveragePool", "QGemm"} <= set(kinds)
    # What stays in float is the scaling of the pixels and the softmax.
    assert not {"Conv", "Gemm", "Clip", "GlobalAveragePool"} & set(kinds)
    assert report.top1_agreement >= 0.9


@once_on("tensorflow")
def test_no_sum_of_an_8_bit_onnx_file_leaves_16_bits(exported):
    """Processors without 8-bit dot products add two products in 16 bits: ONNX Runtime cut those sums off in silence."""
    import onnx
    import onnxruntime

    path = exported("onnx", "int8").path
    file = onnx.load(path)
    weights = [onnx.numpy_helper.to_array(weight).astype(int) for weight in file.graph.initializer]
    kernels = [w for w in weights if w.ndim == 4 and w.shape[1] > 1]
    assert kernels
    for kernel in kernels:
        for row in (kernel, np.moveaxis(kernel, 1, -1)):
            flat = row.reshape(len(kernel), -1)
            even = flat.shape[1] // 2 * 2
            for sign in (1, -1):
                sums = np.maximum(sign * flat, 0)[:, :even].reshape(len(flat), -1, 2).sum(2)
                assert sums.max() * 255 < 2**15
    # The option takes the products that do not leave 16 bits.
    images = np.random.default_rng(0).uniform(0, 255, (16, 32, 32, 3)).astype("float32")
    found = []
    for precise in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", precise)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {session.get_inputs()[0].name: images})[0])
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.slow
def test_ranges_of_an_8_bit_onnx_file_hold_what_one_image_needs(tmp_path):
    image = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(4, 3, activation="relu", kernel_initializer=keras.initializers.Constant(0.05))(image)
    y = keras.layers.GlobalAveragePooling2D()(y)
    model = keras.Model(image, keras.layers.Dense(2)(y))
    model.layers[-1].set_weights([np.tile([[0.1, -0.1]], (4, 1)), np.zeros(2)])
    images = np.random.default_rng(0).uniform(5, 10, (24, 8, 8, 3)).astype("float32")
    images[7] *= 20
    path = tmp_path / "model.onnx"
    keras_mnv2.export(model, path, "onnx", precision="int8", calibration=images, verbose=False)
    (found,) = keras_mnv2.load_export(path)(images).values()
    np.testing.assert_allclose(found[7], model.predict(images, verbose=0)[7], rtol=0.02)


@once
@pytest.mark.parametrize("precision", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_an_onnx_file_of_another_layout_and_opset(precision, decided, tmp_path):
    import onnx

    model, images = decided
    calibration = images if precision == "int8" else None
    common = {"layout": "NCHW", "opset": 17, "precision": precision, "calibration": calibration, "verbose": False}
    report = keras_mnv2.export(model, tmp_path / "a.onnx", "onnx", **common)
    file = onnx.load(tmp_path / "a.onnx")
    assert "Transpose" not in [node.op_type for node in file.graph.node]
    assert [opset.version for opset in file.opset_import] == [17]
    assert [d.dim_value for d in file.graph.input[0].type.tensor_type.shape.dim] == [0, 3, 32, 32]
    assert report.top1_agreement >= 0.9
    expected = model.predict(images, verbose=0)
    (found,) = keras_mnv2.load_export(tmp_path / "a.onnx")(np.moveaxis(images, -1, 1)).values()
    atol = {"float32": 5e-5, "int8": LOSSES["int8"][0]}[precision]
    np.testing.assert_allclose(found, expected, atol=atol)
    # A classifier takes NHWC, whatever the file does.
    np.testing.assert_allclose(keras_mnv2.load_classifier(tmp_path / "a.onnx").scores(images), expected, atol=atol)


@pytest.mark.slow
def test_an_opset_that_cannot_hold_the_model_is_one_sentence(tmp_path):
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.layers.LayerNormalization()(image))
    with pytest.raises(
        RuntimeError, match="opset must be at least 17 for this model, whose LayerNormalization needs it"
    ):
        keras_mnv2.export(model, tmp_path / "a.onnx", "onnx", opset=13)
    assert not list(tmp_path.iterdir())


@once
@pytest.mark.parametrize("io_dtype", ["int8", pytest.param("uint8", marks=pytest.mark.slow)])
def test_full_integer_files_hold_integers_alone(io_dtype, decided, exported, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model, images = decided
    if io_dtype == "int8":
        report = exported("litert", "int8")
    else:
        common = {"precision": "int8", "io_dtype": io_dtype, "verbose": False}
        report = keras_mnv2.export(model, tmp_path / "model.tflite", "litert", calibration=images, **common)
    interpreter = Interpreter(model_path=str(report.path))
    for tensor in (*interpreter.get_input_details(), *interpreter.get_output_details()):
        assert tensor["dtype"] == np.dtype(io_dtype)
    assert not [tensor["name"] for tensor in interpreter.get_tensor_details() if tensor["dtype"] == np.float32]
    assert report.images == len(images)
    assert report.top1_agreement >= 0.8


@once_on("tensorflow")
def test_features_of_images_of_any_size(tmp_path):
    # PyTorch traces the padding of uneven sides with symbols.
    features = small(include_top=False, features=["stride_4", "block_1_expand"], input_shape=(None, None, 3))
    report = keras_mnv2.export(features, tmp_path / NATIVE[1], NATIVE[0], verbose=False)
    assert report.largest_difference <= 1e-5
    assert report.top1_agreement is None
    images = np.random.default_rng(0).uniform(-1, 1, (2, 49, 32, 3)).astype("float32")
    found, expected = keras_mnv2.load_export(report.path)(images), features.predict(images, verbose=0)
    assert set(found) == set(expected)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=1e-5)


@pytest.mark.slow
def test_a_users_sequential_model(tmp_path):
    backbone = small(include_top=False, pooling="avg")
    user = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.RandomFlip("horizontal"),
            keras.layers.Rescaling(1 / 127.5, -1),
            backbone,
            keras.layers.Dense(4, activation="softmax", name="head"),
        ]
    )
    for fold in (True, False):
        report = keras_mnv2.export(user, tmp_path / NATIVE[1], NATIVE[0], fold=fold, overwrite=True, verbose=False)
        assert report.largest_difference <= 1e-5


@pytest.mark.slow
def test_a_model_of_mixed_precision_leaves_in_float32(tmp_path):
    mixed = small(dtype="mixed_bfloat16")
    report = keras_mnv2.export(mixed, tmp_path / "b.onnx", "onnx", verbose=False)
    assert report.largest_difference <= 0.05
    wide = small(dtype="float32")
    wide.set_weights(mixed.get_weights())
    images = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)).astype("float32")
    (found,) = keras_mnv2.load_export(tmp_path / "b.onnx")(images).values()
    np.testing.assert_allclose(found, wide.predict(images, verbose=0), atol=1e-5)


OWN = """
import keras

@keras.saving.register_keras_serializable("mine")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""
# The format that this backend does not write by itself.
FOREIGN = ("torch", "a.pt2") if keras.backend.backend() != "torch" else ("tf_saved_model", "a")


@once
def test_a_users_own_layer_crosses_over_where_it_can_be_imported(tmp_path, monkeypatch):
    (tmp_path / "own_layers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("own_layers").Twice
    image = keras.Input((32, 32, 3))
    model = keras.Model(image, kind()(image))
    report = keras_mnv2.export(model, tmp_path / "out" / FOREIGN[1], FOREIGN[0], verbose=False)
    assert report.largest_difference == 0
    kind.__module__ = "__main__"
    with pytest.raises(ValueError, match=r"model must have layers of modules that can be imported, .* got Twice"):
        keras_mnv2.export(model, tmp_path / "out" / f"b{FOREIGN[1]}", FOREIGN[0])
    assert [file.name for file in (tmp_path / "out").iterdir()] == [FOREIGN[1]]


def test_what_cannot_be_folded_says_so(tmp_path):
    class Own(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x):
            return self.norm(x)

    image = keras.Input((32, 32, 3))
    with pytest.raises(ValueError, match=r"'own(_[0-9]+)?'.* With fold=False"):
        keras_mnv2.export(keras.Model(image, Own()(image)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@once
def test_a_path_that_exists_is_kept_unless_it_may_be_replaced(decided, tmp_path):
    model, images = decided
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "old.pt2").write_text("old")
    (tmp_path / "mine.bin").write_text("mine")
    for path, format, overwrite in (
        ("notes", "tf_saved_model", True),
        ("old.pt2", "torch", False),
        ("mine.xml", "openvino", False),
    ):
        with pytest.raises(ValueError, match=r"path must be new, or .* with overwrite=True, got .*, which exists"):
            keras_mnv2.export(model, tmp_path / path, format, overwrite=overwrite)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "old.pt2").read_text() == "old"
    assert (tmp_path / "mine.bin").read_text() == "mine"
    keras_mnv2.export(model, tmp_path / "old.pt2", "torch", overwrite=True, verbose=False)
    assert keras_mnv2.load_export(tmp_path / "old.pt2")(images[:1])["predictions"].shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "caffe"}, "format must be one of 'tf_saved_model', .*, got 'caffe'"),
        ({"sample": np.zeros((1, 16, 16, 3))}, r"sample must have the shape \(batch, \*\(32, 32, 3\)\), got \(1, 16"),
        ({"sample": np.zeros((0, 32, 32, 3))}, r"sample must have .*, got \(0, 32, 32, 3\)"),
        ({"precision": "int8"}, r"precision must be one of 'float32', got 'int8'"),
        ({"format": "litert", "precision": "int4"}, "precision must be one of .*'int8', got 'int4'"),
        ({"format": "litert", "precision": "int8"}, "calibration must be images .* got None"),
        ({"format": "litert", "calibration": np.zeros((1, 32, 32, 3))}, "calibration must be left out"),
        (
            {"format": "litert", "precision": "int8", "calibration": np.zeros((4, 3, 32, 32))},
            r"calibration must have the shape \(batch, \*\(32, 32, 3\)\), got \(4, 3, 32, 32\)",
        ),
        ({"format": "onnx", "precision": "dynamic_int8"}, "precision must be one of 'float32', 'float16', 'int8', got"),
        ({"format": "onnx", "precision": "int8"}, "calibration must be images .* got None"),
        ({"format": "onnx", "io_dtype": "uint8"}, "io_dtype must be left out but for format=\"litert\", got 'uint8'"),
        ({"format": "onnx", "opset": 12}, "opset must be a whole number of at least 13 and at most 23, got 12"),
        ({"opset": 13}, "opset must be left out but for format=\"onnx\", got 13 for 'tf_saved_model'"),
        ({"format": "onnx", "layout": "CHW"}, "layout must be one of None, 'NHWC', 'NCHW', got 'CHW'"),
        ({"layout": "NCHW"}, "layout must be left out but for"),
        ({"io_dtype": "int16"}, "io_dtype must be one of 'int8', 'uint8', got 'int16'"),
        ({"labels": ["a", "b"]}, 'labels must be "imagenet" or 5 names of one line each, got 2 of them'),
        ({"labels": "imagenet"}, "labels must be .*, got 1000 of them"),
        ({"labels": "abcde"}, "labels must be .*, got 'abcde'"),
        ({"labels": [1, 2, 3, 4, 5]}, r"labels must be .*, got \[1, 2, 3, 4, 5\]"),
        ({"labels": ["a", "b", "c", "d", None]}, r"labels must be .*, got \['a', .*, None\]"),
        ({"labels": 5}, "labels must be .*, got 5"),
        ({"labels": (name for name in "abcd")}, "labels must be .*, got 4 of them"),
        ({"format": "onnx", "labels": list("abcde")}, "labels must be left out"),
        ({"path": "model.bin", "format": "onnx"}, r"path must end in '\.onnx' for format='onnx', got '.*model\.bin'"),
    ],
)
def test_a_bad_argument_is_named_in_one_sentence(arguments, message, tmp_path):
    names = {"onnx": "model.onnx", "litert": "model.tflite"}
    path = tmp_path / arguments.pop("path", names.get(arguments.get("format"), "model"))
    with pytest.raises(ValueError, match=message) as caught:
        keras_mnv2.export(small(), path, **arguments)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "missing", "pip"),
    [
        ("tf_saved_model", "tensorflow", 'pip install "keras_mnv2[tensorflow]"'),
        ("onnx", "onnxruntime", 'pip install "keras_mnv2[onnx]"'),
        ("litert", "ai_edge_litert", 'pip install "keras_mnv2[litert]"'),
        ("openvino", "openvino", 'pip install "keras_mnv2[openvino]"'),
        ("torch", "torch", 'pip install "keras_mnv2[torch]"'),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_pip_line(format, missing, pip, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    path = tmp_path / next(name for f, _, name in FORMATS if f == format)
    with pytest.raises(ImportError) as caught:
        keras_mnv2.export(small(), path, format)
    assert str(caught.value) == f'format="{format}" needs {missing}, which is not installed: {pip}.'
    assert not list(tmp_path.iterdir())


def test_every_extra_that_an_error_names_exists():
    metadata = importlib.metadata.metadata("keras_mnv2")
    extras = set(metadata.get_all("Provides-Extra"))
    formats = export.FORMATS.values()
    assert {how.extra for how in formats if how.packages} <= extras


@once_on("tensorflow")
def test_an_export_that_differs_leaves_nothing(tmp_path, monkeypatch):
    model = small(classifier_activation=None)
    answer = model.predict
    monkeypatch.setattr(model, "predict", lambda *args, **kwargs: answer(*args, **kwargs) + 0.01)
    with pytest.raises(RuntimeError, match=r"differs from the model: its largest difference is 0\.01"):
        keras_mnv2.export(model, tmp_path / NATIVE[1], NATIVE[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_integers_that_say_nothing_of_the_model_are_refused(decided, tmp_path, monkeypatch):
    model, images = decided
    answer = model.predict
    monkeypatch.setattr(model, "predict", lambda *args, **kwargs: answer(*args, **kwargs)[:, ::-1])
    with pytest.raises(RuntimeError, match=r"its mean absolute error is .*, the most that int8 may show"):
        keras_mnv2.export(model, tmp_path / "a.tflite", "litert", precision="int8", calibration=images)
    assert not list(tmp_path.iterdir())


# JAX makes no graph by itself: the child that does converts it too.
STEPS = ("graphs", "runtimes") if keras.backend.backend() == "jax" else ("graphs", "converters", "runtimes")


@once
@pytest.mark.parametrize("part", [*STEPS[:-1], pytest.param(STEPS[-1], marks=pytest.mark.slow)])
def test_a_failing_step_is_one_sentence_and_leaves_nothing(part, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("print('noise')\nraise OSError('the step broke')\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = sys.modules[f"keras_mnv2.formats.{part}"]
    monkeypatch.setattr(
        module, "__name__" if part == "graphs" else "__file__", "broken" if part == "graphs" else broken
    )
    # A format whose graph this backend makes by itself, and one that it must cross over for.
    own = ("a.onnx", "onnx") if keras.backend.backend() == "torch" else ("a.tflite", "litert")
    name, format = FOREIGN[::-1] if part == "graphs" else own
    with pytest.raises(RuntimeError, match="The export failed in its own process: OSError: the step broke"):
        keras_mnv2.export(small(), tmp_path / name, format)
    assert [file.name for file in tmp_path.iterdir()] == ["broken.py"]


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import keras_mnv2
model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)
keras_mnv2.export(model, sys.argv[1], sys.argv[2])
"""


@once_on("tensorflow")
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(number, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "a.xml"), "openvino"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)  # By then a child is at work.
        process.send_signal(number)
        assert process.wait(30) == -number
        told = process.stdout.read() + process.stderr.read()
        assert ("KeyboardInterrupt" in told) == (number == signal.SIGINT)
    assert not list(tmp_path.iterdir()), told


# What becomes of the exception of the signal: an import of a C library makes another of it, a callback swallows it.
LOST = {
    "another": "raise ImportError('broken') from error",
    "swallowed": "pass",
}


@once_on("tensorflow")
@pytest.mark.parametrize("what", [pytest.param("another", marks=pytest.mark.slow), "swallowed"])
def test_a_signal_whose_exception_is_lost_ends_the_process_with_it(what, tmp_path):
    code = f"""
import os, signal, sys
from keras_mnv2.files import cleaned_up, folder_beside
from pathlib import Path
with cleaned_up() as check, folder_beside(Path(sys.argv[1])):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit("no signal")
    except BaseException as error:
        {LOST[what]}
    check()
    print("moved")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["saved_model", "a.onnx"])
def test_what_got_the_name_meanwhile_is_kept(name, tmp_path):
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    for folder in (results, scratch):
        folder.mkdir()

    def write(path, text):
        if path.suffix:
            path.write_text(text)
        else:
            path.mkdir()
            (path / "saved_model.pb").write_text(text)

    write(results / name, "second")
    write(tmp_path / name, "first")
    with pytest.raises(ValueError, match=r"path must be new, got .*, which something else has written meanwhile"):
        move_results(results, tmp_path / name, scratch, False)
    path = tmp_path / name
    assert (path if path.suffix else path / "saved_model.pb").read_text() == "first"


def test_a_model_of_two_inputs_is_refused(tmp_path):
    inputs = [keras.Input((32, 32, 3)) for _ in range(2)]
    model = keras.Model(inputs, keras.layers.add(inputs))
    with pytest.raises(ValueError, match="one input"):
        keras_mnv2.export(model, tmp_path / "model")


def test_load_export_names_what_it_can_load(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a SavedModel or end in \.onnx, .*, got '.*a\.gguf'"):
        keras_mnv2.load_export(tmp_path / "a.gguf")
    for name in ("a.onnx", "a.tflite", "a.xml", "a.pt2", "a.keras"):
        with pytest.raises(FileNotFoundError, match=f"path must be an exported file that exists, got '.*{name}'"):
            keras_mnv2.load_export(tmp_path / name)
    with pytest.raises(ValueError, match="path must be a path, got 5"):
        keras_mnv2.load_export(5)


def test_a_move_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    for folder in (results, scratch):
        folder.mkdir()
    for name in ("a.bin", "a.xml"):
        (results / name).write_text("new")
        (tmp_path / name).write_text("old")

    def full(move):
        def moved(source, target):
            if source == results / "a.xml":
                raise OSError("No space left on device")
            return move(source, target)

        return moved

    monkeypatch.setattr(Path, "rename", full(Path.rename))
    monkeypatch.setattr(os, "link", full(os.link))
    with pytest.raises(OSError, match="No space left"):
        move_results(results, tmp_path / "a.xml", scratch, True)
    assert [(tmp_path / name).read_text() for name in ("a.bin", "a.xml")] == ["old", "old"]
    monkeypatch.undo()
    move_results(results, tmp_path / "a.xml", scratch, True)
    assert [(tmp_path / name).read_text() for name in ("a.bin", "a.xml")] == ["new", "new"]
