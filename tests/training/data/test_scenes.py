"""Digits on photographs: parts that share nothing, masks and boxes that fit; the same for one seed; as files."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion

from tests.conftest import marks
from training import scenes as command
from training.data import boxes, masks, scenes, sets

# Nothing here computes with the backend.
pytestmark = marks("tensorflow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "digits"
    command.write(path, scenes.scenes(8, 48, seed=3), scenes.CLASS_NAMES)
    return path


def test_parts_share_neither_digits_nor_photographs():
    photographs = [name for names in scenes.PHOTOGRAPHS.values() for name in names]
    assert len(photographs) == len(set(photographs))
    scans = [scan.tobytes() for images, _ in sets.digit_scans().values() for scan in images]
    assert len(scans) == 1797
    assert set(scenes.PHOTOGRAPHS) == set(sets.SPLIT_NAMES) == set(scenes.FRACTIONS)


def test_masks_and_boxes_are_those_of_the_digits():
    for scene in scenes.Scenes("train", 12, 64):
        assert scene.image.shape == (64, 64, 3)
        assert 1 <= len(scene.classes) <= scenes.MOST_DIGITS
        np.testing.assert_array_equal(scene.mask > 0, scene.objects.any(axis=0))
        # No digit hides another.
        assert scene.objects.sum(axis=0).max() == 1
        for own, label, (left, top, right, bottom) in zip(scene.objects, scene.classes, scene.boxes, strict=True):
            assert set(np.unique(scene.mask[own])) == {label}
            rows, columns = np.nonzero(own)
            assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_ink_is_darker_than_its_paper():
    for scene in scenes.Scenes("train", 12, 64):
        for own in scene.objects:
            # The digit is inside of its margin of paper.
            brightness = scene.image[own].mean(axis=-1)
            rim = own & ~binary_erosion(own)
            assert scene.image[rim].mean() > brightness.mean() + 0.1 * scenes.CONTRAST
            assert np.ptp(brightness) >= scenes.CONTRAST


def test_a_scene_depends_on_seed_part_and_number_alone():
    one, other = scenes.Scenes("test", 3, 48, seed=5)[2], scenes.Scenes("test", 100, 48, seed=5)[2]
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.mask, other.mask)
    for different in (scenes.Scenes("test", 3, 48, seed=6)[2], scenes.Scenes("train", 3, 48, seed=5)[2]):
        assert (different.image != one.image).any()


def test_the_files_have_what_the_scenes_have(folder):
    dataset = masks.load(str(folder), 48)
    assert dataset.class_names == scenes.CLASS_NAMES
    for part, split in (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test)):
        expected = scenes.scenes(8, 48, seed=3)[part]
        assert len(split) == len(expected)
        found, names = boxes.read_coco(folder / part / "coco.json", folder / part / "images")
        voc, _ = boxes.read_voc(folder / part / "annotations", folder / part / "images", names)
        assert names == scenes.CLASS_NAMES[1:]
        for i, scene in enumerate(expected):
            image, mask = split[i]
            np.testing.assert_array_equal(np.asarray(image), scene.image)
            np.testing.assert_array_equal(mask, scene.mask)
            for one in (found[i], voc[i]):
                assert one.path == split.paths[i]
                assert one.size == (48, 48)
                np.testing.assert_array_equal(one.boxes, scene.boxes)
                np.testing.assert_array_equal(one.classes + 1, scene.classes)
                assert not one.ignored.any()


def test_the_runs_of_coco_are_the_masks(folder):
    content = json.loads((folder / "train" / "coco.json").read_text())
    first = scenes.scenes(8, 48, seed=3)["train"][0]
    rows = [row for row in content["annotations"] if row["image_id"] == 1]
    assert len(rows) == len(first.classes)
    for row, own in zip(rows, first.objects, strict=True):
        counts = row["segmentation"]["counts"]
        assert sum(counts) == 48 * 48
        values = np.repeat(np.arange(len(counts)) % 2, counts).reshape(48, 48, order="F")
        np.testing.assert_array_equal(values, own)
        assert row["area"] == own.sum()
    starts_inside = np.ones((2, 2), bool)
    assert list(command._runs(starts_inside)) == [0, 4]


def test_masks_have_the_colours_of_pascal_voc(folder):
    with Image.open(folder / "train" / "masks" / "00000.png") as mask:
        assert mask.mode == "P"
        colours = np.reshape(mask.getpalette(), (-1, 3))[:4]
    assert colours.tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]


def test_the_command_writes_a_whole_folder_or_none(tmp_path, monkeypatch, capsys):
    command.main(["--out", str(tmp_path / "new" / "digits"), "--images", "1", "--size", "32"])
    assert "1 + 1 + 1 images of 10 digits" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path / "new" / "digits")])
    assert "out must be a new or empty folder" in capsys.readouterr().err

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_voc", fail)
    with pytest.raises(OSError, match="could not be written: No space left on device"):
        command.write(tmp_path / "half", scenes.scenes(1, 32), scenes.CLASS_NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
