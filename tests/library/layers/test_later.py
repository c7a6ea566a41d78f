"""PyTorch: parameters, hooks, and tensors that are computed when they are read."""

import copy
import io

import keras
import numpy as np
import pytest

from tests import twins
from tests.helpers import run_python

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="is about PyTorch's modules and tensors")

if keras.backend.backend() == "torch":
    import torch


@pytest.fixture(scope="module")
def models():
    base = twins.ours(include_top=False)
    twins.enliven(base)
    return base, keras.Model(base.input, base.get_layer("block_3_expand_relu").output)


@pytest.fixture
def x(rng):
    return torch.tensor(rng.uniform(-1, 1, (2, *twins.SIZE)).astype("float32"))


def test_parameters_are_contiguous_and_usable_as_such(models):
    base, _ = models
    assert all(parameter.is_contiguous() for parameter in base.parameters())
    parameters = [p for p in base.parameters() if p.requires_grad]
    vector = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(vector, parameters)
    optimizer = torch.optim.LBFGS(parameters, lr=1e-3, max_iter=1)
    optimizer.step(lambda: sum((p**2).sum() for p in parameters))


@pytest.mark.slow
def test_a_state_dictionary_is_a_file_and_fits_other_models(models, tmp_path):
    from safetensors.torch import save_file

    base, _ = models
    save_file(base.state_dict(), tmp_path / "state.safetensors")
    second = twins.ours(include_top=False)
    second.load_state_dict(base.state_dict())
    for a, b in zip(base.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    code = """
import sys, torch, numpy as np, keras_mnv2
from safetensors.torch import load_file
model = keras_mnv2.applications.MobileNetV2((64, 64, 3), 0.35, False, None)
model.load_state_dict(load_file(sys.argv[1]))
print(float(sum(abs(w).sum() for w in model.get_weights())))
"""
    found = float(run_python(code, "torch", tmp_path / "state.safetensors"))
    assert found == pytest.approx(float(sum(abs(w).sum() for w in base.get_weights())), rel=1e-5)


def test_a_deep_copy_is_a_model_of_its_own(models, x):
    base, _ = models
    copied = copy.deepcopy(base)
    expected = base.predict(x.numpy(), verbose=0)
    np.testing.assert_array_equal(copied.predict(x.numpy(), verbose=0), expected)
    copied.get_layer("Conv1").kernel.assign(copied.get_layer("Conv1").kernel * 2)
    np.testing.assert_array_equal(base.predict(x.numpy(), verbose=0), expected)


@pytest.mark.parametrize("layer", ["block_1_depthwise", "block_1_depthwise_BN", "block_2_add", "Conv1"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_fire(layer, kind, models, x):
    base, part = models
    seen = []
    handle = getattr(base.get_layer(layer), kind)(lambda module, *_: seen.append(module.name))
    nested = keras.Sequential([base, keras.layers.GlobalAveragePooling2D()])
    for model in (base, part, nested):
        for call in (
            lambda m=model: m.predict(x.numpy(), verbose=0),
            lambda m=model: m(x),
            lambda m=model: m(x, training=False),
            lambda m=model: m(x, training=True),
        ):
            before = len(seen)
            call()
            assert len(seen) == before + 1
    handle.remove()
    base.predict(x.numpy(), verbose=0), part.predict(x.numpy(), verbose=0)
    assert len(seen) == 12


def test_what_waits_is_a_tensor_to_everybody(models, x):
    _, part = models
    expected = part(x, training=False).detach().numpy()
    with torch.no_grad():

        def late():
            y = part(x, training=False)
            assert type(y).__name__ == "Later"
            return y

        file = io.BytesIO()
        torch.save(late(), file)
        file.seek(0)
        found = [np.asarray(late()), late().numpy(), copy.deepcopy(late()).numpy(), torch.cat([late()]).numpy()]
        found += [(late() + 0).numpy(), keras.ops.convert_to_numpy(late()), torch.load(file).numpy()]
        assert tuple(late().shape) == expected.shape
    for one in found:
        np.testing.assert_allclose(one, expected, atol=1e-5 * np.abs(expected).max())
    with torch.inference_mode():
        np.testing.assert_allclose(part(x, training=False).numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_numbers_that_have_changed_are_refused(models, x):
    base, part = models
    with torch.no_grad():
        y = part(x, training=False)
    beta = base.get_layer("block_1_expand_BN").beta
    beta.assign(beta + 0)
    with pytest.raises(RuntimeError, match=r"layer 'block_1_expand_BN' was not read before its weights or images"):
        y.sum()


def test_other_values_of_variables_are_taken(models, x):
    _, part = models
    train = [v.value * 2 for v in part.trainable_variables]
    others = [v.value for v in part.non_trainable_variables]
    expected, _ = part.stateless_call(train, others, x, training=False)
    with torch.no_grad():
        found, _ = part.stateless_call(train, others, x, training=False)
        found = found + 0
        plain = part(x, training=False) + 0
    expected = expected.detach()
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert float((plain - expected).abs().max() / expected.abs().max()) > 1e-2


def test_gradients_flow_where_they_are_wanted(models, x):
    base, part = models
    part(x, training=False).sum().backward()
    assert base.get_layer("Conv1").kernel.value.grad is not None
    base.zero_grad()


def test_lora_counts(models, x):
    model = twins.ours(include_top=False)
    twins.enliven(model)
    around = keras.Model(model.input, model.output)
    before = around.predict(x.numpy(), verbose=0)
    layer = model.get_layer("block_5_project")
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(keras.ops.ones(layer.lora_kernel_b.shape))
    for one in (model, around):
        assert np.abs(one.predict(x.numpy(), verbose=0) - before).max() > 1e-3
    np.testing.assert_allclose(
        model.predict(x.numpy(), verbose=0), around.predict(x.numpy(), verbose=0), rtol=1e-4, atol=1e-4
    )


def test_one_process_of_distributed_data_parallel(models, x, tmp_path, recwarn):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(twins.ours(include_top=False, pooling="avg"))
        wrapped(x, training=True).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert not [str(w.message) for w in recwarn if "stride" in str(w.message)]


def test_images_that_have_changed_are_refused(models, x):
    _, part = models
    with torch.no_grad():
        y = part(x, training=False)
        x += 1
    with pytest.raises(RuntimeError, match="was not read before its weights or images were changed"):
        y.numpy()


def test_what_waits_is_written_to_and_handed_on(models, x):
    _, part = models
    expected = part(x, training=False).detach().numpy()
    limit = 1e-5 * np.abs(expected).max()
    with torch.no_grad():
        found = part(x, training=False)
        found.mul_(2)
        np.testing.assert_allclose(found, 2 * expected, atol=2 * limit)
        total = torch.zeros(expected.shape)
        total += part(x, training=False)
        np.testing.assert_allclose(total, expected, atol=limit)
        np.testing.assert_allclose(torch.from_dlpack(part(x, training=False)), expected, atol=limit)
        features = part(x, training=False)
    # Into a head that trains.
    head = keras.Sequential([keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    head(features).sum().backward()
    assert all(v.value.grad is not None for v in head.trainable_variables)


def test_inference_mode_inside_and_outside(models, x):
    _, part = models
    expected = part(x, training=False).detach().numpy()
    limit = 1e-5 * np.abs(expected).max()
    with torch.inference_mode():
        late, fresh = part(x, training=False), x.clone()
    np.testing.assert_allclose(late, expected, atol=limit)
    with torch.no_grad():
        np.testing.assert_allclose(part(fresh, training=False), expected, atol=limit)


def test_an_average_of_weights_is_kept_beside_the_model(x):
    model = twins.ours()
    twins.enliven(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    average.update_parameters(model)
    with torch.no_grad():
        kernels = [p for p in model.parameters() if p.ndim == 4]
        for kernel in kernels:
            kernel.mul_(1.02)
        average.update_parameters(model)
        for kernel in kernels:
            kernel.mul_(1.01 / 1.02)
        found, expected = (one(x, training=False) + 0 for one in (average, model))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
