"""JAX: Keras's DataParallel over the devices of one process or of several."""

import contextlib
import os
import weakref

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import Engine as OneDevice


class JaxEngine(OneDevice):
    """The batch is one array over all devices: metrics, batch norms and random numbers are those of the whole batch."""

    def __init__(self):
        self.number = jax.process_index()
        self.processes = jax.process_count()
        self.host = os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES", "").split(",")[0].rpartition(":")[0]
        self.replicas = len(jax.devices())
        # Each process feeds its own rows.
        self._distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(self._distribution)
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self._whole, self._rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
        self._compiled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def scope(self):
        return self._distribution.scope()

    @contextlib.contextmanager
    def alone(self):
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(self._distribution)

    def exchange(self, numbers):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.broadcast_one_to_all(numbers))

    def predictor(self, model):
        # Keras's `predict` wants batches that the devices divide, and fails with several processes.
        if model not in self._compiled:
            itself = weakref.proxy(model)
            self._compiled[model] = jax.jit(lambda *state: itself.stateless_call(*state, training=False)[0])
        groups = (model.trainable_variables, model.non_trainable_variables)
        weights = jax.device_put([[np.asarray(v.value) for v in group] for group in groups], self._whole)
        count = len(jax.local_devices())

        def predict(images):
            padding = np.repeat(images[-1:], -len(images) % count, axis=0)
            with self.alone():
                rows = jax.device_put(np.concatenate([images, padding]), self._rows)
                return np.asarray(self._compiled[model](*weights, rows))[: len(images)]

        return predict

    def close(self):
        if self.processes > 1:
            jax.distributed.shutdown()


def start(devices, deterministic):
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    if int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES") or 1) > 1:
        keras.distribution.initialize()
    found = jax.local_device_count()
    if devices is not None and devices != found:
        raise ValueError(f"devices must be the {found} that JAX has (CUDA_VISIBLE_DEVICES chooses), got {devices}.")
    return JaxEngine() if len(jax.devices()) > 1 else OneDevice()


def own_cpu():
    # Keras's "cpu" is the first of all processes'.
    return jax.default_device(jax.local_devices(backend="cpu")[0])
