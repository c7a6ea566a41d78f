"""What `.tflite` files are made of: operators, metadata, and the kernels that microcontrollers have."""

import io
import zipfile

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2.formats import converters
from keras_mnv2.formats.graphs import write_saved_model
from keras_mnv2.formats.images import finish_litert, takes_pixels
from keras_mnv2.formats.litert_file import file_of, fold_scaling, operators, read_file
from keras_mnv2.formats.litert_integers import round_by_images
from keras_mnv2.formats.runtimes import reference_outputs
from tests.conftest import once, once_on
from tests.exports import LABELS, small
from tests.helpers import randomise


def names_of(path):
    return [name for name, _ in operators(path.read_bytes())]


def metadata_of(path):
    """(mean, std) of the first input, out of a file's metadata."""
    import flatbuffers
    from flatbuffers import number_types, table

    model = read_file(path.read_bytes())
    (entry,) = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    buffer = bytes(model.buffers[entry.buffer].data)
    assert buffer[4:8] == b"M001"

    def follow(at, slot, index=None):
        offset = table.Table(buffer, at).Offset(4 + 2 * slot)
        assert offset
        one = table.Table(buffer, at)
        if index is None:
            return one.Indirect(at + offset)
        return one.Indirect(one.Vector(offset) + 4 * index)

    root = flatbuffers.encode.Get(flatbuffers.packer.uoffset, buffer, 0)
    image = follow(follow(root, 3, 0), 2, 0)
    unit = follow(image, 4, 0)
    normalization = follow(unit, 1)
    one = table.Table(buffer, normalization)
    return [list(one.GetVectorAsNumpy(number_types.Float32Flags, one.Offset(slot))) for slot in (4, 6)]


@once
def test_files_say_what_they_take_and_name_their_classes(exported):
    for precision in ("float32", "int8"):
        path = exported("litert", precision).path
        # The model scales pixels itself.
        assert metadata_of(path) == [[0.0], [1.0]]
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            assert archive.read("labels.txt").decode().splitlines() == LABELS
            assert archive.getinfo("labels.txt").compress_type == zipfile.ZIP_STORED


@once
def test_integers_read_pixels_without_an_operator_of_scaling(exported):
    report = exported("litert", "int8")
    names = names_of(report.path)
    assert names[:3] == ["PADV2", "CONV_2D", "DEPTHWISE_CONV_2D"]
    assert "MUL" not in names
    assert names.count("ADD") == 1  # The shortcut.
    model = read_file(report.path.read_bytes())
    image = model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].quantization
    assert (image.scale[0], image.zeroPoint[0]) == (1.0, -128)
    used = {i for operator in model.subgraphs[0].operators for i in (*operator.inputs, *operator.outputs)}
    assert used == set(range(len(model.subgraphs[0].tensors)))


@once
def test_the_report_has_the_reference_kernels_too(exported, decided):
    model, images = decided
    assert exported("litert").reference_difference is None
    report = exported("litert", "int8")
    (found,) = reference_outputs(report.path, images).values()
    assert len(found) == 8
    largest = np.abs(found - model.predict(images[:8], verbose=0)).max()
    assert report.reference_difference == pytest.approx(largest, abs=1e-4)
    assert 0 < largest < 0.3
    assert "reference kernels" in str(report)


@once
def test_dynamic_range_needs_no_new_operators(exported):
    versions = dict(operators(exported("litert", "dynamic_int8").path.read_bytes()))
    # tflite-runtime 2.14, the last one, has version 11 of it.
    assert versions["FULLY_CONNECTED"] <= 9


@once
@pytest.mark.parametrize("padding", ["same", pytest.param("symmetric", marks=pytest.mark.slow)])
def test_each_channel_has_a_border_of_its_own_mean(padding, rng, tmp_path):
    """The stem alone: its sums are those of the scaled image to within what a byte can tell, at the border too."""
    backbone = small(include_top=False, padding=padding, inverted_residual_setting=[(1, 8, 1, 1)])
    randomise(backbone, rng)
    stem = keras.Model(backbone.inputs, backbone.get_layer("Conv1_relu").output)
    image = keras.Input((32, 32, 3))
    mean, variance = [123.675, 116.28, 60.0], [58.4**2, 57.1**2, 57.4**2]
    scaled = keras.layers.Normalization(mean=mean, variance=variance)(image)
    model = keras.Model(image, stem(scaled))
    images = rng.integers(0, 256, (8, 4, 4, 3)).repeat(8, 1).repeat(8, 2).astype("float32")
    path = tmp_path / "stem.tflite"
    keras_mnv2.export(model, path, "litert", precision="int8", calibration=images, verbose=False)
    assert names_of(path) == ["SPLIT", "PADV2", "PADV2", "PADV2", "CONCATENATION", "CONV_2D"]
    (found,) = keras_mnv2.load_export(path)(images).values()
    errors = np.abs(found - model.predict(images, verbose=0))
    step = 6 / 255
    assert errors.mean() < step / 2
    # A border of black would be off by 2 standard deviations.
    assert max(errors[:, 0].mean(), errors[:, -1].mean(), errors[:, :, -1].mean()) < step


def step_behind(path, name):
    """The step of what the first operator of this name writes."""
    graph = read_file(path.read_bytes()).subgraphs[0]
    return float(graph.tensors[graph.operators[names_of(path).index(name)].outputs[0]].quantization.scale[0])


@once_on("tensorflow")
def test_rounding_costs_no_mean_and_ranges_are_whole(rng, tmp_path):
    """Images that are far from 0 multiply what rounding takes from the weights: the biases give it back."""
    image = keras.Input((16, 16, 3))
    x = inner = keras.layers.Conv2D(16, 3, padding="same")(image)
    x = keras.layers.Conv2D(24, 1)(keras.layers.DepthwiseConv2D(3)(x))
    model = keras.Model(image, {"maps": x, "pooled": keras.layers.GlobalAveragePooling2D()(x)})
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 1, weight.shape))
    images = rng.normal(3, 1, (48, 16, 16, 3)).astype("float32")
    path = tmp_path / "a.tflite"
    np.save(tmp_path / "images.npy", images)
    write_saved_model(model, tmp_path / "saved")
    converters.to_litert(tmp_path / "saved", path, "int8", calibration=str(tmp_path / "images.npy"))
    expected = model.predict(images, verbose=0)

    def error_of_means():
        found = keras_mnv2.load_export(path)(images)
        assert {key: y.shape for key, y in found.items()} == {key: y.shape for key, y in expected.items()}
        return np.abs((found["maps"] - expected["maps"]).mean(axis=(0, 1, 2))).mean()

    before, content = error_of_means(), path.read_bytes()
    reference = path.with_suffix(converters.REFERENCE).read_bytes()
    path.write_bytes(round_by_images(content, reference, images))
    assert error_of_means() < before / 4
    # Whole ranges: what few images need is not cut off. A mean has its own.
    for name, values in (
        ("CONV_2D", keras.Model(image, inner).predict(images, verbose=0)),
        ("MEAN", expected["pooled"]),
    ):
        step = (max(values.max(), 0) - min(values.min(), 0)) / 255
        assert step_behind(path, name) == pytest.approx(step, rel=1e-4)
    # What cannot be mended is told.
    other = read_file(reference)
    other.subgraphs[0].operators.pop()
    with pytest.warns(UserWarning, match="keeps the ranges and biases of TensorFlow's converter"):
        assert round_by_images(content, file_of(other), images) == content


@once_on("tensorflow")
@pytest.mark.parametrize("strides", [1, 2])
def test_the_corrected_bias_survives_the_scaling(strides, rng, tmp_path):
    """Of dark images: what rounding takes from the kernel of the first convolution, its bias gives back."""
    image = keras.Input((16, 17, 3))
    scaled = keras.layers.Normalization(mean=[120, 110, 200], variance=[60**2, 30**2, 90**2])(image)
    model = keras.Model(image, keras.layers.Conv2D(16, 3, strides=strides, padding="same")(scaled))
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 1, weight.shape))
    images = rng.integers(0, 40, (24, 16, 17, 3)).astype("float32")
    # So that the range is that of pixels.
    images[:, 8, 8] = 255
    path = tmp_path / "a.tflite"
    np.save(tmp_path / "images.npy", images)
    write_saved_model(model, tmp_path / "saved")
    converters.to_litert(tmp_path / "saved", path, "int8", calibration=str(tmp_path / "images.npy"))
    expected = model.predict(images, verbose=0)

    def error_of_means():
        (found,) = keras_mnv2.load_export(path)(images).values()
        return np.abs((found - expected).mean(axis=(0, 1, 2))).mean()

    content, reference = path.read_bytes(), path.with_suffix(converters.REFERENCE).read_bytes()
    path.write_bytes(fold_scaling(round_by_images(content, reference, images), reference))
    before = error_of_means()
    path.write_bytes(content)
    finish_litert(model, path, "int8", keras_mnv2.Preprocessing(36, 32), None, images)
    assert "MUL" not in names_of(path)
    assert error_of_means() < before / 4


def test_what_scales_pixels_itself_is_known():
    image = keras.Input((32, 32, 3))
    scaled = keras.applications.mobilenet_v2.preprocess_input(image)
    inside = small(include_preprocessing=True)
    assert takes_pixels(inside)
    assert takes_pixels(keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 127.5, -1), small()]))
    assert takes_pixels(keras.Model(image, small()(scaled)))
    assert takes_pixels(keras_mnv2.quantize_aware(inside))
    assert not takes_pixels(small())


@once
def test_a_model_of_scaled_images_says_how(tmp_path):
    path = tmp_path / "a.tflite"
    name = "torchvision/IMAGENET1K_V2"
    keras_mnv2.export(small(), path, "litert", preprocessing=name, verbose=False)
    np.testing.assert_allclose(metadata_of(path), [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], rtol=1e-6)
    with pytest.raises(ValueError, match='preprocessing must be left out but for "litert" and "web", got it for'):
        keras_mnv2.export(small(), tmp_path / "a.onnx", "onnx", preprocessing=name)
    how = keras_mnv2.Preprocessing(36, 32)
    with pytest.raises(ValueError, match=r"labels in LiteRT need a model of images"):
        finish_litert(small(input_shape=(3, 32, 32), data_format="channels_first"), path, "float32", how, LABELS)
