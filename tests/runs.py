"""Small runs of the training, in this process or in others: `python -m tests.runs JSON` is one."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np

# Compiled in seconds; at a two-hundredth of the recipe's rate, two ways of adding stay within rounding of each other.
SETTINGS = {
    "image_size": 32,
    "alpha": 0.35,
    "stages": ((1, 16, 1, 1), (6, 24, 1, 2), (6, 32, 1, 2)),
    "learning_rate": 5e-4,
    "warmup_epochs": 0.0,
    "epochs": 2,
    "batch_size": 64,
    "steps_per_epoch": 5,
    "dropout": 0.0,
    "saved_model": False,
}
# Of each epoch's row, what depends on the machine's speed.
TIMES = ("seconds", "waiting", "images_per_second")


def write_blocks(path):
    """The blocks of the recorded losses as a data set of 512 training and 127 test images."""
    from tests.golden.record_losses import blocks

    split = blocks()
    images, labels = split.images.astype("uint8"), split.labels
    np.savez(path, x_train=images[:512], y_train=labels[:512], x_test=images[512:639], y_test=labels[512:639])
    return str(path)


def settings(dataset, run_dir, **changes):
    """A `Config` of the recipe cifar10 (SGD with momentum, crops and flips), made small."""
    from training.recipes import cifar10

    return dataclasses.replace(cifar10.CONFIG, dataset=dataset, run_dir=Path(run_dir), **{**SETTINGS, **changes})


def flags(dataset, run_dir, **changes):
    """The same as words of a command line."""
    words = ["cifar10", "--dataset", dataset, "--run-dir", str(run_dir)]
    for name, value in {**SETTINGS, **changes}.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, np.ravel(value).tolist() if isinstance(value, tuple) else [value])]
    return words


def start(module, words, backend, **environment):
    """Starts `python -m module ...` as a process, whose two streams are read as one text."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0, seconds=300):
    """Waits for a process, and gives what it printed."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


def read_until(process, text):
    """Reads what a process prints until `text` appears, and gives it."""
    output = ""
    while text not in output:
        part = process.stdout.read(1)
        assert part, output
        output += part
    return output


def outcome(run_dir):
    """The weights of a run's model by their names, and the rows of its history without the times."""
    with (
        zipfile.ZipFile(Path(run_dir) / "model.keras") as archive,
        io.BytesIO(archive.read("model.weights.h5")) as file,
    ):
        weights = {}
        h5py.File(file).visititems(
            lambda name, item: weights.__setitem__(name, item[()]) if isinstance(item, h5py.Dataset) else None
        )
    with open(Path(run_dir) / "history.csv") as table:
        rows = list(csv.DictReader(table))
    return weights, [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same(found, expected):
    """Two outcomes are equal, bit for bit."""
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, weight in expected[0].items():
        np.testing.assert_array_equal(found[0][name], weight, err_msg=name)


def difference(found, expected):
    """The largest difference of the weights of two outcomes."""
    assert found[0].keys() == expected[0].keys()
    return max(float(np.abs(found[0][name] - weight).max()) for name, weight in expected[0].items())


def signal_after(monkeypatch, epoch, step, number=signal.SIGTERM):
    """The process gets a signal within a step, as if from outside; the run ends after it."""
    from training.run.fitting import Step

    original = Step.on_train_batch_begin

    def begin(self, batch, logs=None):
        original(self, batch, logs)
        if (self.epoch, self.first + batch + 1) == (epoch, step):
            signal.raise_signal(number)

    monkeypatch.setattr(Step, "on_train_batch_begin", begin)


def main():
    """Runs what `settings` makes of a JSON object; with `stop`, an epoch and a step, only so far."""
    import pytest

    from training.run import train
    from training.state.signals import Stopped

    changes = json.loads(sys.argv[1])
    stop = changes.pop("stop", None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if stop:
            signal_after(monkeypatch, *stop)
        try:
            train.run(settings(**changes))
        except Stopped:
            assert stop
        else:
            assert not stop


if __name__ == "__main__":
    main()
