"""What the benchmark measures, each in a process of its own: `python -m training.benchmark.contenders JSON`.

The process builds its contender, says that it is ready, and then, for each line of its input, runs it for
the asked seconds and answers with the seconds of each call. It is idle in between, so that contenders can
run in interleaved rounds.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import frameworks, peers
from .peers import Spec, images

FIT_STEPS = 8
FORWARD = ("inference", "latency", "growth", "accelerate")
KERAS = ("keras_mnv2", "keras.applications")
# In the mode `accelerate`: runtimes, and the end of the name of one that is called without `accelerate`.
ACCELERATED = ("openvino", "onnxruntime", "litert")
BY_HAND = " by hand"
# In the mode `host`: the same step, inside `fit`.
IN_FIT = "keras_mnv2 fit"
# The others, and the modes that each knows.
PEERS = {
    "torchvision": (peers.torchvision_eager, ("inference", "latency", *peers.STEPS)),
    "torchvision-folded": (peers.torchvision_folded, ("inference", "latency")),
    "onnxruntime": (peers.onnxruntime_session, ("inference", "latency")),
    "openvino": (peers.openvino_request, ("inference", "latency")),
    "litert": (peers.litert_interpreter, ("inference", "latency")),
    "matrix product": (peers.matrix_product, ("inference", "latency", "training", "fit")),
}
# They have no mixed precision.
FLOAT32_ONLY = ("onnxruntime", "openvino", "litert")


def main() -> None:
    """Serves one contender over standard input and output."""
    spec = Spec(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not mix with the answers.

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        serve(spec, answer)
    except ModuleNotFoundError as error:
        answer(missing=(error.name or str(error)).partition(".")[0])
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "no message")
        answer(failed=f"{type(error).__name__}: {first}")


def serve(spec: Spec, answer: Callable[..., None]) -> None:
    """Builds the contender, warms it up, and runs it for each line of the input."""
    start = time.perf_counter()
    call: Any
    facts: dict[str, Any]
    if spec.path:
        call, facts = file_call(spec), {}
    elif spec.mode == "accelerate" and spec.contender not in KERAS:
        call, facts = accelerated_call(spec), {}
    elif spec.backend:
        call, facts = keras_contender(spec)
    else:
        make: Any = PEERS[spec.contender][0]
        call, facts = make(spec), {}
    if spec.mode == "build":
        answer(**facts)
        return
    first = time.perf_counter()
    call(1) if spec.in_fit else call()
    facts["first_step_seconds"] = time.perf_counter() - first
    call()
    facts["start_seconds"] = time.perf_counter() - start
    facts["gpu"] = frameworks.gpu(spec.framework)
    facts["tf32"] = frameworks.tf32(spec.framework) if spec.precision == "float32" else None
    if spec.mode == "host" and spec.framework == "torch":
        facts["aten_calls"] = calls_of_a_step(call, spec)
    answer(**facts)
    for line in sys.stdin:
        call()  # Wakes the threads.
        times: list[Any] = []
        end = time.perf_counter() + float(line)
        while time.perf_counter() < end or len(times) < 3:
            before = time.perf_counter()
            found = call()
            # A fit times its own steps. What another call gives may be a number too: torchvision's loss.
            times.append(found if spec.in_fit else time.perf_counter() - before)
        memory = {"peak_memory": process_memory("VmHWM"), "device_memory": frameworks.gpu_memory(spec.framework)}
        answer(times=times, **memory)


def calls_of_a_step(call: Callable, spec: Spec) -> int:
    """PyTorch's operators in one step; in a fit, what a third step adds to two."""
    if spec.in_fit:
        return frameworks.operators(lambda: call(3)) - frameworks.operators(lambda: call(2))
    return frameworks.operators(call)


def keras_contender(spec: Spec) -> tuple[Callable, dict]:
    """The call of a Keras model, and what its start took: seconds and resident memory."""
    frameworks.set_threads(spec.framework, spec.threads)
    keras = importlib.import_module("keras")
    if spec.precision != "float32":
        keras.config.set_dtype_policy(f"mixed_{spec.precision}")
    start = time.perf_counter()
    importlib.import_module(spec.module)
    facts = {"import_seconds": time.perf_counter() - start}
    if spec.mode == "growth":
        # What a framework loads at its first call depends on neither batch nor size.
        small = replace(spec, size=32, batch=1)
        keras_call(keras_model(small), small)()
    facts["resident_memory"] = process_memory("VmRSS")
    start = time.perf_counter()
    model = keras_model(spec)
    facts["build_seconds"] = time.perf_counter() - start
    return keras_call(model, spec), facts


def keras_model(spec: Spec) -> Any:
    """keras.applications' model or ours; ours without batch norms where only forward passes are wanted."""
    module = importlib.import_module(spec.module)
    model = module.MobileNetV2((spec.size, spec.size, 3), alpha=spec.alpha, weights=None)
    fold = spec.contender == "keras_mnv2" and spec.fold and spec.mode in FORWARD
    return module.fold_batch_norm(model) if fold else model


def keras_call(model: Any, spec: Spec) -> Callable:
    """One prediction or training step; or a short fit of so many steps, which gives the seconds of one.

    It starts from NumPy arrays, or from tensors that are on the device.
    """
    import keras

    x, y = images(spec), np.arange(spec.batch) % 1000
    if spec.in_fit:
        x, y = np.concatenate([x] * FIT_STEPS), np.concatenate([y] * FIT_STEPS)
    if spec.on_device:
        x, y = frameworks.on_device(spec.framework, x), frameworks.on_device(spec.framework, y)
    if spec.mode in FORWARD:
        run = frameworks.forward(spec.framework, model) if spec.on_device else model.predict_on_batch
        return lambda: run(x)
    optimizer, loss = keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy"
    model.compile(optimizer, loss, metrics=["accuracy"] if spec.mode == "fit" else None)
    if not spec.in_fit:

        def step():
            # It waits for the loss, which is no time.
            model.train_on_batch(x, y)

        return step
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))

    def fit(steps: int = FIT_STEPS) -> float:
        # From the end of the first step: what comes before is paid once a fit.
        ends.clear()
        rows = steps * spec.batch
        model.fit(x[:rows], y[:rows], batch_size=spec.batch, verbose=0, callbacks=[clock])
        return float(np.median(np.diff(ends))) if steps > 1 else 0.0

    return fit


def file_call(spec: Spec) -> Callable[[], object]:
    """One prediction of an exported file in its own runtime, or of a whole Keras model as it is."""
    import keras

    import keras_mnv2

    x = images(spec)
    if spec.path.endswith(".keras"):
        model = keras.models.load_model(spec.path, compile=False)
        return lambda: model.predict_on_batch(x)
    run = keras_mnv2.load_export(spec.path)
    return lambda: run(x)


def accelerated_call(spec: Spec) -> Callable[[], object]:
    """One prediction through `keras_mnv2.accelerate`, or of the same file by the runtime's own functions."""
    import keras

    import keras_mnv2

    keras.utils.set_random_seed(0)
    model = keras_mnv2.MobileNetV2((spec.size, spec.size, 3), alpha=spec.alpha, weights=None)
    x, name = images(spec), spec.contender.removesuffix(BY_HAND)
    if not spec.contender.endswith(BY_HAND):
        fast = keras_mnv2.accelerate(model, name)
        return lambda: fast.predict_on_batch(x)
    format, suffix = {
        "openvino": ("openvino", ".xml"),
        "onnxruntime": ("onnx", ".onnx"),
        "litert": ("litert", ".tflite"),
    }[name]
    path = Path(spec.folder) / f"{spec.backend}-{spec.batch}{suffix}"
    keras_mnv2.export(model, path, format, overwrite=True, verbose=False)
    if name == "onnxruntime":
        session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"image": x})
    if name == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        compiled = importlib.import_module("openvino").Core().compile_model(path, "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer([x], share_inputs=True)[0]
    return peers.litert_call(str(path), x, os.cpu_count())


def process_memory(field: str) -> int:
    """Bytes of this process: its peak (`VmHWM`) or what it holds now (`VmRSS`).

    Without Linux's /proc both are the peak that getrusage knows.
    """
    try:
        # Not getrusage: on Linux its peak starts at that of the parent.
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
