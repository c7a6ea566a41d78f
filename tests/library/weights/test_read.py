"""Files of weights: each format gives what was written, nothing in a file is run, and a fault is one sentence.

What a file may claim, and where it may lead, is in `test_untrusted.py`.
"""

import argparse
import collections
import io
import os
import pathlib
import pickle
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

import keras_mnv2
from keras_mnv2.weights.load import model_variables
from keras_mnv2.weights.read import read_arrays
from keras_mnv2.weights.torch_file import LEGACY_MAGIC
from tests.conftest import ONCE

# Files are read without a backend.
pytestmark = ONCE

ZIP, OLD = {}, {"_use_new_zipfile_serialization": False}
FORMS = pytest.mark.parametrize("form", [ZIP, OLD], ids=["zip", "old"])
# The storage of the forged files.
NUMBERS = np.arange(6, dtype="float32").tobytes()
CUTS = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)


def tensors():
    base = torch.arange(24.0)
    return {
        "float32": torch.randn(3, 4),
        "float16": torch.randn(5).half(),
        "float64": torch.randn(2, 2).double(),
        "int64": torch.tensor(2**40),
        "int32": torch.arange(3, dtype=torch.int32),
        "int16": torch.arange(3, dtype=torch.int16),
        "int8": torch.arange(-1, 2, dtype=torch.int8),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.randn(3, 4).bfloat16().T,
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(4, 3, 2).permute(2, 0, 1),
        "shared": base,
        "shared.part": base[5:17:3],
        "shared.matrix": base.view(4, 6).T[1:],
        "parameter": torch.nn.Parameter(torch.randn(2, 3).T),
    }


def assert_arrays(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = as_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, name)


def as_numpy(value):
    # bfloat16, which NumPy has not, is read as float32, which holds each of its values.
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()


def refused(path, *parts):
    """The message of the error with which `read_arrays` refuses a file."""
    with pytest.raises(ValueError, match="cannot be read as weights") as caught:
        read_arrays(path)
    return one_sentence(caught.value, repr(str(path)), *parts)


def one_sentence(error, *parts):
    text = str(error)
    assert re.search(r"[^.: ]\.$", text), text
    assert "\n" not in text
    assert not re.search(r"\. [A-Z]", text), text
    for part in parts:
        assert part in text
    return text


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torchs_tensors(form, protocol, tmp_path):
    torch.save(tensors(), tmp_path / "file.pth", pickle_protocol=protocol, **form)
    found = read_arrays(tmp_path / "file.pth")
    # torch's own reader of weights knows the oldest protocol alone.
    assert_arrays(found, torch.load(tmp_path / "file.pth", weights_only=protocol == 2))
    # PyTorch warns of arrays that cannot be written.
    assert all(value.flags.writeable for value in found.values())
    assert np.shares_memory(found["shared"], found["shared.part"])


@FORMS
@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model"])
def test_a_wrapped_state_dict(form, wrap, tmp_path):
    module = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)))
    state = module.state_dict()
    torch.save({"epoch": 3, wrap: state, "loss": [0.5, None]}, tmp_path / "file.pt", **form)
    expected = torch.load(tmp_path / "file.pt", weights_only=True)[wrap]
    assert all(name.startswith("module.") for name in expected)
    assert_arrays(read_arrays(tmp_path / "file.pt"), {f"{wrap}/{name}": value for name, value in expected.items()})


class Unheard:
    """Of a class that no reader of the file knows."""

    def __init__(self):
        self.anything = {"scores": [1.0]}


@FORMS
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_a_training_script_keeps_besides(form, protocol, tmp_path):
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = {
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("runs"), sizes=[1, (2, 3)]),
        "best": np.float64(71.5),
        "history": np.arange(3),
        "optimizer": optimizer.state_dict(),
        "seen": {1, 2},
        "unheard": Unheard(),
        "rng": torch.get_rng_state(),
        "counts": collections.Counter("aab"),
        "defaults": collections.defaultdict(list, a=[1]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        7: torch.ones(1),
    }
    torch.save({"state_dict": layer.state_dict(), **kept}, tmp_path / "file.pth", pickle_protocol=protocol, **form)
    expected = {f"state_dict/{name}": value for name, value in layer.state_dict().items()}
    assert_arrays(read_arrays(tmp_path / "file.pth"), {**expected, "rng": kept["rng"]})


@FORMS
def test_a_module_that_was_saved_whole(form, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    torch.save(module, tmp_path / "file.pth", **form)
    assert_arrays(read_arrays(tmp_path / "file.pth"), module.state_dict())


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        ({"args": argparse.Namespace(lr=1), "epoch": 3}, "a dictionary with the keys 'args', 'epoch'"),
        ({1: 2}, "one without names"),
        (argparse.Namespace(lr=1), "a argparse.Namespace"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "one tensor without a name"),
        (3.5, "a float"),
    ],
)
@FORMS
def test_a_file_without_tensors_says_what_it_holds(form, saved, kind, tmp_path):
    torch.save(saved, tmp_path / "file.pth", **form)
    refused(tmp_path / "file.pth", f"it holds no dictionary of tensors but {kind}.")


def test_python_2s_dictionaries(tmp_path):
    # They gave their items as a list, which Python 3 never does.
    pairs = [["a", tensor((2,), (1,))], ["b", tensor((6,), (1,))]]
    write_zip(tmp_path / "file.pth", forged(Call(collections.OrderedDict, pairs), ZIP))
    expected = np.arange(6, dtype="float32")
    assert_arrays(read_arrays(tmp_path / "file.pth"), {"a": expected[:2], "b": expected})


def test_safetensors(tmp_path):
    saved = {name: tensor.detach().clone().contiguous() for name, tensor in tensors().items()}
    safetensors.torch.save_file(saved, tmp_path / "file.safetensors", metadata={"format": "pt"})
    found = read_arrays(tmp_path / "file.safetensors")
    assert_arrays(found, saved)
    assert all(value.flags.writeable for value in found.values())


def test_safetensors_of_a_type_that_no_network_has(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "file.safetensors")
    refused(tmp_path / "file.safetensors", "a holds values of type F8_E5M2")


@pytest.mark.parametrize("second", [2, 3, 4, 5])
def test_safetensors_whose_length_looks_like_a_pickle(second, tmp_path):
    path, start = tmp_path / "file.safetensors", bytes([0x80, second])
    # The header's length is padded to a multiple of 8.
    save_file({"x": np.ones(2)}, path, metadata={"pad": ""})
    short = int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"x": np.ones(2)}, path, metadata={"pad": "y" * (int.from_bytes(start, "little") - short)})
    assert path.read_bytes()[:2] == start
    assert_arrays(read_arrays(path), {"x": np.ones(2)})


@pytest.fixture(scope="module")
def models():
    """Keras's model and this package's, compiled, so that files have an optimizer too."""
    keras.utils.set_random_seed(0)
    arguments = {"input_shape": (32, 32, 3), "alpha": 0.35, "weights": None, "classes": 10}
    models = {
        "keras": keras.applications.MobileNetV2(**arguments),
        "own": keras_mnv2.MobileNetV2(**arguments),
        "compact": keras_mnv2.MobileNetV2(**arguments, block=keras_mnv2.layers.InvertedResidual),
    }
    for model in models.values():
        model.compile("adam", "sparse_categorical_crossentropy")
        model.optimizer.build(model.trainable_variables)
    return models


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
@pytest.mark.parametrize("kind", ["keras", "own", "compact"])
def test_kerass_files(kind, suffix, models, tmp_path):
    model, path = models[kind], tmp_path / f"file{suffix}"
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    if kind == "compact":
        expected = model_variables(model)
    else:
        expected = {f"{layer.name}/{v.name}": v for layer in model.layers for v in layer.weights}
    assert len(expected) == len(model.weights)
    assert_arrays(read_arrays(path), {name: keras.ops.convert_to_numpy(v) for name, v in expected.items()})


# What a harmful file could call; it would leave the marker.
class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def harmful(marker):
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(io.open, str(marker), "w"),
        "getattr": Call(getattr, "", "join"),
        "Namespace": argparse.Namespace(marker=1),
    }


HARMFUL = sorted(harmful(""))


def test_the_harmful_objects_are_harmful(tmp_path):
    for number, (name, thing) in enumerate(harmful(tmp_path / "marker").items()):
        made = pickle.loads(pickle.dumps(thing))
        if isinstance(made, io.IOBase):
            made.close()
        assert (tmp_path / "marker").exists() == (number < 4), name
        (tmp_path / "marker").unlink(missing_ok=True)


@pytest.mark.parametrize("asked", HARMFUL)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", [ZIP, OLD, None], ids=["zip", "old", "bare"])
def test_nothing_in_a_file_is_run(form, protocol, asked, tmp_path):
    path, thing = tmp_path / "file.pth", {"a": torch.ones(2), "b": harmful(tmp_path / "marker")[asked]}
    if form is None:
        path.write_bytes(pickle.dumps(thing["b"], protocol))
        refused(path, "none that PyTorch wrote")
    else:
        torch.save(thing, path, pickle_protocol=protocol, **form)
        assert_arrays(read_arrays(path), {"a": thing["a"]})
        torch.save(thing["b"], path, pickle_protocol=protocol, **form)
        # Each protocol has its own names of the modules.
        assert re.search(rf"no dictionary of tensors but a \w+\.{asked}\.$", refused(path))
    assert not (tmp_path / "marker").exists()


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch", "os.system"),
        ("torch._utils", "os.system"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch", "FloatStorage.__init__.__globals__"),
        ("keras_mnv2.weights.torch_file", "pickle.loads"),
    ],
)
def test_a_nested_name_is_not_followed(module, name, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "file.pth"
    argument = short(f"touch {marker}") + b"\x85R."
    forms = {
        2: b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument,
        4: b"\x80\x04" + short(module) + short(name) + b"\x93" + argument,
    }
    for data in forms.values():
        path.write_bytes(data)
        refused(path)
        write_zip(path, data)
        refused(path, f"a {module}.{name}.")
        assert not marker.exists()


def test_a_pickle_of_text_is_not_run(tmp_path):
    (tmp_path / "file.pth").write_bytes(pickle.dumps(harmful(tmp_path / "marker")["eval"], 0))
    refused(tmp_path / "file.pth")
    assert not (tmp_path / "marker").exists()


def write_entries(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def write_zip(path, data):
    write_entries(path, {"file/data.pkl": data, "file/data/0": NUMBERS})


class Storage:
    """Stands in a forged file for the storage of that number."""

    def __init__(self, number=0, length=6, dtype=torch.FloatStorage):
        self.pid = "storage", dtype, str(number), "cpu", length


class ForgingPickler(pickle.Pickler):
    def persistent_id(self, thing):
        return thing.pid if isinstance(thing, Storage) else None


def forged(thing, form):
    """The bytes of a pickle in which a `Storage` is a reference."""
    file = io.BytesIO()
    if form is OLD:
        for part in (LEGACY_MAGIC, 1001, {}):
            pickle.dump(part, file, 2)
    ForgingPickler(file, 2).dump(thing)
    if form is OLD:
        pickle.dump(["0"], file, 2)
        file.write((6).to_bytes(8, "little") + NUMBERS)
    return file.getvalue()


def write_forged(path, thing, form):
    data = forged(thing, form)
    if form is OLD:
        path.write_bytes(data)
    else:
        write_zip(path, data)


def tensor(shape, strides, offset=0, storage=None):
    rest = (False, collections.OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, storage or Storage(), offset, shape, strides, *rest)


@FORMS
def test_a_forged_tensor_that_is_right_is_read(form, tmp_path):
    write_forged(tmp_path / "file.pth", {"a": tensor((2, 2), (1, 2), 1)}, form)
    assert_arrays(read_arrays(tmp_path / "file.pth"), {"a": np.array([[1, 3], [2, 4]], "float32")})


@FORMS
@pytest.mark.parametrize(
    "wrong",
    [
        tensor((2, 3), (4, 1)),
        tensor((6,), (1,), offset=1),
        tensor((2,), (2**62,)),
        tensor((1,), (2**70,)),
        tensor((2**40,), (1,)),
        tensor((2**40,), (0,)),
        tensor((2**20, 2**20, 2**40), (0, 0, 0)),
        tensor((2,), (-1,), offset=3),
        tensor((-2,), (1,)),
        tensor((2,), (1,), offset=-4),
        tensor((2, 3), (1,)),
        tensor((2.0,), (1,)),
        tensor((1,) * 80, (1,) * 80),
        tensor((2,), (1,), storage="no storage"),
        tensor((2,), (1,), storage=Storage(number=7)),
        tensor((2,), (1,), storage=Storage(dtype="object")),
        tensor((2,), (1,), storage=Storage(dtype=torch.ComplexFloatStorage)),
    ],
    ids=range(17),
)
def test_a_tensor_beyond_its_storage(wrong, form, tmp_path):
    write_forged(tmp_path / "file.pth", {"a": wrong}, form)
    refused(tmp_path / "file.pth")


def test_a_tensor_that_is_changed_after_its_checks(tmp_path):
    class Changed(Call):
        def __reduce__(self):
            return *self.reduced, {"shape": (2**40,)}

    function, arguments = tensor((2,), (1,)).reduced
    changed = Changed(function, *arguments)
    write_zip(tmp_path / "file.pth", forged({"a": changed}, ZIP))
    assert_arrays(read_arrays(tmp_path / "file.pth"), {"a": np.arange(2, dtype="float32")})


@FORMS
def test_a_pickle_that_would_fill_the_memory(form, tmp_path):
    # 2 GB for 10 bytes, if the place were believed.
    data = b"\x80\x02}r" + (10**8).to_bytes(4, "little") + b"."
    if form is OLD:
        (tmp_path / "file.pth").write_bytes(data)
    else:
        write_zip(tmp_path / "file.pth", data)
    refused(tmp_path / "file.pth")


def test_a_storage_that_is_said_to_be_huge(tmp_path):
    path = tmp_path / "file.pth"
    write_forged(path, {"a": tensor((6,), (1,))}, ZIP)
    data, sizes = path.read_bytes(), (24).to_bytes(4, "little") * 2
    assert data.count(sizes) == 2
    path.write_bytes(data.replace(sizes, (2**31).to_bytes(4, "little") * 2))
    refused(path)
    length = 2**45
    head = forged({"a": tensor((length,), (1,), storage=Storage(length=length))}, OLD)[: -8 - 24]
    path.write_bytes(head + length.to_bytes(8, "little") + bytes(24))
    refused(path)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """A small file of each format."""
    folder = tmp_path_factory.mktemp("small")
    arrays = {"a.weight": np.ones((2, 3), "float32"), "a.bias": np.ones(3, "float16")}
    save_file(arrays, folder / "file.safetensors")
    for name, form in (("zip.pth", ZIP), ("old.pth", OLD)):
        torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, folder / name, **form)
    layers = [keras.Input((4, 4, 2)), keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization()]
    model = keras.Sequential(layers)
    model.save(folder / "file.h5")
    model.save(folder / "file.keras")
    model.save_weights(folder / "file.weights.h5")
    return {path.name: path for path in folder.iterdir()}


SMALL = ("file.safetensors", "zip.pth", "old.pth", "file.h5", "file.weights.h5", "file.keras")


@pytest.mark.parametrize("name", SMALL)
def test_a_file_that_was_cut(name, small_files, tmp_path):
    data, path = small_files[name].read_bytes(), tmp_path / name
    assert read_arrays(small_files[name])
    for length in {*(int(cut * len(data)) for cut in CUTS), 1, 2, 4, 8, 9, len(data) - 1}:
        path.write_bytes(data[:length])
        # The first bytes tell the kind; HDF5 says within its first hundred how long it is.
        refused(path, *["it is truncated"] * (length == 0 or length > 100))


@pytest.mark.parametrize("name", SMALL)
def test_flipped_bytes(name, small_files, tmp_path):
    data, path = small_files[name].read_bytes(), tmp_path / name
    failed = 0
    for place in {*range(0, min(400, len(data)), 3), *range(len(data) - 100, len(data), 5)}:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        # Not each byte matters, and no format but zip has checksums.
        try:
            found = read_arrays(path)
        except ValueError as error:
            one_sentence(error, repr(str(path)))
            failed += 1
        else:
            assert all(isinstance(value, np.ndarray) for value in found.values())
    assert failed


def write_h5(path, fill):
    with h5py.File(path, "w") as file:
        fill(file)


def text_as_weights(file):
    file.attrs["layer_names"] = ["Conv1"]
    file.create_group("Conv1").attrs["weight_names"] = ["Conv1/kernel"]
    file["Conv1/Conv1/kernel"] = ["text"]


NO_WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("alpha,accuracy\n0.35,60.3\n" * 100),
    "json": lambda path: path.write_text('{"alpha": 0.35}'),
    "zip": lambda path: write_entries(path, {"readme.txt": b"nothing"}),
    "two pickles": lambda path: write_entries(path, {"a/data.pkl": b"", "b/data.pkl": b""}),
    "hdf5": lambda path: write_h5(path, lambda file: file.create_dataset("a", data=np.ones(3))),
    "hdf5 of text": lambda path: write_h5(path, text_as_weights),
    "hdf5 in keras": lambda path: write_entries(path, {"model.weights.h5": b"\x89HDF\r\n\x1a\n"}),
    "list": lambda path: torch.save([torch.ones(2)], path),
    "tensor": lambda path: torch.save(torch.ones(2), path),
    "numbers": lambda path: torch.save({"a": 1.0}, path),
    "keys": lambda path: torch.save({1: torch.ones(2)}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_file_of_something_else(kind, tmp_path):
    NO_WEIGHTS[kind](tmp_path / "file")
    refused(tmp_path / "file")


def test_a_file_without_the_first_kernel_makes_no_model(arrays, tmp_path):
    save_file({k: v for k, v in arrays.items() if k != "features.0.0.weight"}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"file\.safetensors.* it lacks features\.0\.0\.weight"):
        keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=tmp_path / "file.safetensors")


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.pth"):
        with pytest.raises(FileNotFoundError) as caught:
            read_arrays(path)
        one_sentence(caught.value, repr(str(path)))


@pytest.fixture(scope="module")
def target():
    """A model that is loaded into, without success."""
    keras.utils.set_random_seed(1)
    return keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)


@pytest.fixture(scope="module")
def arrays(target, tmp_path_factory):
    """What the target's own file holds, with other numbers."""
    keras_mnv2.save_weights(target, path := tmp_path_factory.mktemp("target") / "file.safetensors", "torchvision")
    return {name: value if value.dtype == "int64" else value + 1 for name, value in read_arrays(path).items()}


def assert_refused(target, path, *parts):
    """`load_weights` names the file and the parts, and changes no weight."""
    before = target.get_weights()
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        keras_mnv2.load_weights(target, path)
    one_sentence(caught.value, *parts)
    for old, new in zip(before, target.get_weights(), strict=True):
        assert old.tobytes() == new.tobytes()


def test_the_file_without_faults_is_loaded(arrays, tmp_path):
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    save_file(arrays, tmp_path / "file.safetensors")
    keras_mnv2.load_weights(model, tmp_path / "file.safetensors")
    np.testing.assert_array_equal(model.get_layer("predictions").bias, arrays["classifier.1.bias"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".h5"])
def test_a_cut_file_leaves_the_models_weights(suffix, target, tmp_path):
    path = tmp_path / f"file{suffix}"
    keras_mnv2.save_weights(target, path, "keras" if suffix == ".h5" else "timm")
    data = path.read_bytes()
    for cut in (0.0, 0.5, 0.99):
        path.write_bytes(data[: int(cut * len(data))])
        assert_refused(target, path, "cannot be read")


@FORMS
def test_a_harmful_file_leaves_the_models_weights(form, target, arrays, tmp_path):
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    thing = harmful(tmp_path / "marker")["eval"]
    torch.save({"state_dict": thing, "optimizer": thing}, tmp_path / "file.pth", **form)
    assert_refused(target, tmp_path / "file.pth", "a dictionary with the keys 'state_dict', 'optimizer'")
    state["features.0.0.weight"] = thing
    torch.save(state, tmp_path / "file.pth", **form)
    assert_refused(target, tmp_path / "file.pth", "lacks features.0.0.weight")
    assert not (tmp_path / "marker").exists()


def test_a_tensor_beyond_its_storage_leaves_the_models_weights(target, tmp_path):
    write_forged(tmp_path / "file.pth", {"features.0.0.weight": tensor((2, 3), (4, 1))}, ZIP)
    assert_refused(target, tmp_path / "file.pth", "reaches beyond")


def resnet(arrays):
    names = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.running_mean", "fc.weight", "fc.bias")
    return {name: np.ones((2, 2), "float32") for name in names}


def lacking(arrays):
    return {name: value for name, value in arrays.items() if name != "features.3.conv.1.1.running_var"}


def one_more(arrays):
    return {**arrays, "features.19.0.weight": np.ones((8, 8, 1, 1), "float32")}


def not_finite(arrays):
    value = arrays["features.18.1.bias"].copy()
    value[-1] = np.nan
    return {**arrays, "features.18.1.bias": value}


def other_classes(arrays):
    classifier = {"classifier.1.weight": np.ones((7, 1280), "float32"), "classifier.1.bias": np.ones(7, "float32")}
    return {**arrays, **classifier}


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (resnet, ("bn1.weight", "no MobileNetV2 of a known layout")),
        (lacking, ("lacks features.3.conv.1.1.running_var",)),
        (one_more, ("no place for features.19.0.weight",)),
        (not_finite, ("features.18.1.bias holds values that are not finite",)),
        (other_classes, ("classifier.1.weight", "(1280, 7)", "(1280, 10)")),
    ],
)
def test_a_file_that_does_not_fit(fault, parts, target, arrays, tmp_path):
    save_file(fault(arrays), tmp_path / "file.safetensors")
    assert_refused(target, tmp_path / "file.safetensors", *parts)


@pytest.fixture(scope="module")
def wider():
    return keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.5, weights=None, classes=10)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("file.safetensors", "mobilenet_v2.layer.0.reduce_1x1.convolution.weight"),
        ("file.h5", "block_1_project/kernel"),
        ("file.weights.h5", "block_1_project/kernel"),
        ("file.keras", "block_1_project/kernel"),
        ("compact.keras", "block_1/project/kernel"),
    ],
)
def test_a_file_of_another_width(name, key, target, wider, tmp_path):
    path = tmp_path / name
    if name == "compact.keras":
        block = keras_mnv2.layers.InvertedResidual
        keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.5, weights=None, classes=10, block=block).save(path)
    elif name == "file.weights.h5":
        wider.save_weights(path)
    elif name == "file.keras":
        wider.save(path)
    else:
        keras_mnv2.save_weights(wider, path, "keras" if name == "file.h5" else "transformers")
    shapes = "the shape (1, 1, 48, 16), the model's is (1, 1, 48, 8)"
    assert_refused(target, path, f": {key} gives block_1/project/kernel {shapes}")
