import csv
import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.helpers import note
from training import augment, data, memory, schedules, train
from training.__main__ import RECIPES
from training.config import Config

TINY = ["--epochs", "2", "--alpha", "0.1", "--stem-stride", "2"]


def command(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "training", *arguments], capture_output=True, text=True, cwd=cwd)


def test_the_command_leaves_a_complete_run_folder(tmp_path):
    done = command(*TINY, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "val_accuracy" in done.stdout
    assert "test accuracy" in done.stdout
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "history.csv", "metrics.json", "curves.png", "model.keras", "saved_model"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["backend"] == keras.backend.backend()
    assert metrics["versions"]["keras"] == keras.__version__
    assert metrics["saved_model_largest_difference"] <= 1e-4
    assert 0 <= metrics["test_accuracy"] <= 1
    assert metrics["seconds"] >= metrics["fit_seconds"] > 0
    with open(tmp_path / "run" / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 0.1
    loaded = keras.models.load_model(tmp_path / "run" / "model.keras")
    test = data.load("digits", 32).test
    found = (loaded.predict(test.images, verbose=0).argmax(1) == test.labels.argmax(1)).mean()
    assert found == pytest.approx(metrics["test_accuracy"])


@pytest.mark.slow
def test_int8_after_quantisation_aware_training_is_within_half_a_point_of_float(tmp_path):
    done = command("digits", "--quantize-epochs", "5", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    found = {name: metrics[f"{name}_tflite_test_accuracy"] for name in ("float32", "int8", "int8_aware")}
    for name, accuracy in found.items():
        note(f"digits, test accuracy of the LiteRT file, {name}", accuracy)
    assert found["float32"] == pytest.approx(metrics["test_accuracy"], abs=0.003)
    assert found["float32"] >= 0.97
    assert found["int8_aware"] >= found["float32"] - 0.005


@pytest.mark.parametrize("own", [None, "glibc.malloc.arena_max=2"])
def test_the_command_starts_again_with_large_pages(own, monkeypatch):
    started = []
    monkeypatch.setattr(memory.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(memory.sys, "argv", ["__main__.py", "digits", "--epochs", "1"])
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    memory.use_large_pages("training")
    if own:
        assert not started
        assert memory.os.environ["GLIBC_TUNABLES"] == own
    else:
        assert started == [(sys.executable, [sys.executable, "-m", "training", "digits", "--epochs", "1"])]
        assert memory.os.environ["GLIBC_TUNABLES"] == memory.TUNABLES


def test_help_lists_the_recipes_and_every_field():
    shown = command("--help").stdout
    for recipe in RECIPES:
        assert f"{recipe}:" in shown
    for field in Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["paper2"], "recipe must be one of"), (["--dataset", "cats"], "dataset must be"), (["--alpha", "0"], "alpha")],
)
def test_a_bad_command_ends_in_one_sentence(arguments, message, tmp_path):
    done = command(*arguments, cwd=None)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "old.txt").write_text("old")
    done = command(*TINY, "--run-dir", str(tmp_path))
    assert done.returncode != 0
    assert "run_dir must be a new or empty folder" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


def test_the_split_is_fixed_and_disjoint():
    first, second = data.load("digits", 32), data.load("digits", 32)
    assert [len(s.labels) for s in (first.train, first.validation, first.test)] == [1257, 180, 360]
    assert np.array_equal(first.test.images, second.test.images)
    assert first.train.images.shape[1:] == (32, 32, 1)
    assert 0 <= first.train.images.min() < first.train.images.max() <= 256
    prints = [{image.tobytes() for image in s.images} for s in (first.train, first.validation, first.test)]
    assert not prints[0] & prints[2]
    assert not prints[1] & prints[2]


def test_batches_hold_every_image_once_in_a_new_order_each_epoch():
    split = data.Split(np.arange(10.0)[:, None], np.arange(10))
    batches, again = (data.Batches(split, 4, seed=3) for _ in range(2))
    orders = []
    for _ in range(2):
        labels = np.concatenate([batches[i][1] for i in range(len(batches))])
        assert np.array_equal(labels, np.concatenate([again[i][1] for i in range(len(again))]))
        assert sorted(labels) == list(range(10))
        orders.append(labels.tolist())
        batches.on_epoch_begin(), again.on_epoch_begin()
    assert orders[0] != orders[1]


def test_small_shifts_change_the_images_and_keep_their_range():
    config = RECIPES["digits"].CONFIG
    images = data.load("digits", 32).train.images[:16]
    changed = keras.ops.convert_to_numpy(augment.small_shifts(config)(images))
    assert changed.shape == images.shape
    assert np.abs(changed - images).mean() > 1
    assert changed.min() >= -1
    assert changed.max() <= 257


def test_the_learning_rate_warms_up_and_falls_to_zero():
    schedule = schedules.warmup_cosine(0.1, steps=100, warmup_steps=10)
    rates = [float(keras.ops.convert_to_numpy(schedule(step))) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.05, 0], abs=1e-3)


def test_json_files_are_moved_into_place(tmp_path):
    train.write_json(tmp_path / "a.json", {"b": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):
        train.write_json(tmp_path / "a.json", {("not", "a key"): 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
