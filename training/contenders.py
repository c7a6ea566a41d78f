"""What the benchmark measures, each in a process of its own: `python -m training.contenders JSON`.

The process builds its contender, says that it is ready, and then, for each line of its input, runs it for
the asked seconds and answers with the seconds of each call. It is idle in between, so that contenders can
take turns.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

MODES = ("inference", "latency", "training")


def main() -> None:
    """Serves one contender over standard input and output."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not mix with the answers.

    def answer(**content) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        call, built = CONTENDERS[spec["contender"]](**{k: spec[k] for k in ("mode", "alpha", "size", "batch")})
    except ImportError as error:
        answer(missing=str(error))
        return
    for _ in range(3):
        call()
    answer(ready=True, build_seconds=built, start_seconds=time.perf_counter() - start)
    for line in sys.stdin:
        seconds, times = float(line), []
        call()  # Wakes the threads.
        while sum(times) < seconds or len(times) < 3:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        answer(times=times, peak_memory=peak)


def _images(size: int, batch: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype("float32")


def _keras_call(model, mode: str, size: int, batch: int) -> Callable[[], object]:
    import keras

    x, y = _images(size, batch), np.arange(batch) % 1000
    if mode != "training":
        return lambda: model.predict_on_batch(x)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy")
    return lambda: model.train_on_batch(x, y)


def keras_mnv2_model(mode: str, alpha: float, size: int, batch: int):
    """This package's model; numpy in and out, as `predict_on_batch` and `train_on_batch` take it."""
    import keras_mnv2

    start = time.perf_counter()
    model = keras_mnv2.MobileNetV2((size, size, 3), alpha=alpha, weights=None)
    return _keras_call(model, mode, size, batch), time.perf_counter() - start


def keras_applications(mode: str, alpha: float, size: int, batch: int):
    """Keras's own model, called in the same way."""
    import keras

    start = time.perf_counter()
    model = keras.applications.MobileNetV2((size, size, 3), alpha=alpha, weights=None)
    return _keras_call(model, mode, size, batch), time.perf_counter() - start


def torchvision_eager(mode: str, alpha: float, size: int, batch: int):
    """torchvision's model in eager mode and channels-last memory, with a plain training loop."""
    import torch
    import torchvision

    start = time.perf_counter()
    model = torchvision.models.mobilenet_v2(width_mult=alpha).to(memory_format=torch.channels_last)
    built = time.perf_counter() - start
    x, y = torch.from_numpy(_images(size, batch)).permute(0, 3, 1, 2), torch.arange(batch) % 1000
    if mode != "training":
        model.eval()

        def infer():
            with torch.inference_mode():
                return model(x).numpy()

        return infer, built
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, built


CONTENDERS = {
    "keras_mnv2": keras_mnv2_model,
    "keras.applications": keras_applications,
    "torchvision": torchvision_eager,
}

if __name__ == "__main__":
    main()
