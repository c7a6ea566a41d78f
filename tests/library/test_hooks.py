"""On PyTorch, who looks inside by hooks is told of each layer, whatever runs without them."""

import keras
import numpy as np
import pytest

import keras_mnv2
from tests import twins
from tests.helpers import relative_difference

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="is about PyTorch's modules")

if keras.backend.backend() == "torch":
    import torch

# Each kind of convolution, what is around one, and what closes a block.
WATCHED = ("Conv1", "expanded_conv_depthwise_BN", "block_2_expand_relu", "block_2_add", "block_6_depthwise")
WAYS = {
    "predict": lambda model, x: model.predict(x.numpy(), verbose=0),
    "inference": lambda model, x: model(x, training=False),
    "called": lambda model, x: model(x),
    "training": lambda model, x: model(x, training=True),
}


def lively(**arguments):
    model = twins.ours(**arguments)
    twins.enliven(model)
    return model


def whole():
    model = lively()
    return model, model


def nested():
    backbone = lively(include_top=False, pooling="avg")
    return keras.Sequential([backbone, keras.layers.Dense(3)]), backbone


def flattened():
    backbone = lively(include_top=False, pooling="avg")
    return keras.Model(backbone.input, keras.layers.Dense(3)(backbone.output)), backbone


def compact():
    block = keras_mnv2.layers.InvertedResidual
    model = keras_mnv2.MobileNetV2(twins.SIZE, 0.35, weights=None, classes=3, block=block, dropout=0)
    return model, model


def operations(model):
    return [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]


@pytest.fixture
def x():
    return torch.from_numpy(twins.batch(2)[0])


def run(way, model, x):
    with torch.no_grad():
        return np.asarray(WAYS[way](model, x))


@pytest.mark.parametrize("build", [whole, nested, flattened])
def test_layers_tell_what_they_give_and_the_model_gives_the_same(build, x):
    model, backbone = build()
    expected = {way: run(way, model, x) for way in ("predict", "inference", "called")}
    for name in WATCHED:
        layer, seen = backbone.get_layer(name), []
        with layer.register_forward_hook(lambda module, args, y, seen=seen: seen.append((module, tuple(y.shape)))):
            for way, value in expected.items():
                assert relative_difference(run(way, model, x), value) <= 1e-5
        assert seen == [(layer, (2, *layer.output.shape[1:]))] * 3
        for way in expected:
            run(way, model, x)
        assert len(seen) == 3


@pytest.mark.parametrize("build", [twins.theirs, twins.ours])
def test_all_layers_tell_in_their_order(build, x):
    model = build()
    around = keras.Sequential([model, keras.layers.Dense(2)])
    layers, seen = operations(model), []
    hooks = [layer.register_forward_hook(lambda module, *_: seen.append(module)) for layer in layers]
    for one in (model, around):
        for way in WAYS:
            seen.clear()
            run(way, one, x)
            assert seen == layers, way
    for hook in hooks:
        hook.remove()
    with model.register_forward_hook(lambda module, *_: seen.append(module)):
        for way in WAYS:
            seen.clear()
            run(way, around, x)
            assert seen == [model], way


def test_parts_of_a_block_tell(x):
    model, _ = compact()
    block = model.get_layer("block_6")
    for part in (block, block.depthwise, block.project.norm):
        seen = []
        with part.register_forward_hook(lambda module, *_, seen=seen: seen.append(module)):
            for way in WAYS:
                run(way, model, x)
        assert seen == [part] * len(WAYS)


def test_what_a_hook_gives_is_what_goes_on(x):
    # As pruning, and attribution by ablation, do it.
    model, _ = whole()
    expected = run("inference", model, x)
    layer = model.get_layer("block_10_expand")
    with layer.register_forward_hook(lambda module, args, y: y * 0):
        changed = run("inference", model, x)
    assert relative_difference(changed, expected) > 1e-4
    assert np.array_equal(run("inference", model, x), expected)
    with layer.register_forward_pre_hook(lambda module, args: (args[0] * 0,)):
        assert relative_difference(run("inference", model, x), changed) <= 1e-5
    layer.kernel.assign(0 * layer.kernel)
    assert relative_difference(run("inference", model, x), changed) <= 1e-5


@pytest.mark.parametrize("build", [whole, nested, flattened])
def test_backward_hooks_are_given_gradients(build, x):
    model, backbone = build()
    layer, seen = backbone.get_layer("Conv_1"), []
    with layer.register_full_backward_hook(lambda module, of_inputs, of_outputs: seen.append(of_outputs)):
        for training in (False, True):
            model(x, training=training)[:, 0].sum().backward()
    assert len(seen) == 2
    for (gradient,) in seen:
        assert tuple(gradient.shape) == (2, *layer.output.shape[1:])
        assert gradient.abs().max() > 0


# The images need no gradient, of which PyTorch says that a hook of the first layer may wonder.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules_are_told(name, x):
    model, _ = whole()
    layer, seen = model.get_layer("block_5_depthwise"), []
    with getattr(torch.nn.modules.module, f"register_module_{name}")(lambda module, *_: seen.append(module)):
        model(x, training=False)[:, 0].sum().backward()
    assert seen.count(layer) == 1


def test_layers_are_left_out_again_without_hooks(x, monkeypatch):
    model, _ = whole()
    layer = model.get_layer("block_5_depthwise")
    calls, original = [], type(layer).__call__

    def call(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(layer), "__call__", call)
    counts = []
    for _ in range(2):
        calls.clear()
        run("inference", model, x)
        counts.append(len(calls))
        with layer.register_forward_hook(lambda *_: None):
            run("inference", model, x)
            counts.append(len(calls))
    # 17 depthwise convolutions: nobody calls one until each is called.
    assert counts == [0, 17, 0, 17]
