"""On PyTorch, what its own tools do to a model: optimisers, files, copies, processes, hooks, and outputs read late."""

import copy
import warnings

import keras
import numpy as np
import pytest

import keras_mnv2
from tests import twins
from tests.helpers import relative_difference, run_python

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's tools")
# Each kind of convolution, and with it a shortcut and a stride.
CONVOLUTIONS = ("Conv1", "expanded_conv_depthwise", "block_2_expand", "block_6_depthwise", "block_16_project")


@pytest.fixture
def torch():
    import torch

    return torch


@pytest.fixture
def model():
    return lively()


def lively(**arguments):
    found = twins.ours(**arguments)
    twins.enliven(found)
    return found


@pytest.fixture
def images(torch):
    return torch.from_numpy(twins.batch(4)[0])


def test_parameters_are_contiguous_and_one_vector(torch, model):
    assert all(p.is_contiguous() for p in model.parameters())
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    assert len(vector) == model.count_params()
    torch.nn.utils.vector_to_parameters(vector + 1, model.parameters())
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), vector + 1)


def test_lbfgs_steps(torch, model, images):
    labels = torch.tensor([0, 1, 2, 0])
    trained = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.LBFGS(trained, lr=1e-3, max_iter=2)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.nll_loss(torch.log(model(images, training=False)), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    optimizer.step(closure)
    assert losses[-1] < losses[0]


OTHER_PROCESS = """
import sys
import timm, torch
from safetensors.torch import load_file
from tests import twins

model = twins.ours()
state = load_file(sys.argv[1]) if sys.argv[1].endswith("safetensors") else torch.load(sys.argv[1], weights_only=True)
model.load_state_dict(state)
x = torch.from_numpy(twins.batch(2)[0])
with torch.no_grad():
    print(model(x, training=False).double().sum(0).tolist())
"""


def test_a_state_dict_is_a_file_that_a_second_model_loads(torch, model, images, tmp_path):
    from safetensors.torch import load_file, save_file

    state = model.state_dict()
    save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    with torch.no_grad():
        expected = model(images, training=False)
        for loaded in (load_file(tmp_path / "state.safetensors"), torch.load(tmp_path / "state.pt"), state):
            second = twins.ours()
            second.load_state_dict(loaded)
            assert torch.equal(second(images, training=False), expected)
        expected = expected[:2].double().sum(0).tolist()
    printed = run_python(OTHER_PROCESS, "torch", tmp_path / "state.safetensors")
    assert eval(printed) == pytest.approx(expected, rel=1e-6)


def test_a_deep_copy_is_averaged_beside_the_model(torch, model, images):
    average = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images, training=False)
        assert torch.equal(average(images, training=False), expected)
        for p, q in zip(average.parameters(), model.parameters(), strict=True):
            q.mul_(1.01)
            p.lerp_(q, 0.5)
        assert relative_difference(average(images, training=False), expected) > 1e-6
        second = twins.ours()
        second.set_weights(average.get_weights())
        assert torch.equal(second(images, training=False), average(images, training=False))
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    assert relative_difference(ema(images, training=False).detach(), model(images, training=False).detach()) <= 1e-6


def test_distributed_data_parallel_finds_no_strides_to_mind(torch, model, images, tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            loss = torch.log(parallel(images, training=True))[:, 0].mean()
            loss.backward()
        found = [v.value.grad.clone() for v in model.trainable_variables]
    finally:
        distributed.destroy_process_group()
    assert all(p.is_contiguous() for p in found)
    alone = twins.ours()
    twins.enliven(alone)
    torch.log(alone(images, training=True))[:, 0].mean().backward()
    for p, v in zip(found, alone.trainable_variables, strict=True):
        assert torch.allclose(p, v.value.grad, rtol=1e-4, atol=1e-6)


def whole():
    model = lively()
    return model, model


def nested():
    backbone = lively(include_top=False, pooling="avg")
    image = keras.Input(twins.SIZE)
    return keras.Model(image, keras.layers.Dense(3)(backbone(image))), backbone


def flattened():
    backbone = lively(include_top=False, pooling="avg")
    return keras.Model(backbone.input, keras.layers.Dense(3)(backbone.output)), backbone


def compact():
    model = lively_compact()
    return model, model


def lively_compact():
    return keras_mnv2.MobileNetV2(
        twins.SIZE, 0.35, weights=None, classes=3, block=keras_mnv2.layers.InvertedResidual, dropout=0
    )


WAYS = {
    "predict": lambda model, x: model.predict(x.numpy(), verbose=0),
    "predict_on_batch": lambda model, x: model.predict_on_batch(x.numpy()),
    "inference": lambda model, x: model(x, training=False),
    "training": lambda model, x: model(x, training=True),
    "called": lambda model, x: model(x),
}


def run(torch, way, model, x):
    with torch.no_grad():
        y = WAYS[way](model, x)
    return np.array(y)


@pytest.mark.parametrize("build", [whole, nested, flattened])
def test_hooks_fire_on_inner_layers(build, torch, images):
    model, backbone = build()
    expected = {way: run(torch, way, model, images) for way in WAYS if way != "training"}
    for name in CONVOLUTIONS:
        layer = backbone.get_layer(name)
        seen = []
        hooks = [
            layer.register_forward_pre_hook(lambda module, args: seen.append(("before", tuple(args[0].shape)))),
            layer.register_forward_hook(lambda module, args, y: seen.append(("after", tuple(y.shape)))),
        ]
        shapes = [("before", (4, *layer.input.shape[1:])), ("after", (4, *layer.output.shape[1:]))]
        for way in WAYS:
            seen.clear()
            found = run(torch, way, model, images)
            assert seen == shapes, (name, way)
            if way in expected:
                assert relative_difference(found, expected[way]) <= 1e-5
        for hook in hooks:
            hook.remove()
        seen.clear()
        run(torch, "inference", model, images)
        assert not seen
        # The statistics that training moved.
        twins.enliven(backbone)


def test_hooks_fire_on_a_model_and_everywhere(torch, images):
    model, backbone = nested()
    seen = []
    hooks = [one.register_forward_hook(lambda module, args, y: seen.append(module.name)) for one in (model, backbone)]
    for way in WAYS:
        seen.clear()
        run(torch, way, model, images)
        assert set(seen) >= {backbone.name}, way
    for hook in hooks:
        hook.remove()
    layers = [layer for layer in backbone.layers if not isinstance(layer, keras.layers.InputLayer)]
    hooks = [layer.register_forward_hook(lambda module, args, y: seen.append(module.name)) for layer in layers]
    for way in WAYS:
        seen.clear()
        run(torch, way, model, images)
        assert seen == [layer.name for layer in layers], way
    for hook in hooks:
        hook.remove()


def test_hooks_fire_on_the_parts_of_a_compact_block(torch, images):
    model, _ = compact()
    block = model.get_layer("block_6")
    for part in (block, block.depthwise, block.project.norm):
        seen = []
        hook = part.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.shape))
        for way in WAYS:
            seen.clear()
            run(torch, way, model, images)
            assert len(seen) == 1, (part.name, way)
        hook.remove()


def test_a_hook_may_change_what_a_layer_gives(torch, model, images):
    # As pruning and attribution by ablation do.
    layer = model.get_layer("block_10_expand")
    expected = run(torch, "inference", model, images)
    hook = layer.register_forward_hook(lambda module, args, y: y * 0)
    changed = run(torch, "inference", model, images)
    assert relative_difference(changed, expected) > 1e-4
    hook.remove()
    value = model.get_layer("block_10_expand").kernel
    value.assign(0 * value)
    assert relative_difference(run(torch, "inference", model, images), changed) <= 1e-5


def test_backward_hooks_see_gradients(torch, images):
    for build in (whole, nested, flattened):
        model, backbone = build()
        layer = backbone.get_layer("Conv_1")
        seen = []
        hook = layer.register_full_backward_hook(
            lambda module, of_inputs, of_outputs, seen=seen: seen.append(of_outputs)
        )
        for training in (False, True):
            seen.clear()
            model(images, training=training)[:, 0].sum().backward()
            ((gradient,),) = seen
            assert tuple(gradient.shape) == (4, *layer.output.shape[1:])
            assert gradient.abs().max() > 0
        hook.remove()


def test_hooks_of_all_modules_fire(torch, model, images):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        run(torch, "inference", model, images)
    finally:
        hook.remove()
    assert model.get_layer("block_5_depthwise") in seen


def test_the_layers_are_left_out_again_without_hooks(torch, model, images, monkeypatch):
    layer = model.get_layer("block_5_depthwise")
    calls = []
    kind = type(layer)
    original = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda self, *args, **kwargs: calls.append(self) or original(self, *args, **kwargs)
    )
    run(torch, "inference", model, images)
    assert not calls
    hook = layer.register_forward_hook(lambda *args: None)
    run(torch, "inference", model, images)
    assert layer in calls
    hook.remove()
    calls.clear()
    run(torch, "inference", model, images)
    assert not calls


@pytest.fixture
def sub(model):
    """A model that ends in the middle of blocks, and the same tensors of the model layer by layer."""
    names = ("block_1_expand_relu", "block_2_add", "block_13_expand", "block_16_project_BN", "out_relu")
    return keras.Model(model.input, [model.get_layer(name).output for name in names])


def later(torch, sub, images):
    with torch.no_grad():
        return sub(images, training=False)


def reference(torch, sub, images):
    """By a hook, layer by layer, and with gradients: nothing is put off."""
    hooks = [layer.register_forward_hook(lambda *args: None) for layer in sub.layers]
    found = [y.detach().numpy() for y in sub(images, training=False)]
    for hook in hooks:
        hook.remove()
    return found


def test_outputs_are_computed_when_they_are_read(torch, sub, images):
    from keras_mnv2.ops.torch import Later

    expected = reference(torch, sub, images)
    found = later(torch, sub, images)
    assert any(type(y) is Later for y in found)
    # In another order than they were made.
    for y, value in reversed(list(zip(found, expected, strict=True))):
        assert tuple(y.shape) == value.shape
        assert y.dtype is torch.float32
        assert relative_difference(y, value) <= 1e-5
    # Again, from what is kept.
    assert all(np.array_equal(y, np.asarray(y)) for y in found)


READINGS = {
    "numpy": lambda torch, y, path: y.numpy(),
    "asarray": lambda torch, y, path: np.asarray(y),
    "keras": lambda torch, y, path: keras.ops.convert_to_numpy(y),
    "deepcopy": lambda torch, y, path: copy.deepcopy(y).numpy(),
    "clone": lambda torch, y, path: y.clone().numpy(),
    "detach": lambda torch, y, path: y.detach().cpu().numpy(),
    "sum": lambda torch, y, path: (y + 0).numpy(),
    "out": lambda torch, y, path: torch.add(y, 0, out=torch.empty(y.shape)).numpy(),
    "index": lambda torch, y, path: torch.stack([y[i] for i in range(len(y))]).numpy(),
    "list": lambda torch, y, path: np.array(y.tolist(), "float32"),
    "contiguous": lambda torch, y, path: y.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).numpy(),
    "dlpack": lambda torch, y, path: torch.from_dlpack(y).numpy(),
}


@pytest.mark.parametrize("reading", READINGS)
def test_an_output_is_read_in_many_ways(reading, torch, sub, images, tmp_path):
    expected = reference(torch, sub, images)
    for y, value in zip(later(torch, sub, images), expected, strict=True):
        assert relative_difference(READINGS[reading](torch, y, tmp_path), value) <= 1e-5


def test_an_output_is_written_to_a_file(torch, sub, images, tmp_path):
    expected = reference(torch, sub, images)
    found = later(torch, sub, images)
    torch.save(found, tmp_path / "all.pt")
    for y, value in zip(torch.load(tmp_path / "all.pt", weights_only=True), expected, strict=True):
        assert type(y) is torch.Tensor
        assert relative_difference(y, value) <= 1e-5


def test_an_output_in_place_and_in_another_model(torch, sub, images):
    expected = reference(torch, sub, images)
    found = later(torch, sub, images)
    with torch.no_grad():
        found[0].mul_(2)
        assert relative_difference(found[0], 2 * expected[0]) <= 1e-5
        total = torch.zeros(found[1].shape)
        total += found[1]
        assert relative_difference(total, expected[1]) <= 1e-5
    # Into layers of Keras's own and a head that trains.
    head = keras.Sequential([keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    y = head(found[4])
    y.sum().backward()
    assert head.trainable_variables[0].value.grad is not None


def test_weights_that_change_before_an_output_is_read(torch, model, sub, images):
    found = later(torch, sub, images)
    kernel = model.get_layer("block_13_expand").kernel
    kernel.assign(kernel * 2)
    with pytest.raises(RuntimeError, match="was not read before its weights or images were changed"):
        found[2].numpy()
    # What does not depend on it is still there.
    assert np.isfinite(found[1].numpy()).all()


def test_images_that_change_before_an_output_is_read(torch, sub, images):
    found = later(torch, sub, images)
    images.add_(1)
    with pytest.raises(RuntimeError, match="was not read before its weights or images were changed"):
        found[0].numpy()


def test_in_inference_mode(torch, model, sub, images):
    expected = reference(torch, sub, images)
    with torch.inference_mode():
        found = sub(images, training=False)
        for y, value in zip(found, expected, strict=True):
            assert relative_difference(y.cpu().numpy(), value) <= 1e-5
        assert relative_difference(model(images).numpy(), model.predict(images.numpy(), verbose=0)) <= 1e-5
        found = sub(images, training=False)
    # Outside too.
    for y, value in zip(found, expected, strict=True):
        assert relative_difference(y.numpy(), value) <= 1e-5
    with torch.inference_mode():
        fresh = images.clone()
    with torch.no_grad():
        for y, value in zip(sub(fresh, training=False), expected, strict=True):
            assert relative_difference(y.numpy(), value) <= 1e-5
