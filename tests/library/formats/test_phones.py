"""ExecuTorch's and Core ML's files: what is in them, and ExecuTorch's numbers in its own runtime."""

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.conftest import once, once_on
from tests.exports import LABELS, small

# What coremltools uses of Python, which ExecuTorch imports, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


@keras.saving.register_keras_serializable("tests")
class OwnKernel(keras.layers.Layer):
    """A convolution with a kernel that is computed from the image."""

    def call(self, x):
        return keras.ops.conv(x, keras.ops.reshape(x[0, :3, :3], (3, 3, 3, 1)))


@once
def test_an_executorch_file_gives_the_models_numbers(decided, tmp_path):
    model, images = decided
    report = keras_mnv2.export(model, tmp_path / "a.pte", "executorch", sample=images[:6], verbose=False)
    # A convolution that XNNPACK did not take would be an error.
    assert (report.images, report.top1_agreement) == (6, 1)
    assert report.largest_difference <= 5e-5
    classifier = keras_mnv2.load_classifier(tmp_path / "a.pte")
    assert (classifier.size, classifier.classes) == (32, 5)
    found = keras_mnv2.load_export(tmp_path / "a.pte")(images[:3])
    assert list(found) == ["predictions"]
    np.testing.assert_allclose(found["predictions"], model.predict(images[:3], verbose=0), atol=5e-5)


@pytest.mark.slow
def test_a_convolution_that_xnnpack_does_not_take_is_an_error(tmp_path):
    image = keras.Input((16, 16, 3))
    with pytest.raises(RuntimeError, match="XNNPACK takes all but 1 convolutions and products"):
        keras_mnv2.export(keras.Model(image, OwnKernel()(image)), tmp_path / "a.pte", "executorch")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_a_core_ml_package_takes_images_and_names_classes(precision, decided, tmp_path):
    import coremltools

    model, _ = decided
    path = tmp_path / "a.mlpackage"
    report = keras_mnv2.export(model, path, "coreml", precision=precision, labels=LABELS, verbose=False)
    assert (report.images, report.largest_difference, report.mean_absolute_error) == (0, None, None)
    assert "converted, not run" in str(report)
    assert report.size == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    (image,) = spec.description.input
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == ("image", 32, 32)
    assert spec.description.predictedFeatureName == "classLabel"
    assert {output.name for output in spec.description.output} == {"classLabel", "classLabel_probs"}
    block = next(iter(spec.mlProgram.functions["main"].block_specializations.values()))
    kinds = [operation.type for operation in block.operations]
    assert kinds.count("conv") == 1 + 2 + 2 * 3 + 1
    assert kinds.count("transpose") == 0


@pytest.mark.slow
def test_a_core_ml_package_of_what_takes_no_pixels_takes_numbers(tmp_path):
    import coremltools

    report = keras_mnv2.export(small(), tmp_path / "a.mlpackage", "coreml", verbose=False)
    spec = coremltools.models.MLModel(str(report.path), skip_model_load=True).get_spec()
    (image,), (scores,) = spec.description.input, spec.description.output
    assert list(image.type.multiArrayType.shape) == [1, 32, 32, 3]
    assert scores.name == "predictions"


@once_on("tensorflow")
@pytest.mark.parametrize(("format", "suffix"), [("executorch", ".pte"), ("coreml", ".mlpackage")])
def test_what_cannot_be_honoured_is_one_sentence(format, suffix, tmp_path):
    free = small(include_top=False, input_shape=(None, None, 3))
    with pytest.raises(ValueError, match=r"model must take images of a fixed size for format=.*, got \(None, None"):
        keras_mnv2.export(free, tmp_path / f"a{suffix}", format)
    if format == "coreml":
        with pytest.raises(ValueError, match=r"labels must be names of one class each .*, got 'a' twice"):
            keras_mnv2.export(small(), tmp_path / f"a{suffix}", format, labels=list("abcda"))
