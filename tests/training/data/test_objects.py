"""Folders of images with boxes in each layout, and what is refused by one sentence that names the file."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.conftest import marks
from training import scenes as command
from training.data import objects, scenes
from training.data.boxes import Objects

# Nothing here computes with the backend.
pytestmark = marks("tensorflow")
PARTS = {"train": "train", "validation": "val", "test": "test"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What `python -m training.scenes` writes."""
    path = tmp_path_factory.mktemp("scenes") / "digits"
    command.write(path, scenes.scenes(4, 48), scenes.CLASS_NAMES)
    return path


def as_written(written, folder):
    shutil.copytree(written, folder)


def as_coco(written, folder, file="{}.json", images="{}"):
    (folder / "annotations").mkdir(parents=True)
    for part, name in PARTS.items():
        shutil.copytree(written / part / "images", folder / images.format(name))
        shutil.copy(written / part / "coco.json", folder / "annotations" / file.format(name))


def as_coco_names_them(written, folder):
    as_coco(written, folder, "instances_{}2017.json", "{}2017")
    # What says nothing of objects.
    (folder / "annotations" / "captions_train2017.json").write_text("{}")


def as_voc(written, folder):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for part, name in PARTS.items():
        found = sorted((written / part / "annotations").glob("*.xml"))
        for path in found:
            text = path.read_text().replace(path.stem, f"{name}_{path.stem}")
            (folder / "Annotations" / f"{name}_{path.name}").write_text(text)
            image = written / part / "images" / f"{path.stem}.png"
            shutil.copy(image, folder / "JPEGImages" / f"{name}_{path.stem}.png")
        lines = "".join(f"{name}_{path.stem}  1\n" for path in found)
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)


@pytest.mark.parametrize("layout", [as_written, as_coco, as_coco_names_them, as_voc])
def test_each_layout_has_the_images_and_their_objects(layout, written, tmp_path):
    layout(written, tmp_path / "folder")
    dataset = objects.load(str(tmp_path / "folder"), 48)
    expected = scenes.scenes(4, 48)
    # Of Pascal VOC those that there are.
    assert set(dataset.class_names) <= set(scenes.CLASS_NAMES[1:])
    assert layout is as_voc or dataset.class_names == scenes.CLASS_NAMES[1:]
    for part, split in (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test)):
        assert len(split) == len(expected[part])
        for i, scene in enumerate(expected[part]):
            image, found = split[i]
            np.testing.assert_array_equal(np.asarray(image), scene.image)
            np.testing.assert_array_equal(found.boxes, scene.boxes)
            names = [dataset.class_names[label] for label in found.classes]
            assert names == [scenes.CLASS_NAMES[label] for label in scene.classes]
    assert len(set(dataset.fingerprint().values())) == 4


def test_the_scenes_have_their_objects(monkeypatch):
    monkeypatch.setattr(objects, "SCENES_NUMBER", 3)
    dataset = objects.load("scenes", 48)
    image, found = dataset.train[2]
    scene = scenes.scenes(3, 48)["train"][2]
    np.testing.assert_array_equal(image, scene.image)
    np.testing.assert_array_equal(found.boxes, scene.boxes)
    assert [dataset.class_names[label] for label in found.classes] == [str(label - 1) for label in scene.classes]


def coco(folder, number=20, names=("cat",), change=lambda content: None, part="train"):
    """A file of COCO with so many images of 40x30 pixels and a box on each."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / part).mkdir(exist_ok=True)
    for i in range(number):
        Image.new("RGB", (40, 30)).save(folder / part / f"{i:02d}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i:02d}.png", "width": 40, "height": 30} for i in range(number)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 10, 10], "iscrowd": 0} for i in range(number)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    change(content)
    (folder / "annotations" / f"{part}.json").write_text(json.dumps(content))


def test_one_class_is_enough_and_some_images_are_held_out(tmp_path):
    coco(tmp_path)
    dataset = objects.load(str(tmp_path), 32)
    assert dataset.class_names == ("cat",)
    parts = [{split.name(i) for i in range(len(split))} for split in (dataset.train, dataset.validation, dataset.test)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len(set.union(*parts)) == 20


def test_an_image_of_another_size_than_its_annotation_says_is_named(tmp_path):
    coco(tmp_path)
    Image.new("RGB", (30, 40)).save(tmp_path / "train" / "00.png")
    split = objects.FileObjectSplit(objects._coco(tmp_path)[0]["train"])
    with pytest.raises(ValueError, match=r"that its annotation says, 40x30 pixels, got 30x40 in .*00\.png"):
        split[0]


def other_categories(folder):
    coco(folder, names=("cat", "dog"), part="val")


def only_crowds(folder):
    coco(folder, change=lambda content: [row.update(iscrowd=1) for row in content["annotations"]])


def two_files(folder):
    shutil.copy(folder / "annotations" / "train.json", folder / "annotations" / "instances_train.json")


def no_images(folder):
    shutil.rmtree(folder / "train")


def no_training(folder):
    (folder / "annotations" / "train.json").rename(folder / "annotations" / "test.json")
    (folder / "train").rename(folder / "test")


def nothing(folder):
    shutil.rmtree(folder / "annotations")


def voc_without_sets(folder):
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir()


def voc_without_annotations(folder):
    voc_without_sets(folder)
    (folder / "Annotations").rmdir()


def voc_of_a_missing_file(folder):
    voc_without_sets(folder)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")


def voc_of_an_empty_set(folder):
    voc_of_a_missing_file(folder)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_categories, "must have the same categories in all its files, got 2 (cat, dog) in"),
        (only_crowds, "must have boxes that count on its training images, got none"),
        (two_files, "must have one file of annotations for each part, got instances_train.json and train.json"),
        (no_images, "with the names of images that exist, got '00.png'"),
        (no_training, "must have training images, got only test"),
        (nothing, "must have annotations/train.json beside a folder train of images"),
        (voc_without_sets, "must have ImageSets/Main/train.txt beside JPEGImages, got none"),
        (voc_without_annotations, "must have Annotations beside JPEGImages, got none"),
        (voc_of_a_missing_file, "must have a file a.xml, got none in"),
        (voc_of_an_empty_set, "must have a name a line, got none"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change, told, tmp_path):
    coco(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=r"must have|must be") as caught:
        objects.load(str(tmp_path), 32)
    message = str(caught.value)
    assert told in message
    assert message.endswith(".")
    assert "\n" not in message


def test_what_is_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="dataset must be 'scenes' or a folder with images and boxes that exists"):
        objects.load(str(tmp_path / "gone"), 32)


def test_overlaps():
    one = np.array([[0.0, 0, 2, 2]])
    others = np.array([[0.0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 3, 3], [0, 0, 1, 1]])
    np.testing.assert_allclose(objects.overlaps(one, others), [[1, 1 / 3, 0, 0.25]])
    assert objects.overlaps(one, np.zeros((0, 4))).shape == (1, 0)


def test_a_fingerprint_knows_the_boxes():
    images = np.zeros((1, 4, 4, 3), "uint8")

    def split(right):
        own = Objects(np.array([[0, 0, right, 2]], "float32"), np.array([0]), np.array([False]))
        return objects.ArrayObjectSplit(images, [own])

    assert split(2).fingerprint() == split(2).fingerprint() != split(3).fingerprint()
