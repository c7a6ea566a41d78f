"""PyTorch: a process a device, as torchrun starts them, and DistributedDataParallel inside `fit`."""

import os
import warnings

import keras
import numpy as np
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from ...process import PACKAGE
from . import Engine


class OneDevice(Engine):
    """One process, with one device."""

    def seed_step(self, position):
        # Dropout layers without a seed draw from PyTorch's own generator.
        (seed,) = np.random.SeedSequence((*position, self.number)).generate_state(1)
        torch.manual_seed(int(seed))


class ManyProcesses(OneDevice):
    """Each process computes with its rows; gradients and means are added up, batch norms see the whole batch."""

    norm_layer = "sync_batch_norm"
    own_step = True

    def __init__(self):
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        self.device = "cuda" if on_gpu else "cpu"
        self.number = torch.distributed.get_rank()
        self.processes = self.replicas = torch.distributed.get_world_size()
        here = os.environ.get("LOCAL_WORLD_SIZE") == str(self.processes)
        self.host = "127.0.0.1" if here else os.environ["MASTER_ADDR"]

    def exchange(self, numbers):
        tensor = torch.tensor(numbers, device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return tensor.cpu().numpy()

    def install(self, model, loss_mean, accuracy_mean):
        # Kernels lie in memory as the convolutions read them, their gradients do not.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        parallel = DistributedDataParallel(model)

        def step(data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data[0])
            x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
            scores = parallel(x, training=True)
            model.zero_grad()
            loss = model.compute_loss(x, y, scores, sample_weight, training=True)
            model.optimizer.scale_loss(loss).backward()
            weights = model.trainable_weights
            with torch.no_grad():
                model.optimizer.apply([weight.value.grad for weight in weights], weights)
                right = keras.metrics.categorical_accuracy(y, scores).mean()
                means = torch.stack([loss.detach().float(), right.float()])
                torch.distributed.all_reduce(means)
                means /= self.processes
                for metric, mean in zip((loss_mean, accuracy_mean), means, strict=True):
                    keras.metrics.Mean.update_state(metric, mean, sample_weight=len(x) * self.processes)
            return {"loss": loss_mean.result(), "accuracy": accuracy_mean.result()}

        model.train_function = step

    def spread_seeds(self, seeds, direction):
        for seed in seeds:
            state = keras.ops.convert_to_numpy(seed)
            seed.assign((state + np.array([direction * self.number, 0])).astype(state.dtype))

    def close(self):
        torch.distributed.destroy_process_group()


def start(devices, deterministic):
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if devices not in (None, 1):
        raise ValueError(
            f"devices must be 1 on PyTorch, which has a process a device (python -m {PACKAGE}.launch), got {devices}."
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return ManyProcesses()
    if torch.cuda.device_count() > 1:
        print(f"1 of {torch.cuda.device_count()} GPUs is used: python -m {PACKAGE}.launch --processes N takes more.")
    return OneDevice()


def own_cpu():
    return keras.device("cpu")
