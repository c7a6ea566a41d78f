"""TensorFlow: tf.distribute's mirrored strategies, of one process or of several, under `fit`."""

import json
import os
import weakref

import keras
import numpy as np
import tensorflow as tf

from . import Engine as OneDevice

ROLES = ("chief", "worker")


class TensorFlowEngine(OneDevice):
    """Each replica computes with its rows; gradients and means are added up, batch norms see the whole batch.

    `fit` of Keras 3.15 fails under a strategy of several workers, so `fit` is called of a model outside the strategy
    that has the variables of one inside, with a step of our own.
    """

    norm_layer = "sync_batch_norm"
    own_step = True

    def __init__(self, strategy, config):
        self._strategy = strategy
        self.replicas = strategy.num_replicas_in_sync
        self._traced: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        if config is not None:
            # The chief, where there is one, comes before the workers.
            chiefs, workers = (config["cluster"].get(role, []) for role in ROLES)
            role, index = config["task"]["type"], int(config["task"]["index"])
            self.number = index + (len(chiefs) if role == "worker" else 0)
            self.processes = len(chiefs) + len(workers)
            hosts = [address.rpartition(":")[0] for address in [*chiefs, *workers]]
            self.host = hosts[0] if len(set(hosts)) > 1 else "127.0.0.1"

    def scope(self):
        return self._strategy.scope()

    def exchange(self, numbers):
        def total():
            context = tf.distribute.get_replica_context()
            first = tf.cast(context.replica_id_in_sync_group == 0, tf.int32)
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(numbers) * first)

        return self._local(self._strategy.run(tf.function(total)))[0]

    def trained(self, model):
        return keras.Model(model.input, model.output, name=model.name)

    def install(self, model, loss_mean, accuracy_mean):
        strategy = self._strategy

        def replica_step(x, y, sample_weight):
            with tf.GradientTape() as tape:
                scores = model(x, training=True)
                # Keras divides it by the number of replicas.
                loss = model.compute_loss(x, y, scores, sample_weight, training=True)
                scaled = model.optimizer.scale_loss(loss)
            weights = model.trainable_weights
            model.optimizer.apply_gradients(zip(tape.gradient(scaled, weights), weights, strict=True))
            right = tf.reduce_mean(keras.metrics.categorical_accuracy(y, scores)) / self.replicas
            return tf.stack([tf.cast(loss, tf.float32), tf.cast(right, tf.float32)])

        @tf.function
        def global_step(*parts):
            return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(replica_step, args=parts), axis=None)

        def function(iterator):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(next(iterator))
            parts = [None if array is None else self._split(array) for array in (x, y, sample_weight)]
            means = global_step(*parts)
            for metric, mean in zip((loss_mean, accuracy_mean), tf.unstack(means), strict=True):
                keras.metrics.Mean.update_state(metric, mean, sample_weight=len(x) * self.processes)
            return {"loss": loss_mean.result(), "accuracy": accuracy_mean.result()}

        model.train_function = function

    def predictor(self, model):
        if model not in self._traced:
            itself = weakref.proxy(model)

            @tf.function(reduce_retracing=True)
            def run(images):
                return self._strategy.run(lambda x: itself(x, training=False), args=(images,))

            self._traced[model] = run
        return lambda images: np.concatenate(self._local(self._traced[model](self._split(images))))

    def _split(self, array):
        """Rows for each replica of this process."""
        count = self.replicas // self.processes
        bounds = np.linspace(0, len(array), count + 1).astype(int)

        def part(context):
            i = context.replica_id_in_sync_group % count
            return tf.convert_to_tensor(array[bounds[i] : bounds[i + 1]])

        return self._strategy.experimental_distribute_values_from_function(part)

    def _local(self, values):
        return [result.numpy() for result in self._strategy.experimental_local_results(values)]


def start(devices, deterministic):
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    config = json.loads(os.environ.get("TF_CONFIG") or "null")
    cluster = (config or {}).get("cluster", {})
    several = sum(len(cluster.get(role, [])) for role in ROLES) > 1
    if several and (role := config.get("task", {}).get("type")) not in ROLES:
        raise ValueError(f"TF_CONFIG must have a task of type {' or '.join(ROLES)}, got {role!r}.")
    gpus = tf.config.list_physical_devices("GPU")
    if devices is not None and len(gpus) not in (0, devices):
        raise ValueError(f"devices must be the {len(gpus)} GPUs (CUDA_VISIBLE_DEVICES chooses), got {devices}.")
    if devices is not None and not gpus:
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    if several:
        return TensorFlowEngine(tf.distribute.MultiWorkerMirroredStrategy(), config)
    own = [device.name for device in tf.config.list_logical_devices("GPU" if gpus else "CPU")]
    return TensorFlowEngine(tf.distribute.MirroredStrategy(own), None) if len(own) > 1 else OneDevice()


def own_cpu():
    return keras.device("cpu")
