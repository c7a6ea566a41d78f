"""What a file of weights claims is not believed, and where it leads is not followed."""

import collections
import io
import json
import os
import random
import resource
import subprocess
import sys
import time
import zipfile
import zlib

import h5py
import keras
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import keras_mnv2
from keras_mnv2.weights.hdf5 import check_hdf5
from keras_mnv2.weights.read import read_arrays
from tests.conftest import marks
from tests.helpers import note

# The reading knows no backend.
pytestmark = marks("tensorflow")
SECRET = np.arange(6, dtype="float32")


@pytest.fixture(scope="module")
def network():
    """What the files are to be loaded into."""
    return keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model's file of each kind that holds HDF5."""
    folder = tmp_path_factory.mktemp("small")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")])
    model.save(folder / "file.h5")
    model.save(folder / "file.keras")
    model.save_weights(folder / "file.weights.h5")
    return folder


@pytest.fixture
def outside(tmp_path):
    """Another file of this machine, which holds numbers that nobody asked for."""
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file["secret"] = SECRET
    SECRET.tofile(tmp_path / "outside.bin")
    return tmp_path


def external_link(file, outside):
    file["layers/more"] = h5py.ExternalLink(str(outside / "outside.h5"), "/secret")


def soft_link(file, outside):
    file["layers/more"] = h5py.SoftLink("/layers")


def dangling_link(file, outside):
    file["layers/more"] = h5py.SoftLink("/nowhere")


def external_storage(file, outside):
    file.create_dataset("layers/more", (6,), "float32", external=[(str(outside / "outside.bin"), 0, 24)])


def virtual(file, outside):
    layout = h5py.VirtualLayout((6,), "float32")
    layout[:] = h5py.VirtualSource(str(outside / "outside.h5"), "secret", (6,))
    file.create_virtual_dataset("layers/more", layout)


def two_names(file, outside):
    file["layers/less/vars/0"] = SECRET
    file["layers/more"] = file["layers/less"]


def other_filter(file, outside):
    file.create_dataset("layers/more", data=SECRET, compression="lzf")


def twice_packed(file, outside):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((6,))
    plist.set_deflate(4)
    plist.set_deflate(4)
    h5py.h5d.create(file.require_group("layers").id, b"more", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((6,)), plist)


def nothing_behind(file, outside):
    file.create_dataset("layers/more", (2**20,), "float64", chunks=(2**10,))


def zeros(file, outside):
    file.create_dataset("layers/more", data=np.zeros(2**20), compression="gzip")


def many_names(file, outside):
    file["layers/more0"] = np.random.default_rng(0).random(2**14)
    for number in range(1, 50):
        file[f"layers/more{number}"] = file["layers/more0"]


def long_chunk(file, outside):
    dataset = file.create_dataset("layers/more", (1000,), "float32", chunks=(1000,), compression="gzip")
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(8000)))


LEADING = {
    external_link: "an external link",
    soft_link: "a soft link",
    dangling_link: "a soft link",
    external_storage: "in another file",
    virtual: "a virtual dataset",
    two_names: "two names for a group",
    other_filter: "another filter than gzip",
    twice_packed: "another filter than gzip",
    nothing_behind: "more than 8 times",
    zeros: "more than 8 times",
    many_names: "more than 8 times",
    long_chunk: "unpacks to more than its 4000 bytes",
}


def changed(source, path, change, outside):
    """A copy of a file of Keras whose HDF5 was changed."""
    data = source.read_bytes()
    if path.suffix == ".keras":
        with zipfile.ZipFile(source) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        data = entries["model.weights.h5"]
    with h5py.File(path.with_suffix(".part"), "w") as file:
        with h5py.File(io.BytesIO(data)) as old:
            for key in old:
                old.copy(key, file)
            file.attrs.update(old.attrs)
        change(file, outside)
    data = path.with_suffix(".part").read_bytes()
    if path.suffix == ".keras":
        with zipfile.ZipFile(path, "w") as archive:
            for name, entry in {**entries, "model.weights.h5": data}.items():
                archive.writestr(name, entry)
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("change", LEADING, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["file.h5", "file.weights.h5", "file.keras"])
def test_hdf5_that_does_not_keep_to_itself(name, change, small, outside, network):
    path = outside / name
    changed(small / name, path, lambda file, outside: None, outside)
    check_hdf5(path)
    expected = read_arrays(small / name)
    for key, value in read_arrays(path).items():
        np.testing.assert_array_equal(value, expected[key])
    changed(small / name, path, change, outside)
    for reads in (check_hdf5, read_arrays, lambda path: keras_mnv2.load_weights(network, path)):
        with pytest.raises(ValueError, match=LEADING[change]) as caught:
            reads(path)
        assert str(path) in str(caught.value)
        assert "layers/more" in str(caught.value) or "8 times" in str(caught.value)


def test_what_is_no_hdf5(tmp_path, small):
    (tmp_path / "text.h5").write_text("nothing")
    (tmp_path / "cut.h5").write_bytes((small / "file.h5").read_bytes()[:-1])
    for name in ("text.h5", "cut.h5"):
        with pytest.raises(ValueError, match=rf"{name}' is not safe to open: "):
            check_hdf5(tmp_path / name)


@pytest.mark.parametrize("name", ["file.h5", "file.weights.h5"])
def test_packed_files_that_are_honest_are_read(name, small, tmp_path):
    def pack(group, into):
        into.attrs.update(group.attrs)
        for key, item in group.items():
            if isinstance(item, h5py.Group):
                pack(item, into.create_group(key))
            elif item.shape == ():
                into[key] = item[()]
            else:
                into.create_dataset(key, data=item[()], compression="gzip", shuffle=True, fletcher32=True)

    with h5py.File(small / name) as old, h5py.File(tmp_path / name, "w") as new:
        pack(old, new)
    expected = read_arrays(small / name)
    found = read_arrays(tmp_path / name)
    assert set(found) == set(expected)
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key])


def test_a_layer_with_a_thousand_names(small, tmp_path):
    def rename(file, outside):
        file["layers/dense/vars"].attrs["name"] = ["dense"] * 1000

    changed(small / "file.weights.h5", tmp_path / "file.weights.h5", rename, tmp_path)
    assert set(read_arrays(tmp_path / "file.weights.h5")) == {"dense/kernel", "dense/bias"}

    def lengthen(file, outside):
        file["layers/dense/vars"].attrs["name"] = "dense" * 1000

    changed(small / "file.weights.h5", tmp_path / "file.weights.h5", lengthen, tmp_path)
    with pytest.raises(ValueError, match="has a name that no layer has"):
        read_arrays(tmp_path / "file.weights.h5")


def test_two_layers_of_one_name(small, tmp_path):
    def double(file, outside):
        file.copy("layers/dense", "layers/dense_1")

    changed(small / "file.weights.h5", tmp_path / "file.weights.h5", double, tmp_path)
    with pytest.raises(ValueError, match="two arrays of the name dense/"):
        read_arrays(tmp_path / "file.weights.h5")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zip_archives_that_unpack_to_far_more(method, small, tmp_path):
    """The file is refused by its headers: nothing is unpacked."""
    path = tmp_path / "file.keras"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("model.weights.h5", (small / "file.weights.h5").read_bytes() + bytes(2**22))
    message = "more than 8 times" if method == zipfile.ZIP_DEFLATED else "another method than zip's usual one"
    for reads in (check_hdf5, read_arrays):
        with pytest.raises(ValueError, match=message):
            reads(path)
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth") as old, zipfile.ZipFile(tmp_path / "packed.pth", "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=message):
        read_arrays(tmp_path / "packed.pth")


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
def test_a_hundred_names_for_one_storage(form, tmp_path):
    base = torch.randn(2**20)
    torch.save({f"part{n}": base[n:] for n in range(100)}, tmp_path / "file.pth", **form)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_arrays(tmp_path / "file.pth")
    assert len(found) == 100
    assert all(np.shares_memory(found["part0"], value) for value in found.values())
    np.testing.assert_array_equal(found["part99"], base[99:])
    # Kilobytes: the storage has 4 MB, its hundred parts 400.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
def test_what_is_inside_itself(form, tmp_path):
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]
    saved = collections.OrderedDict(doubled=doubled, inner={"a": torch.ones(2)})
    again = saved
    for _ in range(60):
        again = {"left": again, "right": again}
    saved["again"] = again
    torch.save(saved, tmp_path / "file.pth", **form)
    start = time.perf_counter()
    assert set(read_arrays(tmp_path / "file.pth")) == {"inner/a"}
    assert time.perf_counter() - start < 5


# The fuzzer: files of each kind with bytes that were changed, cut, doubled or put in another's place.
KINDS = ("file.safetensors", "file.h5", "file.weights.h5", "file.keras", "zip.pth", "old.pth")
EACH = 3000
CHILD = """
import json, os, resource, signal, sys, time
import numpy as np
from keras_mnv2.weights.read import read_arrays

def stop(*_):
    raise SystemExit("stopped")

own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (own + 2**30, own + 2**30))
signal.signal(signal.SIGALRM, signal.SIG_DFL)
for line in sys.stdin:
    signal.alarm(20)
    start = time.perf_counter()
    try:
        found = read_arrays(line.strip())
        result = "arrays" if all(type(value) is np.ndarray for value in found.values()) else "something else"
    except ValueError as error:
        cause = error.__cause__
        result = "out of memory" if isinstance(cause, MemoryError) else "ValueError"
        if "\\n" in str(error) or not str(error).endswith("."):
            result = f"a strange message: {error}"
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    print(json.dumps([result, time.perf_counter() - start]), flush=True)
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), flush=True)
"""


def mutated(data, draw):
    """Bytes with one to eight faults; half of the files have theirs where most of the structure is."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 8])):
        near = draw.choice([len(data), min(len(data), 600)])
        place = draw.choice([draw.randrange(near), max(0, len(data) - 1 - draw.randrange(near))])
        fault = draw.randrange(6)
        if fault == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif fault == 1:
            data[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
        elif fault == 2:
            value = draw.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**64 - 1, len(data), draw.randrange(2**32)])
            size = draw.choice([2, 4, 8])
            data[place : place + size] = (value % 256**size).to_bytes(size, "little")
        elif fault == 3:
            del data[place : place + draw.choice([1, 2, 8, 100, len(data)])]
        elif fault == 4:
            piece = data[place : place + draw.randrange(1, 200)]
            data[place:place] = piece * draw.choice([1, 1, 1, 20])
        else:
            other = draw.randrange(len(data))
            piece = data[other : other + draw.randrange(1, 64)]
            data[place : place + len(piece)] = piece
        if not data:
            return bytes(8)
    return bytes(data)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A small file of each kind."""
    folder = tmp_path_factory.mktemp("seeds")
    draw = np.random.default_rng(0)
    arrays = {f"features.{n}.weight": draw.normal(size=(4, 3)).astype("float32") for n in range(4)}
    save_file(arrays, folder / "file.safetensors", metadata={"format": "pt"})
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    saved = {"state_dict": state, "half": state["features.0.weight"].bfloat16().T, "epoch": 3, "best": np.float64(1)}
    torch.save(saved, folder / "zip.pth")
    torch.save(saved, folder / "old.pth", _use_new_zipfile_serialization=False)
    inner = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization()])
    model = keras.Sequential([inner, keras.layers.Flatten(), keras.layers.Dense(2)])
    model.save(folder / "file.h5")
    model.save(folder / "file.keras")
    model.save_weights(folder / "file.weights.h5")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind, seeds, tmp_path):
    """Each is read, or refused with a `ValueError`, within 20 seconds and a gigabyte."""
    data, draw = (seeds / kind).read_bytes(), random.Random(0)
    counts, slowest, largest, number = collections.Counter(), 0.0, 0, 0
    path = tmp_path / kind
    while number < EACH:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
        )
        while number < EACH:
            path.write_bytes(mutated(data, draw))
            number += 1
            child.stdin.write(f"{path}\n")
            child.stdin.flush()
            line = child.stdout.readline()
            if not line:
                break
            result, seconds = json.loads(line)
            counts[result] += 1
            slowest = max(slowest, seconds)
            if result not in ("arrays", "ValueError"):
                path.rename(path.with_name(f"{number}-{kind}"))
        child.stdin.close()
        rest = child.stdout.read()
        largest = max(largest, json.loads(rest) if rest else 0)
        if child.wait():
            counts[f"ended by {child.returncode}"] += 1
            path.rename(path.with_name(f"{number}-{kind}"))
    for result, count in counts.items():
        note(f"{kind}, {EACH} mutated files: {result}", count)
    note(f"{kind}: the slowest file, seconds", slowest)
    note(f"{kind}: what a child's memory grew by at most, bytes", largest * 1024)
    assert set(counts) <= {"arrays", "ValueError"}, (counts, tmp_path)
    assert counts["ValueError"]
