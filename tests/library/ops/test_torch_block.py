"""A block in training as one node of autograd on PyTorch, against the operations by `keras.ops`."""

import copy

import keras
import numpy as np
import pytest

import keras_mnv2
from keras_mnv2 import ops
from tests.helpers import relative_difference
from training.benchmark.frameworks import operators

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="is about PyTorch's autograd")

if keras.backend.backend() == "torch":
    import torch
    import torchvision

    from keras_mnv2.ops import torch_block

MOMENTUM, EPSILON = 0.9, 1e-3
# Name: (height, width), units (depthwise, side, filters, stride, dilation, relu6), padding, shortcut.
EXPAND, PROJECT = (False, 1, 12, 1, 1, True), (False, 1, 6, 1, 1, False)
BLOCKS = {
    "bottleneck": ((7, 6), [EXPAND, (True, 3, 12, 1, 1, True), PROJECT], "same", True),
    "bottleneck, symmetric": ((7, 6), [EXPAND, (True, 3, 12, 1, 1, True), PROJECT], "symmetric", True),
    "stride 2, even": ((8, 6), [EXPAND, (True, 3, 12, 2, 1, True), PROJECT], "same", False),
    "stride 2, odd": ((7, 5), [EXPAND, (True, 3, 12, 2, 1, True), PROJECT], "same", False),
    "stride 2, symmetric": ((8, 7), [EXPAND, (True, 3, 12, 2, 1, True), PROJECT], "symmetric", False),
    "dilated": ((9, 8), [EXPAND, (True, 3, 12, 1, 2, True), PROJECT], "same", True),
    "dilated far": ((6, 9), [EXPAND, (True, 3, 12, 1, 4, True), PROJECT], "symmetric", True),
    "dilated, padding between": ((9, 10), [EXPAND, (True, 3, 12, 1, 3, True), PROJECT], ((2, 2), (4, 4)), False),
    "one pixel": ((1, 1), [EXPAND, (True, 3, 12, 1, 1, True), PROJECT], "same", True),
    "two pixels, stride 2": ((2, 2), [EXPAND, (True, 3, 12, 2, 1, True), PROJECT], "same", False),
    "without expansion": ((7, 6), [(True, 3, 6, 1, 1, True), PROJECT], "same", True),
    "zeros before a kernel": ((7, 6), [EXPAND, (True, 3, 12, 2, 1, True), PROJECT], ((2, 0), (1, 0)), False),
    "stem": ((9, 8), [(False, 3, 5, 2, 1, True)], "same", False),
    "head": ((3, 4), [(False, 1, 20, 1, 1, True)], "same", False),
    "linear between": ((7, 6), [(False, 1, 12, 1, 1, False), (True, 3, 12, 2, 1, False), PROJECT], "same", False),
    "ends in ReLU6, shortcut": ((5, 6), [EXPAND, (True, 3, 12, 1, 1, True), (False, 1, 6, 1, 1, True)], "same", True),
    "many rows": ((40, 30), [EXPAND, (True, 3, 12, 1, 1, True), PROJECT], "same", True),
}


def block(name, dtype="float64", batch=3):
    """Steps of the block, its images and parameters, and settings for the reference."""
    (height, width), units, padding, shortcut = BLOCKS[name]
    rng = np.random.default_rng(0)

    def tensor(*shape, about=0.0, scale=1.0, requires_grad=True):
        numbers = about + scale * rng.normal(size=shape)
        return torch.nn.Parameter(torch.tensor(numbers, dtype=getattr(torch, dtype)), requires_grad=requires_grad)

    channels = 3 if name == "stem" else 6
    x = tensor(batch, height, width, channels)
    steps, parameters = [], []
    for depthwise, side, filters, stride, dilation, relu6 in units:
        # Padding is that of the wide kernels.
        around = padding if side > 1 or isinstance(padding, str) else "same"
        moving = tensor(filters, requires_grad=False), tensor(filters, about=2, scale=0.1, requires_grad=False)
        kernel = tensor(side, side, channels, 1 if depthwise else filters, scale=0.7)
        parameters += [kernel, tensor(filters, about=2, scale=0.3), tensor(filters, about=1)]
        steps.append(torch_block.Step(depthwise, stride, around, dilation, relu6, EPSILON, MOMENTUM, *moving))
        channels = filters
    return steps, shortcut, x, parameters


def reference(steps, shortcut, x, parameters):
    """The block by the operations' reference: its output, and the moving statistics after it."""
    from keras_mnv2.ops import default

    y, moved = x, []
    for i, step in enumerate(steps):
        kernel, gamma, beta = parameters[3 * i : 3 * i + 3]
        options = {"stride": step.stride, "padding": step.padding, "dilation": step.dilation}
        y = default.convolution(y, kernel, depthwise=step.depthwise, **options)
        mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2), correction=0)
        y = (y - mean) * torch.rsqrt(variance + step.epsilon) * gamma + beta
        moved.append(default.moving_average(step.moving_mean, mean.detach(), step.momentum))
        moved.append(default.moving_average(step.moving_variance, variance.detach(), step.momentum))
        y = y.clamp(0, 6) if step.relu6 else y
    return y + x if shortcut else y, moved


def weighted_sum(y):
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    return (y * weights).sum()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_gradients_and_moving_statistics_are_those_of_the_reference(name, dtype):
    steps, shortcut, x, parameters = block(name, dtype)
    expected, moved = reference(steps, shortcut, x, parameters)
    wanted = torch.autograd.grad(weighted_sum(expected), [x, *parameters])
    y = torch_block.train(steps, shortcut, x, parameters)
    found = torch.autograd.grad(weighted_sum(y), [x, *parameters])
    exact = dtype == "float64"
    assert relative_difference(y.detach(), expected.detach()) <= (1e-12 if exact else 1e-5)
    statistics = [tensor for step in steps for tensor in (step.moving_mean, step.moving_variance)]
    for a, b in zip(statistics, moved, strict=True):
        assert relative_difference(a.detach(), b.detach()) <= (1e-12 if exact else 1e-5)
    # The mean of what a batch norm reads has no gradient: sums of what cancels are compared with the largest of all.
    largest = max(float(b.abs().max()) for b in wanted)
    for a, b, parameter in zip(found, wanted, [x, *parameters], strict=True):
        assert a.is_contiguous()
        assert a.shape == parameter.shape
        assert float((a - b).abs().max()) <= (1e-11 if exact else 1e-4) * largest


@pytest.mark.parametrize("name", ["bottleneck", "stride 2, even", "stem", "many rows"])
def test_half_precision_computes_in_it_and_keeps_kernels_and_statistics_in_their_own(name):
    steps, shortcut, x, parameters = block(name, "float32")
    half = x.detach().to(torch.bfloat16).requires_grad_()
    exact = half.detach().float().requires_grad_()
    expected, _ = reference(steps, shortcut, exact, parameters)
    wanted = torch.autograd.grad(weighted_sum(expected), [exact, *parameters])
    y = torch_block.train(steps, shortcut, half, parameters)
    assert y.dtype is torch.bfloat16
    found = torch.autograd.grad(weighted_sum(y.float()), [half, *parameters])
    assert relative_difference(y.detach().float(), expected.detach()) <= 3e-2
    # Near 0 and 6 the rounding decides for single numbers whether they have a gradient.
    assert all(a.dtype is source.dtype for a, source in zip(found, [half, *parameters], strict=True))
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    assert difference <= 5e-2**2 * sum(float(b.square().sum()) for b in wanted)
    assert all(step.moving_variance.dtype is torch.float32 for step in steps)


@pytest.mark.parametrize("name", ["bottleneck", "stride 2, even", "without expansion", "one pixel", "many rows"])
def test_gradients_can_be_differentiated(name):
    steps, shortcut, x, parameters = block(name, batch=2)

    def run(x, *parameters):
        return torch_block.train(steps, shortcut, x, list(parameters))

    first = torch.autograd.grad(weighted_sum(run(x, *parameters)), [x, *parameters], create_graph=True)
    # The last shift is added to the output alone.
    sources = [x, *parameters[:-1]]
    second = torch.autograd.grad(sum(g.square().sum() for g in first), sources)
    y, _ = reference(steps, shortcut, x, parameters)
    first = torch.autograd.grad(weighted_sum(y), [x, *parameters], create_graph=True)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in first), sources)
    largest = max(float(b.abs().max()) for b in wanted)
    for a, b in zip(second, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-9 * largest


def test_what_does_not_train_has_no_gradient_and_the_rest_the_same():
    steps, shortcut, x, parameters = block("bottleneck")
    all_of_them = torch.autograd.grad(weighted_sum(torch_block.train(steps, shortcut, x, parameters)), parameters)
    frozen = [p.detach() if i in (0, 4, 8) else p for i, p in enumerate(parameters)]
    trained = [p for p in frozen if p.requires_grad]
    found = torch.autograd.grad(weighted_sum(torch_block.train(steps, shortcut, x.detach(), frozen)), trained)
    expected = [g for g, p in zip(all_of_them, frozen, strict=True) if p.requires_grad]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_images_and_gradients_may_lie_in_any_way():
    steps, shortcut, x, parameters = block("bottleneck")
    expected = torch_block.train(steps, shortcut, x, parameters)
    wanted = torch.autograd.grad(expected.mean(), [x, *parameters])  # Its gradient is one number for all pixels.
    wide = torch.cat([x, x], 3).detach()
    turned = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for other in (wide[..., : x.shape[3]], turned):
        other.requires_grad_()
        y = torch_block.train(steps, shortcut, other, parameters)
        assert torch.allclose(y, expected)
        for a, b in zip(torch.autograd.grad(y.mean(), [other, *parameters]), wanted, strict=True):
            assert torch.allclose(a, b)


@pytest.mark.parametrize("name", ["bottleneck", "stride 2, even", "one pixel", "two pixels, stride 2", "stem"])
def test_gradients_may_come_with_the_channels_first(name, monkeypatch):
    """As PyTorch's own depthwise convolution on GPUs gives that of the images."""
    steps, shortcut, x, parameters = block(name)
    wanted = torch.autograd.grad(weighted_sum(torch_block.train(steps, shortcut, x, parameters)), [x, *parameters])
    convolution_backward = torch_block._convolution_backward

    def channels_first(*arguments):
        found = convolution_backward(*arguments)
        return [None if g is None else g.contiguous(memory_format=torch.contiguous_format) for g in found]

    monkeypatch.setattr(torch_block, "_convolution_backward", channels_first)
    found = torch.autograd.grad(weighted_sum(torch_block.train(steps, shortcut, x, parameters)), [x, *parameters])
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    steps, shortcut, x, parameters = block("stride 2, even")
    loss = weighted_sum(torch_block.train(steps, shortcut, x, parameters))
    once = torch.autograd.grad(loss, [x, *parameters], retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, [x, *parameters]), once, strict=True):
        assert torch.equal(a, b)


def test_a_kernel_that_is_changed_before_the_gradients_is_an_error():
    steps, shortcut, x, parameters = block("bottleneck")
    loss = weighted_sum(torch_block.train(steps, shortcut, x, parameters))
    with torch.no_grad():
        parameters[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def small_model(**arguments):
    keras.utils.set_random_seed(0)
    rows = [[1, 8, 1, 1], [6, 12, 2, 2]]
    arguments = {"classes": 5, "dropout": 0, "weights": None, "inverted_residual_setting": rows, **arguments}
    return keras_mnv2.MobileNetV2((32, 32, 3), **arguments)


def batch(n=4):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(n, 32, 32, 3)).astype("float32"))


@pytest.fixture
def blocks(monkeypatch):
    """How many blocks ran as one node."""
    ran = []
    train = torch_block.train
    monkeypatch.setattr(torch_block, "train", lambda *arguments: ran.append(1) or train(*arguments))
    return ran


def states(model):
    return [v.value.detach().clone() for v in model.non_trainable_weights]


@pytest.mark.parametrize("form", ["whole", "nested", "compact"])
def test_a_step_of_fit_is_that_of_the_layers_one_by_one(form, blocks, monkeypatch):
    block = keras_mnv2.layers.InvertedResidual if form == "compact" else None

    def trained():
        model = small_model(block=block)
        if form == "nested":
            model = keras.Sequential([model])
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy")
        model.fit(batch(8), torch.arange(8) % 5, batch_size=4, epochs=2, shuffle=False, verbose=0)
        return [v.numpy() for v in model.weights]

    found = trained()
    assert blocks
    monkeypatch.setattr(ops, "train_block", lambda *arguments: None)
    del blocks[:]
    expected = trained()
    assert not blocks
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 2e-5


@pytest.mark.parametrize("way", ["autocast", "functional", "forward mode", "vmap", "stateless", "meta"])
def test_what_transforms_a_model_sees_its_operations(way, blocks):
    model, x = small_model(), batch(2)
    before = states(model)
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x, training=True).sum().backward()
    elif way == "functional":
        weights = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
        found = torch.func.grad(lambda x: model.stateless_call(*weights, x, training=True)[0].square().sum())(x)
        assert not blocks
        y = model(x.requires_grad_(), training=True)
        assert relative_difference(found.detach(), torch.autograd.grad(y.square().sum(), x)[0]) <= 1e-4
        blocks.clear()
    elif way == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(model(dual, training=True)).tangent is not None
    elif way == "vmap":
        torch.func.vmap(lambda x: model(x[None], training=False)[0])(x)
    elif way == "stateless":
        trainable, rest = ([v.value for v in ws] for ws in (model.trainable_variables, model.non_trainable_variables))
        _, changed = model.stateless_call(trainable, rest, x, training=True)
        assert any(not torch.equal(a, b) for a, b in zip(changed, rest, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))
    else:
        assert model.compute_output_spec(keras.KerasTensor((2, 32, 32, 3)), training=True).shape == (2, 5)
    assert not blocks


def test_frozen_norms_and_other_norms_and_activations_run_unit_by_unit(blocks):
    small_model(norm_layer="group_norm")(batch(2), training=True).sum().backward()
    assert not blocks
    for name, value in (("trainable", False), ("momentum", 1.0)):
        model = small_model()
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                setattr(layer, name, value)
        before = states(model)
        model(batch(2), training=True).sum().backward()
        assert not blocks
        assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))
    small_model(activation="swish")(batch(2), training=True).sum().backward()
    assert len(blocks) == 3  # The projections, behind which there is no activation.


def test_one_pixel_of_one_image_keeps_the_moving_statistics_finite():
    steps, shortcut, x, parameters = block("one pixel", batch=1)
    before = [step.moving_variance.clone() for step in steps]
    torch_block.train(steps, shortcut, x, parameters).sum().backward()
    for step, variance in zip(steps, before, strict=True):
        assert torch.isfinite(step.moving_mean).all()
        # The variance of one number is 0.
        assert torch.allclose(step.moving_variance, MOMENTUM * variance)


def test_a_copy_of_a_model_trains_its_own_weights():
    model = small_model()
    model(batch(2), training=True).sum().backward()
    other = copy.deepcopy(model)
    before = [v.numpy().copy() for v in model.weights]
    other.compile("sgd", "sparse_categorical_crossentropy")
    other.train_on_batch(batch(4), np.arange(4))
    assert all(np.array_equal(a, v.numpy()) for a, v in zip(before, model.weights, strict=True))
    assert any(not np.array_equal(a, v.numpy()) for a, v in zip(before, other.weights, strict=True))


def test_a_step_makes_no_more_calls_than_torchvision():
    """Two images of 32x32: what is left is what a step costs whoever drives a GPU."""
    x, y = np.random.default_rng(0).random((2, 32, 32, 3), dtype="float32"), np.array([1, 2])
    model = keras_mnv2.MobileNetV2((32, 32, 3), weights=None)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy")
    peer = torchvision.models.mobilenet_v2().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(peer.parameters(), 0.01, momentum=0.9)
    images = torch.from_numpy(x).permute(0, 3, 1, 2)

    def peer_step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(peer(images), torch.from_numpy(y)).backward()
        optimizer.step()

    def calls(step):
        step(), step()
        return operators(step)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, theirs = calls(lambda: model.train_on_batch(x, y)), calls(peer_step)
    finally:
        torch.set_num_threads(threads)
    print(f"calls of a training step: {ours}, torchvision {theirs}")
    assert ours <= theirs
