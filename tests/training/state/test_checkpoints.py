import errno
import io
import json
import os
import pickle

import keras
import numpy as np
import pytest
import safetensors

from training.state import checkpoints
from training.state.checkpoints import Checkpoints, State


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
    return State(arrays, {"phase": "history", "epoch": 2, "history": {"loss": [0.1, 1 / 3]}})


def assert_equal(found, expected):
    assert found.position == expected.position
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype


def test_a_model_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    model = compiled_model()
    train(model, 3, np.random.default_rng(0))
    state = State.decode(checkpoints.take(model, [], {"phase": "history"}).encode())
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
    assert_equal(State.decode(content), whole)
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            State.decode(content[:length])
    for position in rng.permutation(len(content))[:400]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match="no whole checkpoint"):
            State.decode(bytes(damaged))


def hashed(header, data=b""):
    """A safetensors file with this header, and the right hash of it."""
    header = {"__metadata__": {"blake2b": "0" * checkpoints.HASH_LENGTH, **header.pop("__metadata__", {})}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    content = len(text).to_bytes(8, "little") + text + data
    before, after = checkpoints._around_hash(content)
    return bytes(before) + checkpoints._hash(before, after) + bytes(after)


WHOLE = {"format": "2", "place": "{}"}


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": {"place": "{}"}},
        {"__metadata__": {"format": "2"}},
        {"__metadata__": {**WHOLE, "place": "{"}},
        {"__metadata__": WHOLE, "weights/0000": {}},
        {"__metadata__": WHOLE, "weights/0000": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"__metadata__": WHOLE, "weights/0000": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"__metadata__": WHOLE, "weights/0000": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}},
        {"__metadata__": WHOLE, "weights/0000": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    ],
    ids=["format", "place", "no JSON", "nothing", "more", "much more", "another size", "unknown"],
)
def test_a_checkpoint_that_lacks_something_or_claims_more_than_it_holds_is_damaged(header):
    with pytest.raises(ValueError, match=r"^no whole checkpoint$"):
        State.decode(hashed(header, b"1234"))


def test_the_helper_above_writes_checkpoints():
    array = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    found = State.decode(hashed({"__metadata__": WHOLE, "weights/0000": array}, np.float32(2).tobytes()))
    assert_equal(found, State({"weights/0000": np.array([2], "float32")}, {}))


def test_arrays_of_each_kind_come_back(rng):
    arrays = {
        "turned": rng.normal(size=(3, 4)).T,
        "every second": np.arange(10)[::2],
        "single": np.array(3.5, "float16"),
        "empty": np.zeros((0, 4), "uint8"),
        "big end first": np.arange(3, dtype=">i4"),
        "bool": np.array([True, False]),
    }
    found = State.decode(State(arrays, {}).encode()).arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=")
        assert found[name].shape == array.shape


def test_any_tool_reads_a_checkpoint(tmp_path):
    path = Checkpoints(tmp_path / "checkpoints").write(small_checkpoint())
    with safetensors.safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("weights/0000"), small_checkpoint().arrays["weights/0000"])
        metadata = file.metadata()
    assert metadata["format"] == "2"
    assert json.loads(metadata["place"]) == small_checkpoint().position


def test_a_text_that_looks_like_the_hash_is_none():
    state = State({}, {"a": checkpoints.HASH_MARK.decode() + "0" * checkpoints.HASH_LENGTH})
    assert_equal(State.decode(state.encode()), state)


def test_a_checkpoint_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    buffer = io.BytesIO()
    np.savez(buffer, position=np.array([Evil()], dtype=object))
    for content in (buffer.getvalue(), pickle.dumps(Evil())):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            State.decode(content)
    assert not (tmp_path / "made").exists()


def test_the_last_few_are_kept_and_a_torn_one_falls_back(tmp_path, capsys):
    folder = Checkpoints(tmp_path / "checkpoints", keep=3)
    assert folder.newest() is None
    for epoch in range(5):
        folder.write(State({}, {"epoch": epoch}))
    assert folder.numbers() == [3, 4, 5]
    newest = folder.file(5)
    torn = newest.read_bytes()[:100]
    newest.write_bytes(torn)
    folder.file(4).write_bytes(b"")
    assert folder.newest().position == {"epoch": 2}
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == [str(newest), str(folder.file(4))]
    assert all("the one before is taken" in line for line in told)
    # It is kept, and what is written next is newer.
    assert (folder.path / "00000005.damaged").read_bytes() == torn
    for epoch in range(6, 10):
        folder.write(State({}, {"epoch": epoch}))
    assert folder.numbers() == [7, 8, 9]
    assert folder.newest().position == {"epoch": 9}
    folder.remove()
    assert sorted(path.name for path in folder.path.iterdir()) == ["00000004.damaged", "00000005.damaged"]


def test_the_checkpoints_of_other_versions_are_passed_over_and_kept(tmp_path, capsys, monkeypatch):
    folder = Checkpoints(tmp_path / "checkpoints", keep=1)
    folder.path.mkdir()
    old = folder.path / "00000003.checkpoint"
    old.write_bytes(b"of an earlier version")
    assert folder.newest() is None
    assert capsys.readouterr().out == (
        f"{old} is written by another version of keras_mnv2 (format 1, this one reads 2): it is passed over, and kept\n"
    )
    folder.write(State({}, {"epoch": 0}))
    new = folder.path / "00000005.v3.safetensors"
    new.write_bytes(b"of a later version")
    folder.write(State({}, {"epoch": 1}))
    folder.write(State({}, {"epoch": 2}))
    assert folder.numbers() == [7]
    assert folder.newest().position == {"epoch": 2}
    assert "(format 3, this one reads 2)" in capsys.readouterr().out
    folder.remove()
    assert sorted(folder.path.iterdir()) == [old, new]
    assert old.read_bytes() == b"of an earlier version"


def test_a_checkpoint_of_another_format_under_this_ones_name_is_kept(tmp_path, capsys):
    folder = Checkpoints(tmp_path / "checkpoints")
    folder.path.mkdir()
    content = hashed({"__metadata__": {**WHOLE, "format": "3"}})
    folder.file(1).write_bytes(content)
    assert folder.newest() is None
    assert "is no checkpoint of this version" in capsys.readouterr().out
    assert (folder.path / "00000001.damaged").read_bytes() == content


def test_nothing_is_left_of_a_complete_run(tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints")
    folder.remove()
    folder.write(small_checkpoint())
    folder.write_beside(folder.path / "train_features_00000000", small_checkpoint())
    folder.remove()
    assert not folder.path.exists()


def test_a_failed_write_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    folder = Checkpoints(tmp_path / "checkpoints", keep=1)
    folder.write(State({}, {"epoch": 0}))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"00000002\.v2\.safetensors could not be written: No space left on device\.$"):
        folder.write(State({}, {"epoch": 1}))
    monkeypatch.undo()
    assert [path.name for path in folder.path.iterdir()] == ["00000001.v2.safetensors"]
    assert folder.newest().position == {"epoch": 0}


def test_a_run_folder_that_has_vanished_is_not_made_again(tmp_path):
    folder = Checkpoints(tmp_path / "run" / "checkpoints")
    with pytest.raises(OSError, match="could not be written: No such file or directory"):
        folder.write(small_checkpoint())
    assert not (tmp_path / "run").exists()
