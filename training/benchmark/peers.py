"""Implementations other than Keras that the benchmark measures, and the machine's matrix product.

Each is a function from a `Spec` to a call without arguments that runs the network once, from NumPy arrays to
NumPy arrays as `predict_on_batch` does, or one training step. Frameworks are imported inside, so that a process
holds only its own.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import frameworks

# Of the matrices. A product of the smaller ones is over before a GPU has been told of it.
PRODUCT_SIDE = 2048
GPU_PRODUCT_SIDE = 8192
# `host` is a training step too.
STEPS = ("training", "host")


@dataclass(frozen=True)
class Spec:
    """What a contender's process is told.

    Attributes:
        contender: its name.
        backend: Keras's, empty for a contender that is not a Keras model.
        mode: inference, latency, training, fit, host, build, growth, exports or accelerate.
        alpha: width multiplier.
        size: side of the images, in pixels.
        batch: images a call.
        fold: whether to fold the batch norms of keras_mnv2 for inference.
        folder: for temporary files; whoever starts the process removes it.
        path: of an exported file, or a whole model, that is run instead.
        precision: float32 or bfloat16, which is mixed: the weights are in float32.
        on_device: whether images and labels are put on the device once, and outputs stay there.
        threads: of the framework; None leaves its default.
        limit: seconds that the start, and each measurement, may take; None for no limit.
    """

    contender: str
    backend: str
    mode: str
    alpha: float
    size: int
    batch: int
    fold: bool
    folder: str
    path: str = ""
    precision: str = "float32"
    on_device: bool = False
    threads: int | None = None
    limit: float | None = None

    @property
    def framework(self) -> str:
        """Keras's backend; PyTorch for what is no Keras model."""
        return self.backend or "torch"

    @property
    def module(self) -> str:
        """Where a Keras model comes from."""
        return self.contender.removesuffix(" fit")

    @property
    def in_fit(self) -> bool:
        """Whether the steps are those of `model.fit`."""
        return bool(self.backend) and (self.mode == "fit" or self.contender.endswith(" fit"))

    @property
    def label(self) -> str:
        """Name for people."""
        return f"{self.contender}, {self.backend}" if self.backend else self.contender


def images(spec: Spec) -> np.ndarray:
    """Random images (NHWC, -1 to 1)."""
    return np.random.default_rng(0).uniform(-1, 1, (spec.batch, spec.size, spec.size, 3)).astype("float32")


def torchvision_eager(spec: Spec) -> Callable[[], object]:
    """torchvision's model in eager mode and channels-last memory, with a plain training loop."""
    import torch

    model = _torchvision_model(spec)
    if spec.mode not in STEPS:
        return _torch_inference(model.eval(), spec)
    device = frameworks.torch_device()
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x = _torch_images(spec)
    y = torch.arange(spec.batch, device=x.device) % 1000

    def step():
        optimizer.zero_grad()
        with _precision(spec):
            loss = torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        return loss.item()  # Waits for the device.

    return step


def torchvision_folded(spec: Spec) -> Callable[[], object]:
    """The same model with PyTorch's own folding of batch norms, in eager mode and channels-last memory."""
    from torch.fx.experimental.optimization import fuse

    return _torch_inference(fuse(_torchvision_model(spec).eval()), spec)


def _torchvision_model(spec: Spec) -> Any:
    import torch
    import torchvision

    frameworks.set_threads("torch", spec.threads)
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2(width_mult=spec.alpha)


def _torch_images(spec: Spec) -> Any:
    import torch

    x = torch.from_numpy(images(spec))
    # Permuted NHWC is channels-last memory.
    return (x.to(frameworks.torch_device()) if spec.on_device else x).permute(0, 3, 1, 2)


def _precision(spec: Spec) -> contextlib.AbstractContextManager:
    import torch

    if spec.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(frameworks.torch_device(), dtype=getattr(torch, spec.precision))


def _torch_inference(model: Any, spec: Spec) -> Callable[[], object]:
    import torch

    device = frameworks.torch_device()
    model = model.to(device, memory_format=torch.channels_last)
    x = _torch_images(spec)

    def infer():
        with torch.inference_mode(), _precision(spec):
            found = model(x.to(device))
        if not spec.on_device:
            return found.float().cpu().numpy()
        frameworks.wait("torch", found)
        return found

    return infer


def onnxruntime_session(spec: Spec) -> Callable[[], np.ndarray]:
    """torchvision's network as ONNX, run by ONNX Runtime."""
    import onnxruntime

    x = _nchw_images(spec)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = spec.threads or os.cpu_count()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(_convert(export_onnx, spec), settings, providers=providers)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def openvino_request(spec: Spec) -> Callable[[], np.ndarray]:
    """torchvision's network as ONNX, run by OpenVINO on the CPU: one request that has all cores."""
    import openvino

    x = _nchw_images(spec)
    # On some CPUs OpenVINO would compute in bfloat16 by default.
    settings: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if spec.threads:
        settings["INFERENCE_NUM_THREADS"] = spec.threads
    compiled = openvino.Core().compile_model(_convert(export_onnx, spec), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([x])[0]


def litert_interpreter(spec: Spec) -> Callable[[], np.ndarray]:
    """keras.applications' network as a LiteRT file, run by LiteRT on the CPU."""
    return litert_call(_convert(export_litert, spec), images(spec), spec.threads or os.cpu_count())


def litert_call(path: str, x: np.ndarray, threads: int | None) -> Callable[[], np.ndarray]:
    """One call of a LiteRT file for these images, whose tensors are allocated once."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(source, x.shape)
    interpreter.allocate_tensors()

    def infer():
        interpreter.set_tensor(source, x)
        interpreter.invoke()
        return interpreter.get_tensor(target)

    return infer


def _nchw_images(spec: Spec) -> np.ndarray:
    return np.ascontiguousarray(images(spec).transpose(0, 3, 1, 2))


def _convert(export: Callable[[Spec], str], spec: Spec) -> str:
    # In a process of its own: the converter's memory and threads are not the runtime's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(export, spec).result()


def export_onnx(spec: Spec) -> str:
    """Writes torchvision's network as ONNX with a fixed batch, and gives the path."""
    import onnxscript  # noqa: F401 (the exporter needs it: when it is missing, it is named)
    import torch

    path = Path(spec.folder) / f"{spec.contender}-{spec.mode}.onnx"
    x = torch.from_numpy(_nchw_images(spec))
    torch.onnx.export(_torchvision_model(spec).eval(), (x,), path, dynamo=True, verbose=False)
    return str(path)


def export_litert(spec: Spec) -> str:
    """Writes keras.applications' network as a LiteRT file, and gives the path."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow

    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2((spec.size, spec.size, 3), alpha=spec.alpha, weights=None)
    path = Path(spec.folder) / f"{spec.contender}-{spec.mode}"
    model.export(path, verbose=False)
    file = path.with_suffix(".tflite")
    # The converter's `from_keras_model` fails on Keras 3.
    file.write_bytes(tensorflow.lite.TFLiteConverter.from_saved_model(str(path)).convert())
    return str(file)


def product_side(gpu: str | None) -> int:
    """Side of the matrices of `matrix_product`."""
    return GPU_PRODUCT_SIDE if gpu else PRODUCT_SIDE


def matrix_product(spec: Spec) -> Callable[[], object]:
    """A product of two matrices by PyTorch, or in float32 by NumPy where that is missing: the machine's peak."""
    try:
        import torch
    except ModuleNotFoundError:
        if spec.precision != "float32":
            raise
        a, b = _matrices(PRODUCT_SIDE)
        return lambda: a @ b
    frameworks.set_threads("torch", spec.threads)
    side = product_side(frameworks.gpu("torch"))
    x, y = (frameworks.on_device("torch", a).to(getattr(torch, spec.precision)) for a in _matrices(side))

    def product():
        result = x @ y
        frameworks.wait("torch", result)
        return result

    return product


def _matrices(side: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, side, side)).astype("float32")
