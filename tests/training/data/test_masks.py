"""Folders of images and masks, their batches, and what is refused by one sentence that names the file."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.conftest import marks
from training.__main__ import RECIPES
from training.data import masks, windows
from training.data.masks import IGNORED

# Nothing here computes with the backend.
pytestmark = marks("tensorflow")
CONFIG = dataclasses.replace(RECIPES["segmentation"].CONFIG, image_size=32, batch_size=2, workers=1)


def pair(folder, name, labels, size=None, suffix="jpg", mode="L"):
    """An image, and a mask of an array of labels."""
    labels = np.asarray(labels, "uint8")
    size = size or labels.shape[::-1]
    for path, picture in (
        (folder / "images" / f"{name}.{suffix}", Image.new("RGB", size, (90, 120, 200))),
        (folder / "masks" / f"{name}.png", Image.fromarray(labels).convert(mode)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def square(side=8, label=2):
    labels = np.zeros((side, side), "uint8")
    labels[2:5, 3:7] = label
    labels[0] = IGNORED
    return labels


def test_a_folder_with_parts_and_names(tmp_path):
    pair(tmp_path / "train", "b", square())
    pair(tmp_path / "train", "deep/a", square(label=1), suffix="PNG")
    pair(tmp_path / "val", "c", square())
    (tmp_path / "train" / "images" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "train" / "masks" / "notes.txt").write_text("no mask")
    (tmp_path / "classes.txt").write_text("ground\nroad\ncar\n\n")
    dataset = masks.load(str(tmp_path), 32)
    assert dataset.class_names == ("ground", "road", "car")
    assert [path.name for path in dataset.train.paths] == ["b.jpg", "a.PNG"]
    assert dataset.test is dataset.validation
    image, mask = dataset.train[0]
    assert (image.mode, image.size, mask.dtype) == ("RGB", (8, 8), "uint8")
    np.testing.assert_array_equal(mask, square())
    before = dataset.fingerprint()
    pair(tmp_path / "train", "d", square())
    assert masks.load(str(tmp_path), 32).fingerprint()["training"] != before["training"]


def test_a_folder_without_parts_holds_some_out(tmp_path):
    for i in range(20):
        pair(tmp_path, f"{i:02d}", square(label=1 + i % 3))
    dataset = masks.load(str(tmp_path), 32)
    assert dataset.class_names == ("0", "1", "2", "3")
    parts = [{split.name(i) for i in range(len(split))} for split in (dataset.train, dataset.validation, dataset.test)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len(set.union(*parts)) == 20


def test_palettes_and_bits_are_labels(tmp_path):
    labels = square(label=1) % IGNORED
    pair(tmp_path, "bits", labels)
    Image.fromarray(labels > 0).save(tmp_path / "masks" / "bits.png")
    palette = Image.fromarray(labels, "P")
    palette.putpalette([255, 0, 0] * 256)
    palette.save(tmp_path / "palette.png")
    for path, mode in ((tmp_path / "masks" / "bits.png", "1"), (tmp_path / "palette.png", "P")):
        with Image.open(path) as picture:
            assert picture.mode == mode
        np.testing.assert_array_equal(masks.read_mask(path), labels)


def rgb(folder):
    Image.new("RGB", (8, 8)).save(folder / "masks" / "b.png")


def other_size(folder):
    pair(folder, "b", square(), size=(9, 8))


def large_label(folder):
    (folder / "classes.txt").write_text("ground\nroad\ncar\n")
    pair(folder, "b", square(label=3))


def no_mask(folder):
    (folder / "masks" / "b.png").unlink()


def no_image(folder):
    (folder / "images" / "b.jpg").unlink()


def two_images(folder):
    pair(folder, "b", square(), suffix="png")


def broken(folder):
    (folder / "masks" / "b.png").write_bytes(b"no image")


def black_and_white(folder):
    pair(folder, "a", 255 * (square() > 0))
    pair(folder, "b", 255 * (square() > 0))


def few_names(folder):
    (folder / "classes.txt").write_text("ground\n")


def no_text(folder):
    (folder / "classes.txt").write_bytes(b"\xff\xfe\xff")


@pytest.mark.parametrize(
    ("change", "file", "told"),
    [
        (rgb, "masks/b.png", "A mask must be grey or have a palette, with the labels as its values, got RGB pixels"),
        (other_size, "masks/b.png", "A mask must have the size of its image, 9x8 pixels, got 8x8"),
        (large_label, "masks/b.png", "A mask must have labels from 0 to 2, or 255 for what does not count, got 3"),
        (no_mask, "images/b.jpg", "dataset must have a mask for each image, got none in"),
        (no_image, "masks/b.png", "dataset must have an image for each mask, got none in"),
        (two_images, "images/b.png", "dataset must have one file of each name, got"),
        (broken, "masks/b.png", "cannot be read as a mask"),
        (black_and_white, "", "got 0 and 255 alone"),
        (few_names, "classes.txt", "must have 2 to 255 names, a line each, got 1"),
        (no_text, "classes.txt", "must have a name a line in UTF-8"),
    ],
)
def test_what_does_not_fit_is_one_sentence_that_names_the_file(change, file, told, tmp_path):
    pair(tmp_path, "a", square())
    pair(tmp_path, "b", square())
    change(tmp_path)
    with pytest.raises(ValueError, match=r"must|cannot") as caught:
        masks.load(str(tmp_path), 32)
    message = str(caught.value)
    assert told in message
    assert str(tmp_path / file) in message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder / "gone", "dataset must be 'scenes' or a folder"),
        (lambda folder: folder, "dataset must have folders images and masks"),
        (lambda folder: (folder / "images").mkdir() or folder, "dataset must have a folder masks, got none at"),
    ],
)
def test_what_is_no_data_set_is_one_sentence(make, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        masks.load(str(make(tmp_path)), 32)


def test_an_image_that_cannot_be_read_is_left_out_and_named(tmp_path):
    for name in ("a", "b", "c"):
        pair(tmp_path / "train", name, square(32))
    (tmp_path / "train" / "images" / "b.jpg").write_bytes(b"no image")
    dataset = masks.load(str(tmp_path), 32)
    split = masks.MaskFileSplit(*(sorted((tmp_path / "train" / part).iterdir()) for part in ("images", "masks")))
    batches = windows.evaluation_batches(split, len(dataset.class_names), CONFIG)
    assert [len(images) for images, _ in batches.stream(epochs=1)] == [1, 1]
    assert list(batches.unreadable) == [str(tmp_path / "train" / "images" / "b.jpg")]


def test_windows_change_image_and_mask_alike(rng):
    """A mask that says what is in the image still does, wherever it counts."""
    labels = rng.integers(0, 3, (6, 8)).repeat(10, axis=0).repeat(10, axis=1).astype("uint8")
    image = (80 * labels)[..., None].repeat(3, axis=-1)
    split = masks.ArrayMaskSplit(image[None].repeat(4, axis=0), labels[None].repeat(4, axis=0))
    config = dataclasses.replace(CONFIG, rescale=2.0, flip=True, image_size=48)
    batches = windows.training_batches(split, 3, config)
    images, targets = zip(*(batches.batch(epoch, i) for epoch in range(8) for i in range(2)), strict=True)
    images, targets = np.concatenate(images), np.concatenate(targets)
    assert (images.dtype, targets.dtype, images.shape, targets.shape) == (
        "float32",
        "int32",
        (32, 48, 48, 3),
        (32, 48, 48),
    )
    counted = targets != IGNORED
    assert 0.05 < (~counted).mean() < 0.7
    np.testing.assert_array_equal(images[~counted], 127)
    # Edges are smooth in the image, and sharp in the mask.
    assert (np.abs(images[..., 0] - 80 * targets)[counted] < 20).mean() > 0.85
    assert len({target.tobytes() for target in targets}) == 32
    again = windows.training_batches(split, 3, config).batch(3, 1)
    np.testing.assert_array_equal(again[0], images[14:16])


def test_flips_mirror_half_of_the_pairs(rng):
    labels = rng.integers(0, 3, (40, 32, 32)).astype("uint8")
    split = masks.ArrayMaskSplit((80 * labels)[..., None].repeat(3, axis=-1), labels)
    batches = windows.training_batches(split, 3, dataclasses.replace(CONFIG, rescale=1.0, flip=True, batch_size=40))
    images, targets = batches.batch(0, 0)
    np.testing.assert_array_equal(images[..., 0], 80 * targets)
    order = batches._order(0)
    mirrored = [np.array_equal(target, labels[i][:, ::-1]) for i, target in zip(order, targets, strict=True)]
    same = [np.array_equal(target, labels[i]) for i, target in zip(order, targets, strict=True)]
    assert 8 < sum(mirrored) < 32
    assert sum(mirrored) + sum(same) == 40


@pytest.mark.parametrize(("shape", "inside"), [((20, 30), (20, 30)), ((32, 32), (32, 32)), ((64, 96), (21, 32))])
def test_an_evaluation_has_whole_images(shape, inside, rng):
    labels = np.ones(shape, "uint8")
    split = masks.ArrayMaskSplit(rng.integers(0, 256, (1, *shape, 3), "uint8"), labels[None])
    images, targets = windows.evaluation_batches(split, 2, CONFIG)[0]
    expected = np.full((1, 32, 32), IGNORED)
    expected[0, : inside[0], : inside[1]] = 1
    np.testing.assert_array_equal(targets, expected)
    if shape == inside:
        np.testing.assert_array_equal(images[0, : shape[0], : shape[1]], split.images[0])
