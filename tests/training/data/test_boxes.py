"""COCO's JSON and Pascal VOC's XML: what is read, and what is refused by one sentence that names the file."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import marks
from training.data import boxes

pytestmark = marks("tensorflow")

COCO = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "deep/a.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1.5, 2, 10, 20.25], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [-0.5, 0, 40.75, 30], "iscrowd": 1},
    ],
    "categories": [{"id": 90, "name": "cat"}, {"id": 5, "name": "dog"}],
}
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>
<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def voc(*objects, name="b.png", width="40"):
    inside = "".join(OBJECT.format(name=n, difficult=d, box=box) for n, d, box in objects)
    size = f"<size><width>{width}</width><height>30</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{size}{inside}</annotation>"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "b.png")
    Image.new("RGB", (20, 20)).save(folder / "deep" / "a.png")
    return folder


def test_coco(images, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    (first, second), names = boxes.read_coco(tmp_path / "a.json", images)
    # In the order of the ids.
    assert names == ("dog", "cat")
    assert (first.path, first.size) == (images / "b.png", (40, 30))
    np.testing.assert_array_equal(first.boxes, [[1.5, 2, 11.5, 22.25], [0, 0, 40, 30]])
    assert first.classes.tolist() == [1, 0]
    assert first.ignored.tolist() == [False, True]
    assert (second.path, second.boxes.shape, second.classes.shape) == (images / "deep" / "a.png", (0, 4), (0,))


def test_voc(images, tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "2.xml").write_text(voc(("dog", 0, (1, 1, 40, 30)), ("cat", 1, (2.5, 3, 9, 10))))
    (folder / "1.xml").write_text(voc(name="deep/a.png"))
    (empty, found), names = boxes.read_voc(folder, images)
    assert names == ("cat", "dog")
    assert len(empty.boxes) == 0
    np.testing.assert_array_equal(found.boxes, [[0, 0, 40, 30], [1.5, 2, 9, 10]])
    assert found.classes.tolist() == [1, 0]
    assert found.ignored.tolist() == [False, True]
    _, names = boxes.read_voc(folder, images, ("dog", "bird", "cat"))
    assert names == ("dog", "bird", "cat")


def test_boxes_without_area_are_left_out_with_a_warning(images, tmp_path):
    (tmp_path / "a.json").write_text(changed(annotations__1__bbox=[1, 2, 0, 4]))
    with pytest.warns(UserWarning, match="1 boxes of .* have no width or no height"):
        found, _ = boxes.read_coco(tmp_path / "a.json", images)
    assert sum(len(image.boxes) for image in found) == len(COCO["annotations"]) - 1


def changed(**changes):
    """The file with another value at a path such as `images.0.width`."""
    content = json.loads(json.dumps(COCO))
    for path, value in changes.items():
        *parts, last = path.split("__")
        inner = content
        for part in parts:
            inner = inner[int(part) if part.isdigit() else part]
        inner[int(last) if last.isdigit() else last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "which it is not"),
        ("[]", "with a list of objects 'images', got NoneType"),
        ("[" * 100_000, "which it is not"),
        (changed(images=[]), "with at least one file_name, got none"),
        (changed(categories=[1]), "with a list of objects 'categories'"),
        (changed(categories__0__id="90"), "each id, got '90'"),
        (changed(categories__0__id=5), "each id, got 5"),
        (changed(images__0__file_name=3), "a text as file_name of id 7, got 3"),
        (changed(images__0__file_name="../b.png"), "names of files below"),
        (changed(images__0__file_name="/etc/passwd"), "names of files below"),
        (changed(images__0__file_name="c.png"), "got 'c.png', of which there is none"),
        (changed(images__0__width=0), "width and height of image 7, got 0 and 30"),
        (changed(annotations__0__image_id=8), "a known image_id in annotation 1, got 8"),
        (changed(annotations__0__category_id=1), "a known category_id in annotation 1, got 1"),
        (changed(annotations__1__bbox=[1, 2, 3]), "a bbox of four numbers in annotation 2"),
        (changed(annotations__1__bbox=[1, 2, 3, "4"]), "a bbox of four numbers in annotation 2"),
        (changed(annotations__1__bbox=[1, 2, float("nan"), 4]), "a bbox of four numbers in annotation 2"),
        (changed(annotations__1__bbox=[1, 2, -3, 4]), "an area above 0, got -3 x 4 pixels in annotation 2"),
        (changed(annotations__1__bbox=[1, 2, 60, 4]), "inside of their image of 40x30 pixels"),
    ],
)
def test_a_bad_file_of_coco_is_one_sentence(content, told, images, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="must be COCO's JSON") as caught:
        boxes.read_coco(tmp_path / "a.json", images)
    assert told in str(caught.value)
    assert str(tmp_path / "a.json") in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("<annotation>", "which it is not"),
        ("<?xml version='1.0' encoding='nothing'?><annotation/>", "which it is not"),
        ("<!DOCTYPE a [<!ENTITY b 'bb'>]><annotation/>", "without a document type"),
        ("<annotation/>", "a number as size/width of the image, got None"),
        (voc(width="wide"), "a number as size/width of the image, got 'wide'"),
        (voc(width="0"), "sides above 0, got 0 and 30"),
        (voc(name="c.png"), "got 'c.png', of which there is none"),
        (voc(name=""), "names of files below"),
        (voc(("", 0, (1, 1, 2, 2))), "a name in object 1, got none"),
        (voc(("fox", 0, (1, 1, 2, 2))), "one of the 2 known names in object 1, got 'fox'"),
        (voc(("cat", 0, (1, 1, "inf", 2))), "a number as bndbox/xmax of object 1, got 'inf'"),
        (voc(("cat", 0, (9, 1, 2, 2))), "an area above 0, got -6 x 2 pixels in object 1"),
        (voc(("cat", 0, (1, 1, 50, 2))), "inside of their image of 40x30 pixels"),
    ],
)
def test_a_bad_file_of_voc_is_one_sentence(content, told, images, tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "1.xml").write_text(content)
    with pytest.raises(ValueError, match="must be Pascal VOC's XML") as caught:
        boxes.read_voc(folder, images, ("cat", "dog"))
    assert told in str(caught.value)
    assert str(folder / "1.xml") in str(caught.value)


def test_files_that_are_too_large_are_not_read(images, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    monkeypatch.setattr(boxes, "MOST_JSON", 10)
    with pytest.raises(ValueError, match="must have at most 10 bytes"):
        boxes.read_coco(tmp_path / "a.json", images)
    with pytest.raises(ValueError, match=r"must be a folder of \.xml files"):
        boxes.read_voc(images, images)
