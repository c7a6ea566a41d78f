"""Runs that stop and go on: bit for bit what an uninterrupted run gives."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from tests import runs
from tests.conftest import once, once_on
from tests.helpers import note
from training.run import fitting, optimizers, train, transfer
from training.state import checkpoints
from training.state.checkpoints import Checkpoints
from training.state.signals import Stopped

BACKEND = keras.backend.backend()
SLOW = pytest.mark.slow
# Whatever has a state: dropout, an average of the weights, early stopping, random changes by Keras's layers.
CHANGES = {"dropout": 0.2, "ema": 0.9, "early_stopping": 9, "erase": 0.2, "learning_rate": 0.02, "epochs": 3}


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.run(runs.settings(dataset, folder, **CHANGES))
    return runs.outcome(folder)


def stop_at(monkeypatch, config, epoch, step, number=signal.SIGTERM):
    """Runs until a signal in that step, and gives what the run says."""
    with monkeypatch.context() as patch:
        runs.signal_after(patch, epoch, step, number)
        with pytest.raises(Stopped) as caught:
            train.run(config)
    assert caught.value.signal == number
    return str(caught.value)


@pytest.mark.parametrize(
    ("epoch", "step"),
    [(1, 3), *(pytest.param(*at, marks=SLOW) for at in ((0, 1), (1, 5), (2, 5)))],
)
def test_a_stopped_run_goes_on_bit_for_bit(epoch, step, dataset, uninterrupted, monkeypatch, tmp_path, capsys):
    config = runs.settings(dataset, tmp_path / "run", resume=True, **CHANGES)
    told = stop_at(monkeypatch, config, epoch, step)
    assert told.startswith(f"Stopped after step {step} of 5 in epoch {epoch + 1}, which is saved")
    assert not (tmp_path / "run" / "model.keras").exists()
    capsys.readouterr()
    train.run(config)
    output = capsys.readouterr().out
    assert f"Goes on after step {step} in epoch {epoch + 1} of history, saved on {BACKEND}." in output
    assert output.count("Epoch ") == 3 - epoch
    runs.assert_same(runs.outcome(tmp_path / "run"), uninterrupted)
    assert not (tmp_path / "run" / "checkpoints").exists()
    # A third start has nothing to do.
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir())
    assert train.run(config)["test_images"] == 127
    assert "is complete" in capsys.readouterr().out
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()) == before


@SLOW
def test_a_run_can_stop_at_every_epochs_validation(dataset, uninterrupted, monkeypatch, tmp_path):
    config = runs.settings(dataset, tmp_path / "run", resume=True, checkpoint_seconds=1e6, **CHANGES)
    original = fitting.validate
    for epoch in range(3):

        def validate(*arguments):
            signal.raise_signal(signal.SIGINT)
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(fitting, "validate", validate)
            with pytest.raises(Stopped, match=f"after step 5 of 5 in epoch {epoch + 1}"):
                train.run(config)
    train.run(config)
    runs.assert_same(runs.outcome(tmp_path / "run"), uninterrupted)


@SLOW
def test_the_best_weights_of_an_early_stop_survive(dataset, monkeypatch, tmp_path):
    changes = {"learning_rate": 0.0, "epochs": 9, "early_stopping": 2, "steps_per_epoch": 2}
    train.run(runs.settings(dataset, tmp_path / "whole", **changes))
    config = runs.settings(dataset, tmp_path / "run", resume=True, **changes)
    stop_at(monkeypatch, config, 1, 1)
    stop_at(monkeypatch, config, 2, 1)
    train.run(config)
    found = runs.outcome(tmp_path / "run")
    runs.assert_same(found, runs.outcome(tmp_path / "whole"))
    # Nothing is learnt, so that the first epoch stays the best.
    assert len(found[1]) == 3


@SLOW
def test_a_transfer_goes_on_without_its_head_phase(dataset, monkeypatch, tmp_path):
    changes = {"head_epochs": 2, "unfreeze_from": "block_2", "optimizer": "adamw", "epochs": 1}
    train.run(runs.settings(dataset, tmp_path / "whole", **changes))
    config = runs.settings(dataset, tmp_path / "run", resume=True, **changes)
    stop_at(monkeypatch, config, 0, 3)
    monkeypatch.setattr(train, "head_phase", lambda *arguments: pytest.fail("the head was trained again"))
    found = train.run(config)
    runs.assert_same(runs.outcome(tmp_path / "run"), runs.outcome(tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert found["head_test_accuracy"] == whole["head_test_accuracy"]


@once
def test_the_features_of_a_head_are_computed_once(dataset, monkeypatch, tmp_path):
    changes = {"head_epochs": 2, "epochs": 0, "dropout": 0.2}
    monkeypatch.setattr(transfer, "FEATURE_BATCHES", 3)
    train.run(runs.settings(dataset, tmp_path / "whole", **changes))
    config = runs.settings(dataset, tmp_path / "run", resume=True, **changes)
    original, starts, signals = transfer.read_scores, [], []

    def read_scores(predict, batches, channel, start=0, until=None):
        if start == 6 and not signals:
            signals.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        starts.append((start, until))
        return original(predict, batches, channel, start, until)

    monkeypatch.setattr(transfer, "read_scores", read_scores)
    with pytest.raises(Stopped):
        train.run(config)
    assert starts == [(0, 3), (3, 6)]
    train.run(config)
    # The rest of eight training batches, those of the validation, and the test of the head.
    assert starts == [(0, 3), (3, 6), (6, 8), (0, 2), (0, None)]
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "whole"))
    assert found["head_test_accuracy"] == expected["head_test_accuracy"]
    loaded = [keras.models.load_model(tmp_path / name / "model.keras").get_weights() for name in ("run", "whole")]
    for a, b in zip(*loaded, strict=True):
        np.testing.assert_array_equal(a, b)


@SLOW
def test_a_head_on_changed_images_goes_on_too(dataset, monkeypatch, tmp_path):
    changes = {"head_epochs": 2, "cache_features": False, "unfreeze_from": "block_2", "epochs": 1}
    train.run(runs.settings(dataset, tmp_path / "whole", **changes))
    config = runs.settings(dataset, tmp_path / "run", resume=True, **changes)
    stop_at(monkeypatch, config, 1, 2)
    train.run(config)
    runs.assert_same(runs.outcome(tmp_path / "run"), runs.outcome(tmp_path / "whole"))
    tables = [(tmp_path / name / "head_history.csv").read_text().splitlines() for name in ("run", "whole")]
    assert [len(table) for table in tables] == [3, 3]


@SLOW
def test_quantisation_aware_training_goes_on(dataset, monkeypatch, tmp_path):
    changes = {"quantize_epochs": 1, "epochs": 1}
    train.run(runs.settings(dataset, tmp_path / "whole", **changes))
    config = runs.settings(dataset, tmp_path / "run", resume=True, **changes)
    whole = (tmp_path / "whole" / "quantize_history.csv").read_text().splitlines()
    # The first phase's signal comes again in the second one.
    stop_at(monkeypatch, config, 0, 4)
    train_again = fitting.fit

    def fit(run, config, phase, *arguments, **options):
        if phase == "history":
            return train_again(run, config, phase, *arguments, **options)
        with pytest.MonkeyPatch.context() as patch:
            runs.signal_after(patch, 0, 2)
            return train_again(run, config, phase, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", fit)
        with pytest.raises(Stopped, match="after step 2"):
            train.run(config)
    found = train.run(config)
    runs.assert_same(runs.outcome(tmp_path / "run"), runs.outcome(tmp_path / "whole"))
    row = (tmp_path / "run" / "quantize_history.csv").read_text().splitlines()[1]
    assert row.split(",")[:5] == whole[1].split(",")[:5]
    expected = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert found["int8_aware_tflite_test_accuracy"] == expected["int8_aware_tflite_test_accuracy"]


@once
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_weights(dataset, tmp_path):
    config = runs.settings(dataset, tmp_path / "run", learning_rate=1e30, checkpoint_steps=1)
    with pytest.raises(
        ValueError, match=r"(The loss is|A weight is no number).* after step (\d) of 5 in epoch 1"
    ) as caught:
        train.run(config)
    told = str(caught.value)
    assert "a smaller learning_rate than 1e+30 may help" in told
    assert told.endswith(f"are in {tmp_path / 'run' / 'last_good.keras'}.")
    good = keras.models.load_model(tmp_path / "run" / "last_good.keras")
    assert all(np.isfinite(weight).all() for weight in good.get_weights())
    newest = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert f"after step {newest.position['step']} in epoch 1" in told
    assert all(np.isfinite(array).all() for array in newest.group("weights"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "checkpoints", "last_good.keras"}


@once_on("tensorflow")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpoint_steps": 4, "checkpoint_seconds": 1e6}, [(0, 0), (0, 4), (1, 3), (0, 0)]),
        pytest.param({"checkpoint_seconds": 0.0, "epochs": 1}, [*((0, step) for step in range(6)), (0, 0)], marks=SLOW),
    ],
    ids=["steps", "seconds"],
)
def test_checkpoints_come_by_steps_and_by_seconds(changes, expected, dataset, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(
        Checkpoints,
        "write",
        lambda self, checkpoint: written.append((checkpoint.position["epoch"], checkpoint.position["step"])),
    )
    train.run(runs.settings(dataset, tmp_path / "run", **changes))
    assert written == expected


def test_a_checkpoint_costs_little(dataset, tmp_path):
    """The state of the whole network at full width with two slots a weight."""
    from keras_mnv2 import MobileNetV2

    model = MobileNetV2(weights=None)
    config = runs.settings(dataset, tmp_path, optimizer="adamw")
    means = optimizers.compile_model(model, config, 10)
    folder = Checkpoints(tmp_path / "checkpoints")
    start = time.perf_counter()
    state = checkpoints.take(model, [variable for metric in means for variable in metric.variables], {})
    taken = time.perf_counter()
    path = folder.write(state)
    note("seconds to take the state of MobileNetV2 1.0 with AdamW", taken - start)
    note("seconds to write it", time.perf_counter() - taken)
    assert path.stat().st_size == pytest.approx(3 * 4 * 3_504_872, rel=0.02)


def killed(words, folder, kills, chance):
    """Runs to the end, with at most so many SIGKILLs at random moments, and gives where the checkpoints were then."""
    places = []
    while len(places) < kills:
        process = runs.start("training", words, BACKEND)
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0.5, 5))
        else:
            steps, output = chance.randint(1, 2), ""
            while output.count("/step") < steps and (part := process.stdout.read(1)):
                output += part
            time.sleep(chance.uniform(0, 0.5))
        if process.poll() is not None:
            runs.finish(process)
            break
        process.kill()
        process.communicate()
        newest = Checkpoints(folder / "checkpoints").newest()
        places.append((newest.position["epoch"], newest.position["step"]) if newest else None)
    runs.finish(runs.start("training", words, BACKEND))
    return places


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(2, 1), (24, 2)],
    ids=["a few", "many"],
)
@SLOW
def test_a_killed_run_ends_as_if_it_had_not_been(kills, seed, dataset, uninterrupted, tmp_path):
    chance, places = random.Random(seed), []
    for number in range(kills):
        folder = tmp_path / str(number)
        words = [*runs.flags(dataset, folder, checkpoint_steps=2, **CHANGES), "--resume"]
        places += killed(words, folder, min(6, kills - len(places)), chance)
        runs.assert_same(runs.outcome(folder), uninterrupted)
        if len(places) >= kills:
            break
    note(f"kills, after {places}", len(places))
    assert len(places) >= kills


@SLOW
def test_a_run_goes_from_one_backend_to_the_next(dataset, tmp_path):
    changes = {"dataset": dataset, "ema": 0.9}
    relay, alone = str(tmp_path / "relay"), str(tmp_path / "alone")
    for backend, stop in (("tensorflow", (0, 3)), ("jax", (1, 2)), ("torch", None)):
        settings = {**changes, "run_dir": relay, "resume": True, "stop": stop}
        output = runs.finish(runs.start("tests.runs", [json.dumps(settings)], backend))
    assert "Goes on after step 2 in epoch 2 of history, saved on jax." in output
    runs.finish(runs.start("tests.runs", [json.dumps({**changes, "run_dir": alone})], "torch"))
    relayed, expected = runs.outcome(relay), runs.outcome(alone)
    largest = runs.difference(relayed, expected)
    note("relay over three backends, largest difference of the weights from PyTorch's alone", largest)
    assert largest < 1e-4
    for row, other in zip(relayed[1], expected[1], strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)


# A file system of its own, with so many kilobytes, in which the command runs; then it grows, and the run goes on.
SMALL_DISK = """
mount -t tmpfs -o size={size}k tmpfs {folder} || exit 99
{command}; code=$?
echo "== code $code"; ls {folder}/run {folder}/run/checkpoints
mount -o remount,size=100m {folder} || exit 99
{command} --resume && cp {folder}/run/model.keras {folder}/run/history.csv {out}
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on(dataset, uninterrupted, tmp_path):
    folder, out = tmp_path / "disk", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    words = runs.flags(dataset, folder / "run", checkpoint_steps=1, keep_checkpoints=2, **CHANGES)
    command = " ".join([sys.executable, "-m", "training", *words])
    script = SMALL_DISK.format(size=1000, folder=folder, out=out, command=command)
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert "== code 1" in done.stdout, done.stdout + done.stderr
    assert "could not be written: No space left on device." in done.stderr
    listed = done.stdout.partition("== code 1")[2].partition("Goes on")[0]
    assert "part_" not in listed
    assert ".safetensors" in listed
    assert done.returncode == 0, done.stderr
    runs.assert_same(runs.outcome(out), uninterrupted)


@once_on("tensorflow")
def test_a_vanished_run_folder_ends_in_a_sentence(dataset, monkeypatch, tmp_path):
    original = fitting.Step.on_train_batch_begin

    def begin(self, batch, logs=None):
        original(self, batch, logs)
        if batch == 2:
            os.rename(tmp_path / "run", tmp_path / "elsewhere")

    monkeypatch.setattr(fitting.Step, "on_train_batch_begin", begin)
    with pytest.raises(OSError, match="could not be written: No such file or directory"):
        train.run(runs.settings(dataset, tmp_path / "run", checkpoint_steps=1))
    assert not (tmp_path / "run").exists()
    assert Checkpoints(tmp_path / "elsewhere" / "checkpoints").newest().position["step"] == 2


def test_a_run_folder_that_cannot_be_written_ends_in_a_sentence(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written: Not a directory"):
        train.run(runs.settings(dataset, tmp_path / "file" / "run"))


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_a_line_and_status_130(dataset, tmp_path):
    process = runs.start("training", runs.flags(dataset, tmp_path / "run", epochs=50), BACKEND)
    runs.read_until(process, "Epoch 2/50")
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    output = runs.finish(process, 130)
    note("seconds from Ctrl-C to the end", time.monotonic() - start)
    assert time.monotonic() - start < 20
    assert "which is saved: the same command with --resume goes on." in output
    assert "Traceback" not in output
