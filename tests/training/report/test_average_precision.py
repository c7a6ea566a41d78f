"""mAP of a case that is counted by hand, and which images are the worst."""

import sys

import numpy as np
import pytest

import keras_mnv2
from tests.conftest import marks
from training.data.boxes import Objects
from training.report import average_precision, detection
from training.report.average_precision import Detections

# Nothing here computes with the backend.
pytestmark = marks("tensorflow")


def objects(*rows):
    """(left, top, right, bottom, class, ignored) of each object."""
    rows = np.reshape(rows, (-1, 6))
    return Objects(rows[:, :4].astype("float32"), rows[:, 4].astype(int), rows[:, 5].astype(bool))


def detections(*rows):
    """(left, top, right, bottom, class, score) of each detection."""
    rows = np.reshape(rows, (-1, 6))
    return Detections(rows[:, :4].astype("float32"), rows[:, 4].astype("int32"), rows[:, 5].astype("float32"))


# Two images, classes 0 to 2, of which the last has no object.
TRUTH = [
    objects((0, 0, 10, 10, 0, 0), (20, 20, 30, 30, 0, 0), (50, 50, 60, 60, 1, 0), (70, 70, 90, 90, 1, 1)),
    objects((0, 0, 10, 10, 0, 0)),
]
FOUND = [
    # Class 0: one that fits, one that is nowhere. Class 1: two within what is ignored, before one of IoU 0.8.
    detections(
        (0, 0, 10, 10, 0, 0.9),
        (40, 0, 50, 10, 0, 0.8),
        (70, 70, 80, 80, 1, 0.7),
        (70, 70, 80, 80, 1, 0.7),
        (50, 50, 60, 58, 1, 0.6),
    ),
    detections((0, 0, 10, 10, 0, 0.6)),
]


def test_the_mean_of_a_case_by_hand():
    found = average_precision.measure(TRUTH, FOUND, 3)
    first, second, third = found.per_class
    # Precision 1 up to recall 1/3, and 2/3 up to 2/3: of 101 recalls 34 and 33; the rest is 0.
    expected = (34 + 33 * 2 / 3) / 101
    assert first == {"objects": 3, **dict.fromkeys(("ap", "ap_50", "ap_75"), pytest.approx(expected))}
    whole = pytest.approx(1)
    # An IoU of 0.8 is enough for seven of ten.
    assert second == {"objects": 1, "ap": pytest.approx(0.7), "ap_50": whole, "ap_75": whole}
    assert third == {"objects": 0, "ap": None, "ap_50": None, "ap_75": None}
    assert found.mean_50 == pytest.approx((expected + 1) / 2)
    assert found.mean == pytest.approx((expected + 0.7) / 2)


def test_nothing_found_and_nothing_to_find():
    nothing = average_precision.measure(TRUTH, [detections(), detections()], 3)
    assert (nothing.mean, nothing.mean_50) == (0, 0)
    assert [row["ap"] for row in nothing.per_class] == [0, 0, None]
    empty = average_precision.measure([objects()], [detections((0, 0, 5, 5, 1, 0.9))], 3)
    assert empty.mean == 0


def test_what_is_missing_is_told(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ImportError, match=r'mAP needs pycocotools: pip install "keras_mnv2\[train\]"'):
        average_precision.measure(TRUTH, FOUND, 3)


def test_what_is_missed_and_wrong():
    value, missed, wrong = detection.quality(TRUTH[0], FOUND[0])
    assert (missed, wrong) == ([1], [1])
    assert value == pytest.approx((1 + 0.8) / 4)
    assert detection.quality(objects(), detections()) == (1, [], [])
    # A score below what is shown does not count, another class does not find, and an object is found once.
    once = detections((0, 0, 10, 10, 1, 0.9), (0, 0, 10, 10, 0, 0.8), (0, 0, 10, 10, 0, 0.7), (0, 0, 10, 10, 0, 0.4))
    assert detection.quality(TRUTH[1], once) == (pytest.approx(1 / 3), [], [0, 2])
    hidden = detections((70, 70, 90, 90, 2, 0.9))
    assert detection.quality(objects((70, 70, 90, 90, 2, 1)), hidden) == (1, [], [])


def test_boxes_are_drawn_with_names_and_scores():
    image, truth = np.full((64, 128, 3), 90, "uint8"), objects((10, 20, 60, 50, 2, 0))
    drawn = detection.with_boxes(image, truth, ["a", "b", "two"])
    assert drawn.shape == (128, 256, 3)
    names = ["a", "b", "two"]
    twice = np.full((128, 256, 3), 90, "uint8")
    wanted = {"boxes": np.array([[20, 40, 120, 100]]), "classes": np.array([2])}
    np.testing.assert_array_equal(drawn, keras_mnv2.draw_detections(twice, wanted, names))
    # The box's lower right corner has its class's colour, and the rest of the image its own.
    assert (drawn[100, 120] != 90).any()
    np.testing.assert_array_equal(drawn[100, 120], drawn[70, 20])
    np.testing.assert_array_equal(drawn[10, 10], [90, 90, 90])
    scored = detection.with_boxes(image, detections((10, 20, 60, 50, 2, 0.9)), names)
    assert (scored != drawn).any()
