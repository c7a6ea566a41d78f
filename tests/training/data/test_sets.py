"""Reading of data sets: what is in which split, in which order, under which label."""

import dataclasses
import io

import keras
import numpy as np
import pytest
from PIL import Image

import keras_mnv2
from tests.conftest import once
from tests.helpers import hiding, run_python
from training.data import sets
from training.data.batches import evaluation_batches, training_batches
from training.recipes import digits


def picture(path, value=100, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def listing(split, root):
    return [(str(path.relative_to(root)), int(label)) for path, label in zip(split.paths, split.labels, strict=True)]


def test_a_folder_with_splits_is_read_as_listed(tmp_path):
    for name in (
        "train/cat/b.jpg",
        "train/cat/a.PNG",
        "train/cat/deep/c.webp",
        "train/dog/1.bmp",
        "train/dog/.hidden.jpg",
        "val/dog/x.jpeg",
        "test/cat/y.tiff",
        ".cache/cat/z.png",
    ):
        picture(tmp_path / name)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    dataset = sets.load(str(tmp_path), 32)
    assert dataset.class_names == ("cat", "dog")
    assert listing(dataset.train, tmp_path) == [
        ("train/cat/a.PNG", 0),
        ("train/cat/b.jpg", 0),
        ("train/cat/deep/c.webp", 0),
        ("train/dog/1.bmp", 1),
    ]
    assert listing(dataset.validation, tmp_path) == [("val/dog/x.jpeg", 1)]
    assert listing(dataset.test, tmp_path) == [("test/cat/y.tiff", 0)]
    image, label = dataset.train[1]
    assert (image.mode, image.size, label) == ("RGB", (40, 36), 0)
    assert dataset.train.name(1) == str(tmp_path / "train/cat/b.jpg")


def test_training_and_evaluation_read_a_folder_the_same_way(tmp_path):
    for name in (
        "b/2.png",
        "b/1.TIFF",
        "b/deep/er/3.jpg",
        "a/x.tif",
        "a/B.png",
        "a/.hidden/y.png",
        "a/._x.png",
        ".c/z.png",
    ):
        picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "loop.png").symlink_to("loop.png")
    evaluated = keras_mnv2.evaluation_data(tmp_path)
    parts, names = sets.read(str(tmp_path), 32)
    assert parts["train"].paths == evaluated.paths
    assert parts["train"].labels.tolist() == evaluated.labels.tolist()
    assert list(names) == list(evaluated.class_names) == ["a", "b"]
    assert [str(path.relative_to(tmp_path)) for path in evaluated.paths] == [
        "a/B.png",
        "a/x.tif",
        "b/1.TIFF",
        "b/2.png",
        "b/deep/er/3.jpg",
        "b/loop.png",
    ]
    assert (parts["train"].paths, parts["train"].labels.tolist(), names) == keras_mnv2.class_folders(tmp_path)


def test_links_that_lead_nowhere_are_unreadable_images(tmp_path):
    two_classes(tmp_path)
    (tmp_path / "train" / "a" / "loop.png").symlink_to("loop.png")
    (tmp_path / "train" / "b" / "gone.png").symlink_to("nothing.png")
    split = sets.read(str(tmp_path), 32)[0]["train"]
    assert split.fingerprint() == split.fingerprint()
    batches = evaluation_batches(split, 2, digits.CONFIG)
    assert len(batches[0][0]) == 2
    assert batches.told().startswith("2 images could not be read")
    assert all(name in batches.told() for name in ("loop.png", "gone.png"))


@pytest.mark.parametrize("changes", [{"trivial_augment": True}, {"crop_area": 0.5}, {"evaluation_size": 48}])
def test_digits_take_the_changes_of_photographs(changes):
    config = dataclasses.replace(digits.CONFIG, **changes)
    dataset = sets.load("digits", 32)
    images, _ = training_batches(dataset.train, 10, config)[0]
    test, _ = evaluation_batches(dataset.test, 10, config)[0]
    size = config.evaluation_size or 32
    assert (images.shape, test.shape) == ((64, 32, 32, 1), (64, size, size, 1))
    # Scans of ink, not black.
    assert images.max(axis=(1, 2, 3)).min() > 30 or config.trivial_augment
    assert test.max(axis=(1, 2, 3)).min() > 200
    assert images.mean() > 20


def test_a_folder_without_splits_is_divided_class_by_class_and_always_the_same(tmp_path):
    for name, number in (("a", 40), ("b", 20), ("c", 2), ("train", 3)):
        for i in range(number):
            picture(tmp_path / name / f"{i:02}.png")
    first, second = sets.load(str(tmp_path), 32), sets.load(str(tmp_path), 32)
    parts = []
    for split, again in ((getattr(d, p) for d in (first, second)) for p in ("train", "validation", "test")):
        names = [split.name(i) for i in range(len(split))]
        assert names == [again.name(i) for i in range(len(again))]
        assert [split[i][1] for i in range(len(split))] == split.labels.tolist()
        assert all(f"/{first.class_names[label]}/" in name for name, label in zip(names, split.labels, strict=True))
        parts.append(set(names))
    assert len(set.union(*parts)) == sum(map(len, parts)) == 65
    assert first.class_names == ("a", "b", "c", "train")
    assert np.bincount(first.validation.labels).tolist() == [4, 2, 1, 1]
    assert np.bincount(first.test.labels).tolist() == [4, 2, 0, 1]
    alone = sets.load(str(tmp_path), 32, held_out=False)
    assert alone.validation is alone.test


def test_arrays_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 28, 28)).astype("uint8")
    labels = np.arange(20)[:, None] % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    dataset = sets.load(str(tmp_path / "a.npz"), 32)
    assert dataset.class_names == ("0", "1")
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [18, 2, 4]
    image, label = dataset.test[3]
    np.testing.assert_array_equal(image[..., 0], images[3])
    assert label == 1
    tested = sets.load(str(tmp_path / "a.npz"), 32, held_out=False)
    assert len(tested.train) == 20
    assert tested.validation is tested.test


def test_digits_are_split_as_ever():
    first, second = sets.load("digits", 32), sets.load("digits", 32)
    assert [len(s) for s in (first.train, first.validation, first.test)] == [1257, 180, 360]
    assert np.array_equal(first.test.images, second.test.images)
    assert first.train.images.shape[1:] == (32, 32, 1)
    assert 0 <= first.train.images.min() < first.train.images.max() <= 256
    prints = [{image.tobytes() for image in s.images} for s in (first.train, first.validation, first.test)]
    assert not prints[0] & prints[2]
    assert not prints[1] & prints[2]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A small data set as TFDS prepares one."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)

    def records(number):
        images = rng.integers(0, 256, (number, 32, 32, 3), "uint8")
        return [(i, {"image": image, "label": i % 3}) for i, image in enumerate(images)]

    builder = tfds.dataset_builders.AdhocBuilder(
        name="blocks",
        version="1.2.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
            }
        ),
        split_datasets={"train": records(30), "test": records(6)},
        data_dir=str(folder),
        file_format="array_record",
    )
    builder.download_and_prepare(file_format="array_record")
    return folder


@pytest.mark.parametrize("name", ["blocks", "blocks:1.2.0"])
def test_a_data_set_of_tfds_is_read_by_random_access(name, tfds_folder, monkeypatch):
    for limit in (sets.IN_MEMORY, 0):
        monkeypatch.setattr(sets, "IN_MEMORY", limit)
        dataset = sets.load(name, 32, tfds_folder)
        assert dataset.class_names == ("x", "y", "z")
        assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [27, 3, 6]
        assert sorted(dataset.test.labels) == [0, 0, 1, 1, 2, 2]
        image, label = dataset.test[2]
        assert np.asarray(image).shape == (32, 32, 3)
        assert label == dataset.test.labels[2]


@once
def test_tfds_is_read_without_tensorflow(tfds_folder):
    code = f"""{hiding("tensorflow")}
from training.data import sets
dataset = sets.load("blocks", 32, {str(tfds_folder)!r})
print(len(dataset.train), len(dataset.test), *dataset.class_names, "tensorflow" in sys.modules)
"""
    assert run_python(code, "torch").splitlines()[-1] == "27 6 x y z False"


def test_both_ways_through_tfds_give_the_same_pixels(tfds_folder, monkeypatch):
    kept = sets.load("blocks", 32, tfds_folder).test
    monkeypatch.setattr(sets, "IN_MEMORY", 0)
    read = sets.load("blocks", 32, tfds_folder).test
    assert isinstance(kept, sets.ArraySplit)
    assert isinstance(read, sets.RecordSplit)
    for i in range(6):
        np.testing.assert_array_equal(kept[i][0], np.asarray(read[i][0]))


MODES = {
    "grey.png": ("L", 77),
    "grey_alpha.png": ("LA", (77, 128)),
    "rgba.png": ("RGBA", (200, 100, 50, 128)),
    "cmyk.jpg": ("CMYK", (0, 255, 255, 0)),
    "palette.gif": ("P", 0),
    "bits.png": ("1", 1),
    "deep.png": ("I;16", 0x4D00),
    "pixel.png": ("RGB", (200, 100, 50)),
}
EXPECTED = {
    "grey.png": (77, 77, 77),
    "grey_alpha.png": (77, 77, 77),
    "rgba.png": (200, 100, 50),
    "cmyk.jpg": (255, 0, 0),
    "palette.gif": (0, 0, 0),
    "bits.png": (255, 255, 255),
    "deep.png": (0x4D, 0x4D, 0x4D),
    "pixel.png": (200, 100, 50),
}


@pytest.mark.parametrize("name", MODES)
def test_images_of_every_mode_become_rgb(name, tmp_path):
    mode, colour = MODES[name]
    size = (1, 1) if name == "pixel.png" else (48, 40)
    Image.new(mode, size, colour).save(tmp_path / name)
    split = sets.FileSplit([tmp_path / name], np.array([0]))
    found = keras_mnv2.resize_and_crop(split[0][0], size=32)
    assert found.shape == (32, 32, 3)
    # JPEG rounds.
    assert np.abs(found.astype(int) - EXPECTED[name]).max() <= (3 if name == "cmyk.jpg" else 0)
    again = keras_mnv2.load_image(io.BytesIO((tmp_path / name).read_bytes()))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(split[0][0]))


def test_an_image_of_unknown_range_is_refused_by_name(tmp_path):
    Image.new("F", (40, 40), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff.*32-bit"):
        sets.FileSplit([tmp_path / "float.tiff"], np.array([0]))[0]


def two_classes(folder):
    for name in ("train/a/1.png", "train/b/2.png"):
        picture(folder / name)


def bad_data(kind, folder):
    """The name of a data set with a fault."""
    if kind == "empty":
        return str(folder)
    if kind == "no images":
        (folder / "a").mkdir()
        (folder / "a" / "notes.txt").write_text("no image")
    if kind == "one class":
        for i in range(4):
            picture(folder / "only" / f"{i}.png")
    if kind == "one image a class":
        picture(folder / "a" / "0.png")
        picture(folder / "b" / "0.png")
    if kind == "unknown class":
        two_classes(folder)
        picture(folder / "test" / "c" / "3.png")
    if kind == "no train":
        picture(folder / "test" / "a" / "3.png")
        picture(folder / "test" / "b" / "3.png")
    if kind == "no labels":
        np.savez(folder / "a.npz", x_train=np.zeros((4, 32, 32, 3), "uint8"))
        return str(folder / "a.npz")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "must be a folder of class folders, got .*which has none"),
        ("no images", "dataset must have images .* in its class folders, got none in"),
        ("one class", "must have at least two classes, got one, 'only'"),
        ("one image a class", "must have two images of some class"),
        ("unknown class", "dataset must have no other classes than the 2 known ones, got 'c' in"),
        ("no train", "must have training images, got only test"),
        ("no labels", r"must hold the arrays x_train and y_train, got \['x_train'\]"),
    ],
)
def test_a_bad_data_set_is_one_sentence(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        sets.load(bad_data(kind, tmp_path), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_set", "./nowhere", "missing.npz", "a b"])
def test_an_unknown_data_set_is_one_sentence(name, tmp_path):
    with pytest.raises(ValueError, match=f"dataset must be .*, got {name!r}"):
        sets.load(name, 32, tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((4, 32, 32, 3), [0, 1, 2, 5], "labels of train must be whole numbers from 0 to 2, got 5"),
        ((4, 32, 32, 3), [0, 1, -1, 2], "labels of train must be whole numbers from 0 to 2, got -1"),
        ((4, 32, 32, 3), [0.5, 1, 2, 2], "labels of train must be whole numbers"),
        ((4, 32, 32, 3), [0, 1, 2], "must have images .* and as many labels"),
        ((4, 32), [0, 1, 2, 2], "must have images"),
        ((4, 32, 32, 3), [0, 1, np.nan, 2], "labels of train must be whole numbers"),
        ((4, 32, 32, 3), ["a", "b", "a", "b"], "labels of train must be whole numbers from 0 to 2, got a"),
    ],
)
def test_bad_arrays_are_one_sentence(images, labels, message):
    with pytest.raises(ValueError, match=message.replace("-", r"\-")):
        sets.from_arrays((np.full(images, 9, "uint8"), np.array(labels)), class_names=["a", "b", "c"])


def test_labels_that_are_no_classes_are_refused_without_names():
    with pytest.raises(ValueError, match=r"labels of train must be whole numbers from 0 to 1048575, got 1099511627776"):
        sets.from_arrays((np.full((2, 32, 32, 3), 9, "uint8"), np.array([0, 2**40])))


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (np.nan, "float32", "values from nan to nan"),
        (np.inf, "float16", "values from 90.0 to inf"),
        (-1, "int16", "values from -1 to 90"),
        (65535, "uint16", "values from 90 to 65535"),
        (1, "bool", "values of type bool"),
        (1, "complex64", "values of type complex64"),
    ],
)
def test_pixels_that_are_none_are_refused(value, dtype, told, tmp_path):
    images = np.full((4, 32, 32, 3), 90).astype(dtype)
    images[2, 3, 4, 1] = value
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=rf"^train must have images with values 0\.\.255, got {told}\.$"):
        sets.load(str(tmp_path / "a.npz"), 32)


@pytest.mark.parametrize("kind", ["truncated", "torn", "text", "objects", "array"])
def test_a_damaged_file_of_arrays_is_one_sentence(kind, tmp_path):
    path = tmp_path / "a.npz"
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("uint8")
    np.savez(path, x_train=np.array([{}], object) if kind == "objects" else images, y_train=np.array([0, 1, 0, 1]))
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if kind == "torn":
        path.write_bytes(content[:2000] + bytes(100) + content[2100:])
    if kind == "text":
        path.write_text("no arrays")
    if kind == "array":
        with open(path, "wb") as file:
            np.save(file, images)
    with pytest.raises(ValueError, match=r"^dataset must be a \.npz file.*a\.npz' is not: ") as caught:
        sets.load(str(path), 32)
    assert "\n" not in str(caught.value)
    assert kind == "objects" or "pickle" not in str(caught.value)


def test_images_between_0_and_1_are_refused():
    with pytest.raises(ValueError, match=r"values 0\.\.255"):
        sets.from_arrays((np.full((4, 32, 32, 3), 0.5), np.array([0, 1, 0, 1])))


def test_keras_reads_the_same_folder_the_same_way(tmp_path):
    for name in ("b", "a"):
        for i in range(3):
            picture(tmp_path / name / f"{i}.png", 10 * i)
    theirs = keras.utils.image_dataset_from_directory(tmp_path, shuffle=False, image_size=(36, 40), verbose=False)
    ours, names = sets.read(str(tmp_path), 32)
    assert list(names) == theirs.class_names
    assert ours["train"].labels.tolist() == np.concatenate([y for _, y in theirs]).tolist()
