import errno
import io
import os
import pickle

import keras
import numpy as np
import pytest

from training import checkpoints
from training.checkpoints import Checkpoint, Folder


def compiled_model(units=3):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(units)])
    model.compile(keras.optimizers.AdamW(0.1, use_ema=True), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, steps, rng):
    for _ in range(steps):
        model.train_on_batch(rng.normal(size=(8, 4)), rng.normal(size=(8, 3)))


def small_checkpoint():
    arrays = {"weights/0000": np.arange(6, dtype="float32").reshape(2, 3), "seeds/0000": np.array([1, 2], "uint32")}
    return Checkpoint(arrays, {"phase": "history", "epoch": 2, "history": {"loss": [0.1, 1 / 3]}})


def assert_equal(found, expected):
    assert found.place == expected.place
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype


def test_a_model_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    model = compiled_model()
    train(model, 3, np.random.default_rng(0))
    state = Checkpoint.decode(checkpoints.take(model, [], {"phase": "history"}).encode())
    other = compiled_model()
    checkpoints.put(other, state)
    for one in (model, other):
        train(one, 3, np.random.default_rng(1))
    a, b = (checkpoints.take(one, [], {}) for one in (model, other))
    assert {name.split("/")[0] for name in a.arrays} == {"weights", "seeds", "optimizer"}
    assert_equal(b, a)


def test_a_checkpoint_of_another_model_changes_nothing():
    state = checkpoints.take(compiled_model(), [], {})
    other = compiled_model(units=5)
    before = checkpoints.take(other, [], {})
    with pytest.raises(
        ValueError, match="must have the 2 weights of this model in their shapes, got 2 of other shapes"
    ):
        checkpoints.put(other, state)
    assert_equal(checkpoints.take(other, [], {}), before)


def test_a_damaged_checkpoint_is_never_taken_for_whole(rng):
    whole = small_checkpoint()
    content = whole.encode()
    assert_equal(Checkpoint.decode(content), whole)
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            Checkpoint.decode(content[:length])
    for place in rng.permutation(len(content))[:400]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match="no whole checkpoint"):
            Checkpoint.decode(bytes(damaged))


def test_a_checkpoint_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    buffer = io.BytesIO()
    np.savez(buffer, place=np.array([Evil()], dtype=object))
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(ValueError, match="pickle"):
            Checkpoint.decode(checkpoints._hash(content) + content)
    assert not (tmp_path / "made").exists()


def test_the_last_few_are_kept_and_a_torn_one_falls_back(tmp_path, capsys):
    folder = Folder(tmp_path / "checkpoints", keep=3)
    assert folder.newest() is None
    for epoch in range(5):
        folder.write(Checkpoint({}, {"epoch": epoch}))
    assert folder.numbers() == [3, 4, 5]
    newest = folder.file(5)
    newest.write_bytes(newest.read_bytes()[:100])
    folder.file(4).write_bytes(b"")
    assert folder.newest().place == {"epoch": 2}
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == [str(newest), str(folder.file(4))]
    assert all("the one before is taken" in line for line in told)
    # What is written next is newer than what was damaged.
    folder.write(Checkpoint({}, {"epoch": 9}))
    assert folder.newest().place == {"epoch": 9}
    folder.remove()
    assert not folder.path.exists()


def test_a_failed_write_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    folder = Folder(tmp_path / "checkpoints", keep=1)
    folder.write(Checkpoint({}, {"epoch": 0}))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"00000002\.checkpoint could not be written: No space left on device\.$"):
        folder.write(Checkpoint({}, {"epoch": 1}))
    monkeypatch.undo()
    assert [path.name for path in folder.path.iterdir()] == ["00000001.checkpoint"]
    assert folder.newest().place == {"epoch": 0}


def test_a_run_folder_that_has_vanished_is_not_made_again(tmp_path):
    folder = Folder(tmp_path / "run" / "checkpoints")
    with pytest.raises(OSError, match="could not be written: No such file or directory"):
        folder.write(small_checkpoint())
    assert not (tmp_path / "run").exists()
