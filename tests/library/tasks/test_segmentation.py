"""DeepLabV3: transformers' numbers, the paper's sizes, training, folding, files and weights."""

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.conftest import marks, once, once_on
from tests.helpers import randomise, relative_difference

SMALL = {"alpha": 0.35, "weights_backbone": None, "classes": 3}


def transformers_model(rng, alpha=1.0, output_stride=8, classes=21):
    """Theirs, with random weights and statistics."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForSemanticSegmentation

    config = MobileNetV2Config(
        depth_multiplier=alpha, output_stride=output_stride, num_labels=classes, image_size=513, tf_padding=True
    )
    torch.manual_seed(0)
    model = MobileNetV2ForSemanticSegmentation(config).eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.from_numpy(rng.uniform(0.8, 1.2, norm.num_features)))
            norm.bias.copy_(torch.from_numpy(rng.normal(0, 0.3, norm.num_features)))
            # Statistics of the batch below, so that the signal lives.
            norm.momentum = 1.0
        model.train()
        model.segmentation_head.dropout.p = 0.0
        # A batch norm of single pixels needs more than one image.
        model(torch.from_numpy(rng.uniform(-1, 1, (4, 3, 65, 65)).astype("float32")))
        model.eval()
    return model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' network and its file."""
    from safetensors.torch import save_file

    model = transformers_model(np.random.default_rng(0))
    path = tmp_path_factory.mktemp("theirs") / "model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model, path


def logits_of(model, images):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits


def test_logits_are_those_of_transformers(theirs):
    model, path = theirs
    size = (65, 98)
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype("float32")
    ours = keras_mnv2.DeepLabV3(weights=path, classifier_activation=None, upsample=False, output_stride=8)
    assert ours.output_shape == (None, None, None, 21)
    expected = logits_of(model, images)
    found = ours.predict(images, verbose=0)
    assert np.abs(found - expected.numpy().transpose(0, 2, 3, 1)).max() < 1e-4
    assert np.abs(expected.numpy()).max() > 0.1
    # To the image as transformers' post-processing does.
    import torch

    whole = torch.nn.functional.interpolate(expected, size=size, mode="bilinear", align_corners=False)
    ours = keras_mnv2.DeepLabV3((*size, 3), weights=path, classifier_activation=None, output_stride=8)
    found = ours.predict(images, verbose=0)
    assert np.abs(found - whole.numpy().transpose(0, 2, 3, 1)).max() < 1e-4


@once
def test_half_width_and_output_stride_16(tmp_path):
    import torch

    model = transformers_model(np.random.default_rng(2), 0.5, 16, 7)
    path = tmp_path / "half.bin"
    torch.save(model.state_dict(), path)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 71, 90, 3)).astype("float32")
    ours = keras_mnv2.DeepLabV3(weights=path, classifier_activation=None, upsample=False)
    expected = logits_of(model, images).numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours.predict(images, verbose=0) - expected).max() < 1e-4


@once
def test_weights_go_back_to_transformers(theirs, tmp_path):
    import torch
    from safetensors.torch import load_file

    model, path = theirs
    ours = keras_mnv2.DeepLabV3((65, 65, 3), weights=path)
    keras_mnv2.save_weights(ours, tmp_path / "back.safetensors", layout="transformers")
    back, before = load_file(tmp_path / "back.safetensors"), model.state_dict()
    counters = {key for key in before if key.endswith("num_batches_tracked")}
    # The convolution of the classifier, which nothing reads.
    unread = {key for key in before if key.startswith("mobilenet_v2.conv_1x1.")}
    assert set(back) == set(before) - unread
    assert all(torch.equal(back[key], before[key]) for key in set(back) - counters)
    missing = model.load_state_dict(back, strict=False)
    assert set(missing.missing_keys) == unread - counters
    assert not missing.unexpected_keys
    with pytest.raises(ValueError, match="layout must have a place"):
        keras_mnv2.save_weights(ours, tmp_path / "x.safetensors", layout="timm")


@once
def test_own_files_and_another_number_of_classes(theirs, tmp_path, capsys):
    _, path = theirs
    ours = keras_mnv2.DeepLabV3((65, 65, 3), weights=path)
    assert not capsys.readouterr().out
    ours.save(tmp_path / "ours.keras")
    again = keras.models.load_model(tmp_path / "ours.keras")
    images = np.random.default_rng(1).uniform(-1, 1, (1, 65, 65, 3)).astype("float32")
    expected = ours.predict(images, verbose=0)
    np.testing.assert_array_equal(again.predict(images, verbose=0), expected)
    third = keras_mnv2.DeepLabV3((65, 65, 3), weights=tmp_path / "ours.keras", output_stride=16)
    np.testing.assert_array_equal(third.predict(images, verbose=0), expected)
    assert not capsys.readouterr().out
    other = keras_mnv2.DeepLabV3((65, 65, 3), weights=path, classes=4)
    assert "the classifier is left out" in capsys.readouterr().out
    assert other.output_shape == (None, 65, 65, 4)
    for name in ("block_16_project", "projection"):
        np.testing.assert_array_equal(*(m.get_layer(name).get_weights()[0] for m in (ours, other)))
    # And a classifier's backbone takes the same file.
    backbone = keras_mnv2.MobileNetV2((64, 64, 3), weights=path, include_top=False)
    np.testing.assert_array_equal(*(m.get_layer("block_16_project").get_weights()[0] for m in (ours, backbone)))


@once
def test_the_papers_numbers_of_parameters():
    def millions(**arguments):
        model = keras_mnv2.DeepLabV3((65, 65, 3), weights_backbone=None, **arguments)
        return round(sum(np.prod(w.shape) for w in model.trainable_weights) / 1e6, 2)

    # Table 7: with and without the dilated branches.
    assert (millions(), millions(aspp=True)) == (2.11, 4.52)


@once
def test_it_trains_with_ignored_pixels():
    keras.utils.set_random_seed(0)
    model = keras_mnv2.DeepLabV3((33, 47, 3), **SMALL, classifier_activation=None)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 33, 47, 3)).astype("float32")
    masks = (images[..., 0] > 0).astype("uint8")
    masks[:, :4] = 255
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    losses = model.fit(images, masks, batch_size=4, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@once_on("tensorflow")
def test_it_folds_and_runs_layer_by_layer():
    model = keras_mnv2.DeepLabV3((33, 47, 3), **SMALL, aspp=(2, 4, 6))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 33, 47, 3)).astype("float32")
    randomise(model, rng, images)
    expected = model.predict(images, verbose=0)
    folded = keras_mnv2.fold_batch_norm(model)
    assert not [layer for layer in folded.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert relative_difference(folded.predict(images, verbose=0), expected) < 1e-4
    # As scripts that look inside run it.
    whole = keras.Model(model.inputs, model.outputs)
    assert relative_difference(whole.predict(images, verbose=0), expected) < 1e-4


@once
def test_channels_first():
    first = keras_mnv2.DeepLabV3((3, 33, 47), **SMALL, data_format="channels_first")
    last = keras_mnv2.DeepLabV3((33, 47, 3), **SMALL)
    first.set_weights(last.get_weights())
    images = np.random.default_rng(0).uniform(-1, 1, (1, 33, 47, 3)).astype("float32")
    found = first.predict(images.transpose(0, 3, 1, 2), verbose=0)
    assert first.output_shape == (None, 3, 33, 47)
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1), last.predict(images, verbose=0), atol=1e-5)


def test_any_size_at_once():
    model = keras_mnv2.DeepLabV3(**SMALL, include_preprocessing=True)
    fixed = keras_mnv2.DeepLabV3((49, 81, 3), **SMALL, include_preprocessing=True)
    fixed.set_weights(model.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (1, 49, 81, 3)).astype("float32")
    assert relative_difference(model.predict(images, verbose=0), fixed.predict(images, verbose=0)) < 1e-5
    assert model.predict(np.zeros((2, 40, 33, 3), "float32"), verbose=0).shape == (2, 40, 33, 3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"output_stride": 32}, "output_stride must be one of 8, 16"),
        ({"aspp": (1, 2)}, "aspp must be None, True, False or a sequence of three rates"),
        ({"aspp": (1, 2, 0)}, "aspp: a rate must be"),
        ({"classes": 0}, "classes must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"weights": "no-such-file"}, "weights must be"),
        ({"averaged": True}, "averaged must be left out"),
        ({"head_channels": 0}, "head_channels must be"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        keras_mnv2.DeepLabV3((33, 33, 3), **{**SMALL, **arguments})


def test_a_classifiers_file_is_refused(tmp_path):
    classifier = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5)
    keras_mnv2.save_weights(classifier, tmp_path / "w.safetensors", layout="transformers")
    with pytest.raises(ValueError, match="has no segmentation head; weights_backbone takes"):
        keras_mnv2.DeepLabV3((33, 33, 3), weights=tmp_path / "w.safetensors")
    backbone = keras_mnv2.DeepLabV3((33, 33, 3), weights_backbone=tmp_path / "w.safetensors", classes=2)
    np.testing.assert_array_equal(*(m.get_layer("Conv1").get_weights()[0] for m in (classifier, backbone)))


def test_the_published_checkpoint():
    (record,) = keras_mnv2.list_weights(task="segmentation")
    assert (record.output_stride, record.classes, record.labels[15]) == (8, 21, "person")
    assert record.preprocessing == keras_mnv2.Preprocessing(545, 513)


@pytest.mark.parametrize(
    ("side", "format", "file"),
    [
        pytest.param(65, "litert", "model.tflite", marks=marks("tensorflow")),
        pytest.param(65, "onnx", "model.onnx", marks=pytest.mark.slow),
        # Of any size: PyTorch traces the uneven sides with symbols.
        pytest.param(None, "tf_saved_model", "model", marks=pytest.mark.slow),
        pytest.param(None, "onnx", "model.onnx", marks=pytest.mark.slow),
    ],
)
def test_it_leaves_as_a_file(side, format, file, tmp_path):
    model = keras_mnv2.DeepLabV3((side, side, 3), **SMALL, include_preprocessing=True)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (2, 65, 65, 3)).astype("float32")
    randomise(model, rng, images)
    # It is compared with the model in its own runtime.
    keras_mnv2.export(model, tmp_path / file, format, sample=images, verbose=False)
    found = keras_mnv2.load_export(tmp_path / file)(images)
    assert {name: y.shape for name, y in found.items()} == {"mask": (2, 65, 65, 3)}


@once
def test_rates_that_a_file_does_not_say_are_told(tmp_path, capsys):
    model = keras_mnv2.DeepLabV3((33, 33, 3), **SMALL, aspp=(2, 4, 6))
    model.save(tmp_path / "rates.keras")
    capsys.readouterr()
    found = keras_mnv2.DeepLabV3((33, 33, 3), weights=tmp_path / "rates.keras")
    assert "get the rates of the authors' code" in capsys.readouterr().out
    assert found.get_layer("aspp1").dilation_rate == (6, 6)
    again = keras_mnv2.DeepLabV3((33, 33, 3), weights=tmp_path / "rates.keras", aspp=(2, 4, 6))
    assert not capsys.readouterr().out
    assert again.get_layer("aspp3").dilation_rate == (6, 6)
