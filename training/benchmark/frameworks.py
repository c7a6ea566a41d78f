"""What the benchmark asks of a framework: threads, tensors on its device, and to wait for it.

A framework is imported where it is asked for something, so that a process holds only its own.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def set_threads(framework: str, threads: int | None) -> None:
    """Lets PyTorch or TensorFlow compute with so many threads, before its first operation; JAX has no such setting."""
    if threads is None:
        return
    if framework == "torch":
        import torch

        torch.set_num_threads(threads)
    if framework == "tensorflow":
        import tensorflow

        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(threads)


def torch_device() -> str:
    """PyTorch's name of the device: the GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def on_device(framework: str, array: np.ndarray) -> Any:
    """The array as a tensor of the framework, on its device."""
    if framework == "torch":
        import torch

        return torch.from_numpy(array).to(torch_device())
    if framework == "jax":
        import jax

        return jax.device_put(array)
    import tensorflow

    return tensorflow.convert_to_tensor(array)


def wait(framework: str, tensors: Any) -> None:
    """Waits until the device has computed the tensors."""
    if framework == "torch":
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    elif framework == "jax":
        import jax

        jax.block_until_ready(tensors)
    else:
        import tensorflow

        tensorflow.test.experimental.sync_devices()


def forward(framework: str, model: Any) -> Callable:
    """A Keras model's forward pass from tensor to tensor, compiled where `predict` is; it waits for the result."""
    if framework == "torch":
        import torch

        run = torch.no_grad()(lambda x: model(x, training=False))
    elif framework == "jax":
        import jax

        weights = [
            [variable.value for variable in v] for v in (model.trainable_variables, model.non_trainable_variables)
        ]
        compiled = jax.jit(lambda weights, x: model.stateless_call(*weights, x, training=False)[0])

        def run(x):
            return compiled(weights, x)
    else:
        import tensorflow

        run = tensorflow.function(lambda x: model(x, training=False), jit_compile=model.jit_compile)

    def call(x):
        found = run(x)
        wait(framework, found)
        return found

    return call


def operators(call: Callable[[], object]) -> int:
    """How many operators of PyTorch (`aten::`) a call runs, with those that run inside others."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name.startswith("aten::") for event in profile.events())


def gpu(framework: str) -> str | None:
    """Name of the GPU that the framework computes on; None where there is none, or this process does not have it."""
    module = sys.modules.get(framework)
    if framework == "tensorflow" and module and (found := module.config.list_physical_devices("GPU")):
        return module.config.experimental.get_device_details(found[0]).get("device_name", "GPU")
    if framework == "jax" and module and module.default_backend() == "gpu":
        return module.devices()[0].device_kind
    if framework == "torch" and module and module.cuda.is_available():
        return module.cuda.get_device_name()
    return None


def gpu_memory(framework: str) -> int:
    """Peak bytes that the framework took on a GPU; 0 where it uses none."""
    if gpu(framework) is None:
        return 0
    module = sys.modules[framework]
    if framework == "tensorflow":
        return module.config.experimental.get_memory_info("GPU:0")["peak"]
    if framework == "jax":
        return module.devices()[0].memory_stats()["peak_bytes_in_use"]
    return module.cuda.max_memory_allocated()


def tf32(framework: str) -> str | None:
    """Where the framework computes in TF32, of 10 bits, when float32 is asked for; None without a GPU."""
    if gpu(framework) is None:
        return None
    module = sys.modules[framework]
    if framework == "tensorflow":
        return "all" if module.config.experimental.tensor_float_32_execution_enabled() else "none"
    if framework == "jax":
        # None is XLA's default: TF32 on every GPU that has it.
        return module.config.jax_default_matmul_precision or "all"
    convolutions, products = module.backends.cudnn.allow_tf32, module.backends.cuda.matmul.allow_tf32
    return {(1, 1): "all", (1, 0): "convolutions", (0, 1): "products", (0, 0): "none"}[convolutions, products]
