"""Random changes of images with boxes: boxes stay on their objects, the same for one seed, and become targets."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.conftest import marks
from training.__main__ import RECIPES
from training.data import crops
from training.data.boxes import Objects
from training.data.objects import ArrayObjectSplit, overlaps

# Nothing here computes with the backend.
pytestmark = marks("tensorflow")
PLAIN = {"iou_crop": False, "zoom_out": 1.0, "photometric": False, "flip": False}
CONFIG = dataclasses.replace(RECIPES["detection"].CONFIG, image_size=64, batch_size=4, workers=1, **PLAIN)
# Colours by which an object is known again.
COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]])


def painted(rng, width=120, height=90, number=3, ignored=()):
    """An image with rectangles of one colour each, which do not touch, and these as objects."""
    image = np.full((height, width, 3), 60, "uint8")
    boxes = []
    for i in range(number):
        left = 4 + 38 * i + rng.integers(0, 8)
        top = rng.integers(2, height - 40)
        boxes.append([left, top, left + rng.integers(18, 28), top + rng.integers(18, 38)])
        image[boxes[-1][1] : boxes[-1][3], boxes[-1][0] : boxes[-1][2]] = COLOURS[i]
    return image, Objects(np.array(boxes, "float32"), np.arange(number), np.isin(np.arange(number), ignored))


def found_again(pixels, label):
    """Left, top, right and bottom of what has a class's colour."""
    near = np.abs(pixels.astype(int) - COLOURS[label]).max(axis=-1) < 120
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"flip": True}, {"iou_crop": True}, {"zoom_out": 3.0}, {"iou_crop": True, "zoom_out": 2.0, "flip": True}],
)
def test_boxes_stay_on_their_objects(changes, rng):
    images, own = zip(*(painted(rng) for _ in range(40)), strict=True)
    split = ArrayObjectSplit(np.stack(images), own)
    batches = crops.training_batches(split, 3, dataclasses.replace(CONFIG, **changes))
    seen = 0
    for i in range(40):
        pixels, objects = batches.example(i, np.random.default_rng((1, i)))
        assert pixels.shape == (64, 64, 3)
        assert objects.boxes.dtype == "float32"
        assert len(set(objects.classes)) == len(objects.classes) >= 1
        for box, label in zip(objects.boxes, objects.classes, strict=True):
            # Of a thin rest smoothing leaves no whole pixel.
            if min(box[2] - box[0], box[3] - box[1]) >= 5:
                np.testing.assert_allclose(found_again(pixels, label), box, atol=1.01)
                seen += 1
    assert seen > 40


def test_a_batch_depends_on_its_place_alone(rng):
    images, own = zip(*(painted(rng) for _ in range(8)), strict=True)
    config = dataclasses.replace(CONFIG, iou_crop=True, zoom_out=2.0, photometric=True, flip=True)
    split = ArrayObjectSplit(np.stack(images), own)
    one, other = (crops.training_batches(split, 3, config) for _ in range(2))
    one.batch(0, 0)
    (images, objects), (again, others) = one.batch(3, 1), other.batch(3, 1)
    np.testing.assert_array_equal(images, again)
    for a, b in zip(objects, others, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
    assert (one.batch(2, 1)[0] != images).any()


def test_crops_overlap_as_they_were_drawn(rng):
    _, own = painted(rng)
    config = dataclasses.replace(CONFIG, iou_crop=True)
    best = []
    for i in range(300):
        box = crops.random_crop((120, 90), own, config, np.random.default_rng(i))
        assert (np.array(box) >= (0, 0, 0, 0)).all()
        assert (np.array(box) <= (120, 90, 120, 90)).all()
        assert crops.centre_inside(own.boxes, box).any()
        if box != (0, 0, 120, 90):
            assert 0.5 <= (box[2] - box[0]) / (box[3] - box[1]) <= 2
            best.append(overlaps(np.array([box]), own.boxes).max())
    # Small objects are never most of a crop, so that some tries end with the whole.
    assert 80 < len(best) < 280
    assert max(best) > 0.3
    nothing = Objects(np.zeros((0, 4), "float32"), np.zeros(0, int), np.zeros(0, bool))
    assert {crops.random_crop((9, 5), nothing, config, np.random.default_rng(i)) for i in range(9)} == {(0, 0, 9, 5)}


def test_a_canvas_is_grey_around_the_image(rng):
    image, own = painted(rng)
    pixels, objects = crops.crop(Image.fromarray(image), own, (-120.0, -90.0, 120.0, 90.0), 64)
    pixels = np.asarray(pixels)
    assert (pixels[:32] == 127).all()
    assert (pixels[:, :32] == 127).all()
    assert (pixels[33:, 33:] != 127).any()
    np.testing.assert_allclose(objects.boxes, own.boxes * ([64 / 240, 64 / 180] * 2) + 32, atol=1e-4)


def test_objects_whose_centre_is_outside_go(rng):
    image, own = painted(rng)
    left, _, right, _ = own.boxes[1]
    _, objects = crops.crop(Image.fromarray(image), own, (float((left + right) / 2 + 0.5), 0.0, 120.0, 90.0), 64)
    assert objects.classes.tolist() == [2]
    _, objects = crops.crop(Image.fromarray(image), own, (float((left + right) / 2 - 0.5), 0.0, 120.0, 90.0), 64)
    assert objects.classes.tolist() == [1, 2]
    assert objects.boxes[0, 0] == 0


def test_colours_change_and_boxes_do_not(rng):
    image, own = painted(rng)
    split = ArrayObjectSplit(np.stack([image]), [own])
    plain, distorted = (
        crops.training_batches(split, 3, dataclasses.replace(CONFIG, photometric=on)) for on in (False, True)
    )
    expected, objects = plain.example(0, np.random.default_rng(0))
    changed = [distorted.example(0, np.random.default_rng(i)) for i in range(8)]
    assert sum((pixels != expected).any() for pixels, _ in changed) >= 6
    for pixels, found in changed:
        np.testing.assert_array_equal(found.boxes, objects.boxes)
        assert np.abs(pixels.astype(int) - expected).mean() < 60
    # A whole turn of the hues leaves them as they are.
    assert crops.HUE < 0.5


def test_an_evaluation_has_whole_images_and_all_objects(rng):
    image, own = painted(rng, ignored=[1])
    split = ArrayObjectSplit(np.stack([image] * 3), [own] * 3)
    config = dataclasses.replace(CONFIG, iou_crop=True, zoom_out=2.0, photometric=True, flip=True, batch_size=2)
    batches = crops.evaluation_batches(split, 3, config)
    assert batches.image_shape == (64, 64, 3)
    (images, objects), (rest, _) = batches.stream(epochs=1)
    assert (images.shape, images.dtype, len(rest)) == ((2, 64, 64, 3), "float32", 1)
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_allclose(objects[0].boxes, own.boxes * ([64 / 120, 64 / 90] * 2), atol=1e-4)
    assert objects[0].ignored.tolist() == [False, True, False]


def test_targets_are_those_of_the_encoder(rng):
    import keras_mnv2

    image, own = painted(rng, width=64, height=64, number=1)
    other = dataclasses.replace(own, ignored=np.array([True]))
    split = ArrayObjectSplit(np.stack([image] * 4), [own, own, other, own])
    model = keras_mnv2.SSDLite((64, 64, 3), alpha=0.35, weights_backbone=None, classes=3)
    batches = crops.training_batches(split, 3, CONFIG)
    batches.for_model(model)
    _, targets = batches.batch(0, 0)
    order = batches._order(0).tolist()
    expected = keras_mnv2.TargetEncoder(model)([own.boxes] * 4, [[0] if i != 2 else [-1] for i in order])
    for name, array in targets.items():
        np.testing.assert_array_equal(array, expected[name])
    assert not targets["classes"][order.index(2)].any()
    assert targets["classes"][order.index(0)].any()
