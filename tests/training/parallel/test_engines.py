"""Several devices and processes: the same weights as one has, and ends that are clear."""

import json
import os
import signal
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from tests import runs
from tests.conftest import once
from tests.helpers import note
from training.parallel import engines
from training.parallel.channel import LOST
from training.run import train

BACKEND = keras.backend.backend()
# The variables with which something says that there are two processes.
LAUNCHES = {
    "torch": {"WORLD_SIZE": "2"},
    "jax": {"KERAS_DISTRIBUTION_NUM_PROCESSES": "2"},
    "tensorflow": {"TF_CONFIG": json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"index": 0}})},
}


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """What one worker has at the full batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train.run(runs.settings(dataset, folder))
    return runs.outcome(folder)


def assert_as_one(folder, alone, how):
    found = runs.outcome(folder)
    largest = runs.difference(found, alone)
    note(f"two {how}, largest difference of the weights from one worker's", largest)
    assert largest < 1e-4
    for row, expected in zip(found[1], alone[1], strict=True):
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), abs=1e-4), name


@once
def test_half_the_batch_alone_gives_other_weights(dataset, alone, tmp_path):
    train.run(runs.settings(dataset, tmp_path / "run", batch_size=32))
    assert runs.difference(runs.outcome(tmp_path / "run"), alone) > 1e-2


@pytest.mark.slow
def test_two_processes_train_as_one(dataset, alone, tmp_path):
    words = ["--processes", "2", *runs.flags(dataset, tmp_path / "run", devices=1)]
    output = runs.finish(runs.start("training.launch", words, BACKEND))
    assert output.count("Epoch 1/2") == 1
    assert_as_one(tmp_path / "run", alone, "processes")


@pytest.mark.slow
def test_two_devices_train_as_one(dataset, alone, tmp_path):
    process = runs.start("training", runs.flags(dataset, tmp_path / "run", devices=2), BACKEND)
    if BACKEND == "torch":
        assert "devices must be 1 on PyTorch" in runs.finish(process, 2)
        return
    assert f"cifar10 on {BACKEND} on 2 devices of 1 processes" in runs.finish(process)
    assert_as_one(tmp_path / "run", alone, "devices")


# That all stop after the same step they agree on by `Channel`, the same for each engine; how they end is the engine's.
@pytest.mark.slow
@pytest.mark.parametrize("stopped", [True, False], ids=["stopped and killed", "killed"])
def test_two_processes_that_are_stopped_and_killed_train_as_one(stopped, dataset, alone, tmp_path):
    changes = {"checkpoint_steps": 1, "checkpoint_seconds": 1000, "resume": True, "devices": 1}
    words = ["--processes", "2", *runs.flags(dataset, tmp_path / "run", **changes)]

    if stopped:
        launched = runs.start("training.launch", words, BACKEND)
        runs.read_until(launched, "2/5")
        start = time.monotonic()
        launched.send_signal(signal.SIGTERM)
        output = runs.finish(launched, 128 + signal.SIGTERM)
        note("seconds from SIGTERM to the end of two processes", time.monotonic() - start)
        assert time.monotonic() - start < 20
        assert "which is saved: the same command with --resume goes on." in output
        assert "has ended" not in output

    launched = runs.start("training.launch", words, BACKEND)
    output = runs.read_until(launched, "Epoch 2/2")
    assert f"cifar10 on {BACKEND} on 2 devices of 2 processes" in output
    assert output.count("Goes on after step") == stopped
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    victim = next(pid for pid in children if "KERAS_DISTRIBUTION_PROCESS_ID=1" in environment_of(pid))
    start = time.monotonic()
    os.kill(int(victim), signal.SIGKILL)
    output = runs.finish(launched, 128 + signal.SIGKILL)
    note("seconds from the end of one worker to that of the launch", time.monotonic() - start)
    assert time.monotonic() - start < 20
    assert "Worker 1 of 2 has ended, so worker 0 ends: the same command with --resume goes on" in output
    assert "Worker 1 was ended by SIGKILL, and with it the others." in output

    assert "Goes on after step" in runs.finish(runs.start("training.launch", words, BACKEND))
    assert_as_one(tmp_path / "run", alone, "processes, stopped and killed,")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["devices"] == 2
    assert metrics["test_images"] == 127
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"{metrics['test_accuracy']:.2%} of 127 images" in report


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(dataset, alone, tmp_path):
    launched = runs.start("training.launch", ["--processes", "2", *runs.flags(dataset, tmp_path / "run")], BACKEND)
    runs.read_until(launched, "2/5")
    launched.send_signal(signal.SIGTERM)
    runs.finish(launched, 128 + signal.SIGTERM)
    output = runs.finish(runs.start("training", [*runs.flags(dataset, tmp_path / "run"), "--resume"], BACKEND))
    assert "Goes on after step" in output
    assert_as_one(tmp_path / "run", alone, "processes, then one,")


def test_a_launch_that_this_backend_does_not_read_is_refused():
    engines.refuse_strangers(BACKEND, {})
    engines.refuse_strangers(BACKEND, {"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"})
    engines.refuse_strangers(BACKEND, {**LAUNCHES[BACKEND], "SLURM_STEP_NUM_TASKS": "2"})
    everything = {name: value for launch in LAUNCHES.values() for name, value in launch.items()}
    engines.refuse_strangers(BACKEND, everything)
    for backend, launch in LAUNCHES.items():
        if backend != BACKEND:
            (name,) = launch
            with pytest.raises(
                ValueError, match=rf"{BACKEND} in a launch of 2 processes \({name}, which .*{backend} reads"
            ):
                engines.refuse_strangers(BACKEND, launch)
    for name in engines.TASKS:
        with pytest.raises(ValueError, match="would train 3 models that know nothing of each other"):
            engines.refuse_strangers(BACKEND, {name: "3"})
    for name, value in (("WORLD_SIZE", "two"), ("TF_CONFIG", "{")):
        with pytest.raises(ValueError, match=f"{name} must say how many processes there are, got '{value}'"):
            engines.refuse_strangers(BACKEND, {name: value})


def test_a_stray_launch_is_refused_before_anything_is_written(dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match=r"a launch of 4 processes \(SLURM_STEP_NUM_TASKS\) would train 4 models"):
        train.run(runs.settings(dataset, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Replicas(engines.Engine):
    replicas = 4


@pytest.mark.parametrize(
    ("how", "batch", "rate", "warmup"), [("no", 64, 0.1, 1), ("linear", 256, 0.4, 5), ("sqrt", 256, 0.2, 5)]
)
def test_the_learning_rate_scales_with_the_devices(how, batch, rate, warmup, tmp_path):
    config = runs.settings("digits", tmp_path, learning_rate=0.1, scale_with_devices=how, warmup_epochs=1)
    found = train.scaled(config, Replicas())
    assert (found.batch_size, found.learning_rate, found.warmup_epochs) == (batch, pytest.approx(rate), warmup)
    assert train.scaled(config, engines.ONE_DEVICE) == config
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 devices, got 66"):
        train.scaled(runs.settings("digits", tmp_path, batch_size=66), Replicas())


def test_one_device_predicts_all_rows():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    np.testing.assert_allclose(engines.alone().predictor(model)(x), model.predict_on_batch(x))


def test_the_end_of_the_others_has_a_status_of_its_own():
    assert LOST not in (0, 1, 2, 128 + signal.SIGTERM)
