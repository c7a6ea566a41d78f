import keras
import numpy as np
import pytest

from keras_mnv2.layers import DefaultBoxes, Detections, JoinMaps
from keras_mnv2.tasks.boxes import encode, overlaps
from tests.conftest import once


def detect(boxes, scores, side=100, **arguments):
    """Detections of these boxes (n, 4), by their scores of each class (n, classes)."""
    # One default box, the whole image, stands in each place.
    sides = (1, len(boxes) // 2)
    layer = Detections((side, side), [sides], (1.0, 1.0), ((),), **arguments)
    logits = np.log(np.concatenate([1 - scores.sum(axis=1, keepdims=True), scores], axis=1))
    found = layer([encode(boxes, layer.boxes)[None].astype("float32"), logits[None].astype("float32")])
    return {name: keras.ops.convert_to_numpy(y)[0] for name, y in found.items()}


def greedy(boxes, scores, threshold):
    """Indices of the boxes that stay, best first."""
    left, kept = list(np.argsort(-scores)), []
    over = overlaps(boxes, boxes)
    while left:
        kept.append(left[0])
        left = [i for i in left[1:] if over[kept[-1], i] <= threshold]
    return kept


@once
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_the_greedy_ones_stay(rng, threshold):
    corners = rng.uniform(0, 70, (80, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(10, 30, (80, 2))], axis=1)
    scores = rng.dirichlet(np.ones(3), 80)[:, :2]
    found = detect(boxes, scores, iou_threshold=threshold, score_threshold=0.1, max_detections=160)
    for label in range(2):
        kept = [i for i in greedy(boxes, scores[:, label], threshold) if scores[i, label] > 0.1]
        mine = found["classes"] == label
        assert 10 < len(kept) < 80
        np.testing.assert_allclose(found["boxes"][mine], boxes[kept], atol=1e-3)
        np.testing.assert_allclose(found["scores"][mine], scores[kept, label], atol=1e-5)
    assert (found["classes"] >= 0).sum() == (found["scores"] > 0).sum()
    assert not found["boxes"][found["classes"] < 0].any()


@once
def test_a_chain_of_boxes():
    # Each overlaps the next one alone, so that every second stays.
    left = np.arange(30) * 2.0
    boxes = np.stack([left, np.zeros(30), left + 4, np.full(30, 50.0)], axis=1)
    scores = np.linspace(0.9, 0.3, 30)[:, None]
    found = detect(boxes, scores, iou_threshold=0.3)
    np.testing.assert_allclose(found["boxes"][:15], boxes[::2], atol=1e-3)
    assert (found["classes"][15:] == -1).all()


def test_boxes_end_at_the_image():
    found = detect(np.array([[-50.0, -1, 150, 101], [10, 10, 400, 20]]), np.array([[0.9], [0.8]]))
    np.testing.assert_allclose(found["boxes"], [[0, 0, 100, 100], [10, 10, 100, 20]], atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "shapes", "match"),
    [
        (lambda: JoinMaps(4), [(1, 2, 2, 6)], "multiple of 4"),
        (lambda: JoinMaps(4), [(1, 8)], "multiple of 4"),
        (lambda: JoinMaps(0), [], "values must be"),
        (lambda: DefaultBoxes((64, 64), [(2, 2)], (0.2, 1.0), ((),)), [(1, 2, 2, 16)], "each of 8 default boxes"),
        (lambda: DefaultBoxes((64, 64), [(2, 2)], (0.2, 1.0), ((), ())), [], "scales must be a sequence of 3"),
        (lambda: DefaultBoxes((64,), [(2, 2)], (0.2, 1.0), ((),)), [], "image_size must be"),
        (lambda: DefaultBoxes((64, 64), [(2, 2)] * 2, (0.2, 1.0), ((),)), [], "map_sizes must be 1 times"),
    ],
)
def test_bad_arguments(layer, shapes, match):
    with pytest.raises(ValueError, match=match):
        layer()([np.zeros(shape, "float32") for shape in shapes])


def test_channels_first(rng):
    maps = [rng.normal(size=(2, 3, 5, 8)).astype("float32"), rng.normal(size=(2, 1, 1, 4)).astype("float32")]
    found = JoinMaps(4, "channels_first")([x.transpose(0, 3, 1, 2) for x in maps])
    expected = JoinMaps(4, "channels_last")(maps)
    assert expected.shape == (2, 31, 4)
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (found, expected)))


def test_a_layer_comes_back_from_its_config():
    layer = Detections((64, 32), [(2, 2)], (0.2, 1.0), ((2,),), reduce_lowest=True, iou_threshold=0.3, max_detections=7)
    again = Detections.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    np.testing.assert_array_equal(again.boxes, layer.boxes)
