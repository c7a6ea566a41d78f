"""Photographs in batches: the bytes of `resize_and_crop`, and the scaling of `preprocess_input`."""

import keras
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import keras_mnv2
from tests.conftest import once

NAME = "torchvision/IMAGENET1K_V2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six crops of two photographs in two class folders, with a file that is no image."""
    root = tmp_path_factory.mktemp("photographs")
    for label, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / label).mkdir()
        for i in range(3):
            suffix = (".jpg", ".PNG", ".webp")[i]
            Image.fromarray(photograph[10 * i : 300 + i, 7 * i : 401 + i]).save(root / label / f"{i}{suffix}")
    (root / "china" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("name", [NAME, "keras/mobilenet_v2_0.35_96", None])
def test_a_batch_is_what_the_functions_give(folder, name):
    side = 96 if name and name.endswith("96") else 224
    data = keras_mnv2.evaluation_data(folder, weights=name, batch_size=4)
    assert data.class_names == ["china", "flower"]
    assert [path.name for path in data.paths] == ["0.jpg", "1.PNG", "2.webp"] * 2
    assert len(data) == 2
    x, labels = data[1]
    assert (x.shape, x.dtype, labels.tolist()) == ((2, side, side, 3), np.float32, [1, 1])
    pixels = np.stack([keras_mnv2.resize_and_crop(path, name) for path in data.paths[4:]])
    expected = keras.ops.convert_to_numpy(
        keras_mnv2.preprocess_input(pixels, weights=name, data_format="channels_last")
    )
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_array_equal(data[1][0], x)
    raw = keras_mnv2.evaluation_data(folder, weights=name, batch_size=4, normalize=False, size=96)
    assert raw[0][0].shape == (4, 96, 96, 3)
    np.testing.assert_array_equal(raw[1][0][0], keras_mnv2.resize_and_crop(data.paths[4], name, 96))


@once
def test_evaluate_and_predict_take_it(folder):
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=2)
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    data = keras_mnv2.evaluation_data(folder, batch_size=4, size=32)
    scores = model.predict(data, verbose=0)
    assert scores.shape == (6, 2)
    _, accuracy = model.evaluate(data, verbose=0)
    assert accuracy == pytest.approx(np.mean(scores.argmax(1) == [0, 0, 0, 1, 1, 1]))


def test_arrays_and_paths(folder):
    images = np.stack([image[:300, :400] for image in load_sample_images().images])
    data = keras_mnv2.evaluation_data(images, [1, 0], size=32)
    assert data[0][1].tolist() == [1, 0]
    assert data.paths is None
    (x,) = keras_mnv2.evaluation_data(sorted((folder / "china").glob("*.jpg")), size=32)[0]
    assert x.shape == (1, 32, 32, 3)
    names = np.array([str(path) for path in sorted((folder / "china").glob("*.jpg"))])
    np.testing.assert_array_equal(keras_mnv2.evaluation_data(names, size=32)[0][0], x)


def test_a_batch_depends_on_its_index_alone(folder):
    data = keras_mnv2.evaluation_data(folder, size=32, batch_size=4)
    last = data[1][0]
    batches = list(data)
    assert [len(x) for x, _ in batches] == [4, 2]
    np.testing.assert_array_equal(batches[1][0], last)
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"index must be from 0 to 1, got {index}"):
            data[index]


def test_what_is_refused(folder, tmp_path):
    refused = keras_mnv2.evaluation_data
    with pytest.raises(ValueError, match="images must be an existing folder"):
        refused(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"images must be a folder of class folders, got .*, which has none"):
        refused(tmp_path)
    (tmp_path / "china").mkdir()
    (tmp_path / "china" / ".hidden.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images must have images \(.bmp, .*in its class folders, got none in"):
        refused(tmp_path)
    with pytest.raises(ValueError, match=r"number, height, width, 3\), got uint8 of shape \(40, 40, 3\)"):
        refused(np.zeros((40, 40, 3), "uint8"))
    with pytest.raises(ValueError, match=r"got float32 of shape \(2, 40, 40, 3\)"):
        refused(np.zeros((2, 40, 40, 3), "float32"))
    with pytest.raises(ValueError, match="labels must be whole numbers, one an image, got float64"):
        refused(np.zeros((2, 40, 40, 3), "uint8"), [0, 0.5])
    with pytest.raises(ValueError, match="size must be a whole number of at least 1 and at most 65536, got 0"):
        refused(folder, size=0)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        refused(folder, batch_size=0)
    with pytest.raises(ValueError, match="labels must be None where images is a folder"):
        refused(folder, [0])
    with pytest.raises(ValueError, match="labels must have one label an image, got 1 for 2 images"):
        refused(np.zeros((2, 40, 40, 3), "uint8"), [0])
    two = np.zeros((2, 40, 40, 3), "uint8")
    for labels, message in (
        ([2**40, 1], "labels must be whole numbers from 0 to 2147483647, got 1099511627776"),
        ([0, -1], "labels must be whole numbers from 0 to 2147483647, got -1"),
        (np.array([0, 2**63], "uint64"), "labels must be whole numbers from 0 to 2147483647, got 9223372036854775808"),
        ([2**70, 0], "labels must be whole numbers, one an image, got object"),
        ((label for label in (0, 1)), "labels must be a sequence of whole numbers, one an image, got <generator"),
        (5, "labels must be a sequence of whole numbers, one an image, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            refused(two, labels)
    with pytest.raises(ValueError, match=r"images must be a folder, a sequence of paths or an array .*, got 5"):
        refused(5)
    with pytest.raises(ValueError, match="images must hold at least one"):
        refused([])
    with pytest.raises(ValueError, match=r"notes\.txt' cannot be read as an image"):
        refused([folder / "china" / "notes.txt"])[0]


def test_labels_of_every_whole_type_are_kept():
    for dtype in ("int8", "uint8", "int64", "uint64"):
        data = keras_mnv2.evaluation_data(np.zeros((2, 40, 40, 3), "uint8"), np.array([3, 1], dtype), size=32)
        assert data.labels.tolist() == [3, 1]
        assert data.labels.dtype == np.int32
    data = keras_mnv2.evaluation_data(np.zeros((1, 40, 40, 3), "uint8"), [2**31 - 1])
    assert data.labels.tolist() == [2**31 - 1]
