import dataclasses
import json
import shutil
import signal

import keras
import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.conftest import once
from training.data import sets
from training.parallel import engines
from training.parallel.channel import Channel
from training.recipes import digits
from training.run import train
from training.state import lock, run_folder
from training.state.signals import Stop, Stopped


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on class folders that was stopped after two steps: its data set and its folder."""
    folder, rng = tmp_path_factory.mktemp("stopped"), np.random.default_rng(0)
    for part, number in (("train", 8), ("test", 2)):
        for label in ("a", "b"):
            (folder / "photos" / part / label).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (32, 32, 3), "uint8")
                Image.fromarray(pixels).save(folder / "photos" / part / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        runs.signal_after(patch, 0, 2, signal.SIGTERM)
        with pytest.raises(Stopped):
            train.run(settings(folder))
    return folder


def settings(folder, **changes):
    return runs.settings(str(folder / "photos"), folder / "run", **{"batch_size": 4, "steps_per_epoch": 3, **changes})


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "copy")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "or resume given to go on in it"),
        ({"resume": True, "recipe": "digits"}, "holds a run of the recipe 'cifar10', not of 'digits'"),
        ({"resume": True, "learning_rate": 0.5}, "can only go on as it was: learning_rate was 0.0005 and is 0.5"),
        ({"resume": True, "seed": 3, "epochs": 4}, "epochs was 2 and is 4, seed was 0 and is 3"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_stays_as_it_was(changes, message, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as caught:
        train.run(settings(folder, **changes))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    for content in (None, "{"):
        if content:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="run_dir must be new or the folder of a run to go on"):
            run_folder.look(runs.settings("digits", tmp_path, resume=True))
    assert (tmp_path / "thesis.txt").read_text() == "all my work"


@pytest.mark.parametrize("change", ["one more", "another size", "a new name"])
def test_a_data_set_that_has_changed_is_refused(change, folder):
    image = folder / "photos" / "train" / "a" / "3.png"
    if change == "one more":
        shutil.copy(image, image.with_name("more.png"))
        message = "training data differ: there were 16 images and are 17 images"
    elif change == "another size":
        Image.new("RGB", (40, 40)).save(image)
        message = "training data differ: they are 16 images as before, but others"
    else:
        image.rename(image.with_name("33.png"))
        message = "training data differ: they are 16 images as before, but others"
    before = contents(folder / "run")
    with pytest.raises(ValueError, match=f"dataset must be what it was when the run stopped: the {message}"):
        train.run(settings(folder, resume=True))
    assert contents(folder / "run") == before


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(folder):
    with lock.held(folder / "run"):
        before = contents(folder)
        with pytest.raises(ValueError, match=r"but .*run is held by process"):
            train.run(settings(folder, resume=True))
        assert contents(folder) == before


def test_a_run_that_another_process_has_just_completed_is_not_started_anew(folder, monkeypatch):
    looks = iter([None, {"test_accuracy": 1.0}])
    monkeypatch.setattr(run_folder, "look", lambda config: next(looks))
    before = contents(folder)
    with pytest.raises(ValueError, match="has just been completed by another process"):
        train.run(settings(folder, resume=True))
    assert contents(folder) == before


def test_a_folder_with_nothing_but_a_lock_is_empty(tmp_path):
    (tmp_path / lock.NAME).write_text("")
    assert run_folder.look(runs.settings("digits", tmp_path)) is None


def test_runs_that_start_within_a_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "now")
    name = f"digits-{keras.backend.backend()}-now"
    with run_folder.claimed(digits.CONFIG) as first, run_folder.claimed(digits.CONFIG) as second:
        assert [str(one.run_dir) for one in (first, second)] == [f"runs/{name}", f"runs/{name}-2"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{}.checkpoint", r"written by another version of keras_mnv2 \(format 1, this one reads 2\)"),
        ("{}.v9.safetensors", r"written by another version of keras_mnv2 \(format 9, this one reads 2\)"),
        (None, "damaged"),
    ],
)
def test_a_run_without_a_checkpoint_that_can_be_read_is_not_started_anew(name, why, folder):
    for path in (folder / "run" / "checkpoints").iterdir():
        if name is None:
            path.write_bytes(b"torn")
        else:
            path.rename(path.with_name(name.format(path.name.partition(".")[0])))
    before = contents(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"no checkpoint that the run .*, since .* is {why}: ") as caught:
            train.run(settings(folder, resume=True))
        assert "\n" not in str(caught.value)
        after = contents(folder)
        assert sorted(after.values()) == sorted(before.values())
        assert name is None or after == before


@once
def test_what_does_not_change_the_result_may_change(folder):
    (folder / "photos").rename(folder / "moved")
    changes = {"resume": True, "workers": 3, "checkpoint_seconds": 5.0, "keep_checkpoints": 1}
    config = dataclasses.replace(settings(folder, **changes), dataset=str(folder / "moved"))
    assert train.run(config)["test_images"] == 4


@once
def test_a_resume_without_a_run_starts_one(folder):
    config = settings(folder, resume=True)
    config = dataclasses.replace(config, run_dir=folder / "new")
    assert train.run(config)["test_images"] == 4
    assert json.loads((folder / "new" / "config.json").read_text())["recipe"] == "cifar10"


@once
def test_a_torn_checkpoint_costs_no_more_than_its_steps(folder, capsys):
    newest = max((folder / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    train.run(settings(folder, resume=True))
    output = capsys.readouterr().out
    assert f"{newest} is no whole checkpoint: the one before is taken" in output
    assert "Goes on after step 0 in epoch 1" in output


class Second(Channel):
    """Two workers, of which the other has another data set."""

    def gather(self, content):
        other = json.loads(content)
        other["test"] = "5 images, abc"
        return [content, json.dumps(other).encode()]


def test_workers_with_other_data_are_refused(tmp_path):
    dataset = sets.load("digits", 32)
    with pytest.raises(
        ValueError, match="same for all workers: for worker 1 the test data differ: there were 360 images"
    ):
        run_folder.open_run(
            dataclasses.replace(digits.CONFIG, run_dir=tmp_path / "run"), engines.ONE_DEVICE, Second(), Stop(), dataset
        )
    assert not (tmp_path / "run").exists()


def test_a_run_counts_its_seconds_over_all_starts(tmp_path):
    run = run_folder.Run(digits.CONFIG, tmp_path, engines.ONE_DEVICE, Channel(), Stop(), None, before=100.0)
    assert 100 <= run.seconds < 101
    assert run.position("history", 1, 2)["seconds"] >= 100
