"""Synchronised batch norm over two processes equals one process with the whole batch."""

import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_mnv2.layers import ConvNormActivation

WORKER = """
import sys
import keras, numpy as np, torch, torch.distributed as dist
from keras_mnv2.layers import BatchNormalization, Conv2D, ConvNormActivation, ReLU
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
x = np.load(f"{folder}/x.npy")
part = torch.tensor(x[:5] if rank == 0 else x[5:])
layer = ConvNormActivation(8, norm_layer="sync_batch_norm")
conv = Conv2D(8, 3, padding="same", use_bias=False)
norm = BatchNormalization(momentum=0.9, synchronized=True)
layers = keras.Sequential([conv, norm, ReLU(6.0)])
for form, model, owner, norm in (("compact", layer, layer, None), ("open", layers, conv, norm)):
    model.build(x.shape)
    norm = norm or layer.norm
    owner.kernel.assign(np.load(f"{folder}/kernel.npy"))
    y = model(part, training=True)
    y.square().sum().backward()
    gradient = owner.kernel.value.grad
    dist.all_reduce(gradient)
    np.savez(f"{folder}/{form}_{rank}.npz", y=y.detach().numpy(), gradient=gradient.numpy(),
             mean=norm.moving_mean.numpy(), variance=norm.moving_variance.numpy())
dist.destroy_process_group()
"""


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="TensorFlow and JAX synchronise by their own means")
def test_two_processes_have_the_statistics_and_gradients_of_one(tmp_path, rng):
    x = rng.normal(1, 2, (8, 6, 6, 3)).astype("float32")
    layer = ConvNormActivation(8)
    y = layer(keras.ops.convert_to_tensor(x), training=True)
    y.square().sum().backward()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "kernel.npy", keras.ops.convert_to_numpy(layer.kernel))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    whole = {
        "gradient": layer.kernel.value.grad,
        "mean": layer.norm.moving_mean,
        "variance": layer.norm.moving_variance,
    }
    for form in ("compact", "open"):
        parts = [np.load(tmp_path / f"{form}_{rank}.npz") for rank in range(2)]
        found = np.concatenate([part["y"] for part in parts])
        assert np.allclose(found, keras.ops.convert_to_numpy(y), atol=1e-5)
        for part in parts:
            for name, expected in whole.items():
                assert np.allclose(part[name], keras.ops.convert_to_numpy(expected), rtol=1e-4, atol=1e-4), name
