"""A run of segmentation: on the scenes and on a folder, stopped and gone on, its measures and its report."""

import csv
import dataclasses
import json

import keras
import numpy as np
import pytest

from tests import runs
from tests.conftest import once
from training import evaluate
from training import scenes as command
from training.__main__ import RECIPES
from training.config import FOREIGN, Config
from training.data import masks, scenes, windows
from training.report import metrics
from training.report.segmentation import painted
from training.run import optimizers, train
from training.state import signals
from training.state.signals import Stopped

CONFIG = RECIPES["segmentation"].CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "digits"
    command.write(path, scenes.scenes(8, 32), scenes.CLASS_NAMES)
    return path


def small(folder, run_dir, **changes):
    settings = {
        "dataset": str(folder),
        "image_size": 32,
        "output_stride": 16,
        "epochs": 1,
        "batch_size": 4,
        "saved_model": False,
        "run_dir": run_dir,
        "learning_rate": 1e-3,
        "ema": 0.5,
        "early_stopping": 2,
    }
    return dataclasses.replace(CONFIG, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(run folder, metrics) of a run of two epochs."""
    path = tmp_path_factory.mktemp("run") / "whole"
    return path, train.run(small(folder, path, epochs=2), "the command")


@once
def test_a_run_leaves_its_measures_and_the_worst_images(whole):
    path, found = whole
    assert found["test_images"] == 2
    assert 0 <= found["test_mean_iou"] <= 1
    assert list(found["test_iou"]) == list(scenes.CLASS_NAMES)
    assert json.loads((path / "metrics.json").read_text())["test_mean_iou"] == found["test_mean_iou"]
    (first, second) = csv.DictReader((path / "history.csv").read_text().splitlines())
    assert all(0 <= float(row[key]) <= 1 for row in (first, second) for key in ("mean_iou", "val_mean_iou"))
    assert float(second["learning_rate"]) == pytest.approx(0, abs=1e-9)
    page = (path / "report.html").read_text("utf-8")
    for part in ("test mean IoU", "<code>the command</code>", "The worst images", ">IoU</th>", "Mean IoU"):
        assert part in page
    assert page.count("under the colours of the predictions") == 2
    assert "test mean IoU" in (path / "report.md").read_text()


@once
def test_the_model_that_is_left_has_the_mean_iou(whole, folder):
    path, found = whole
    model = keras.models.load_model(path / "model.keras")
    test = windows.evaluation_batches(masks.load(str(folder), 32).test, 11, small(folder, None))
    matrix = 0
    for images, labels in test.stream(epochs=1):
        scores = model.predict_on_batch(images)
        np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
        matrix = matrix + metrics.pixel_matrix(labels, scores.argmax(-1), 11)
    assert metrics.mean_iou(matrix) == pytest.approx(found["test_mean_iou"])
    assert np.trace(matrix) / matrix.sum() == pytest.approx(found["test_pixel_accuracy"])


@once
def test_an_evaluation_finds_what_the_test_of_the_run_found(whole, folder, tmp_path, capsys):
    path, found = whole
    evaluate.main([str(path), "--out", str(tmp_path / "page")])
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert results["mean_iou"] == pytest.approx(found["test_mean_iou"], abs=1e-6)
    assert results["pixel_accuracy"] == pytest.approx(found["test_pixel_accuracy"], abs=1e-6)
    assert {row["name"]: row["iou"] for row in results["per_class"]} == pytest.approx(found["test_iou"], nan_ok=True)
    assert f"mean IoU: {found['test_mean_iou']:.2%}" in told
    page = (tmp_path / "page" / "report.html").read_text("utf-8")
    assert page.count("under the colours of the predictions") == 2
    # Photographs of another size keep it: their own pixels count.
    data = tmp_path / "large"
    command.write(data, scenes.scenes(8, 48), scenes.CLASS_NAMES)
    larger = evaluate.evaluate(evaluate.Options(str(path), str(data)))
    assert sum(row["pixels"] for row in larger["per_class"]) == larger["images"] * 48 * 48
    with pytest.raises(ValueError, match="model must be a classifier, got a segmentation network"):
        evaluate.evaluate(evaluate.Options(str(path), task="classification"))


@once
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(whole, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # A machine with other work must not end the process within a step.
        patch.setattr(signals, "GRACE", 600.0)
        runs.signal_after(patch, 1, 1)
        with pytest.raises(Stopped):
            train.run(small(folder, tmp_path / "run", epochs=2))
    train.run(small(folder, tmp_path / "run", epochs=2, resume=True))
    runs.assert_same(runs.outcome(tmp_path / "run"), runs.outcome(whole[0]))


@once
def test_a_backbone_starts_with_a_classifiers_weights(folder, tmp_path):
    import keras_mnv2

    classifier = keras_mnv2.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=7)
    path = str(tmp_path / "classifier.weights.h5")
    classifier.save_weights(path)
    model = train.build_model(small(folder, None, alpha=None, weights_backbone=path), 11, 3, 32)
    found = model.get_layer("block_3_expand").get_weights()[0]
    np.testing.assert_array_equal(found, classifier.get_layer("block_3_expand").get_weights()[0])


def test_several_devices_are_refused(folder):
    from training.parallel import engines

    engine = engines.alone()
    engine.replicas = 2
    with pytest.raises(ValueError, match="task must be classification on several devices, got 'segmentation' on 2"):
        train.scaled(small(folder, None), engine)


VALUES = {bool: True, int: 3, float: 0.25}
CHOSEN = {
    "weights_backbone": "imagenet",
    "output_stride": 8,
    "box_scales": (0.2,) * 7,
    "reduce_lowest": False,
    "zoom_out": 2.0,
    "evaluation_size": 64,
    "rescale": 2.0,
    "data_dir": "/data",
    "stages": ((1, 16, 1, 1),),
    "unfreeze_from": "block_12",
    "crop_area": 0.5,
    "resize": 256,
    "stem_stride": 1,
    "label_smoothing": 0.1,
}


@once
@pytest.mark.parametrize(("task", "name"), [(task, name) for task in FOREIGN for name in FOREIGN[task]])
def test_settings_that_a_task_does_not_have_are_refused(task, name):
    recipe = {"classification": "digits"}.get(task, task)
    default = {field.name: field.default for field in dataclasses.fields(Config)}[name]
    value = CHOSEN.get(name, VALUES.get(type(default)))
    message = f"^{name} must be left at .* for the task {task}, which does not have it, got"
    # `digits` has some of them at other values.
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES[recipe].CONFIG, **{name: value})


@once
def test_weights_have_a_backbone():
    with pytest.raises(ValueError, match="weights_backbone must be left out where weights are given"):
        dataclasses.replace(CONFIG, weights="a.h5", weights_backbone="b.h5")


@once
def test_intersections_over_unions_are_those_of_sets(rng):
    labels, found = rng.integers(0, 4, (2, 5, 30))
    labels[0, :7] = 255
    matrix = metrics.pixel_matrix(labels, found, 5)
    counted = labels != 255
    for label, iou in zip(range(5), metrics.intersection_over_union(matrix), strict=True):
        one, other = (set(np.flatnonzero(counted.ravel() & (array.ravel() == label))) for array in (labels, found))
        assert np.isnan(iou) if label == 4 else iou == pytest.approx(len(one & other) / len(one | other))
    expected = keras.metrics.MeanIoU(5, ignore_class=255)
    expected.update_state(labels, found)
    assert metrics.mean_iou(matrix) == pytest.approx(float(expected.result()))
    assert metrics.mean_iou(np.zeros((3, 3), int)) == 0
    rows = metrics.per_class_of_pixels(matrix, list("abcde"))
    assert rows[4] == {"name": "e", "pixels": 0, "iou": None, "accuracy": None, "precision": None}
    assert sum(row["pixels"] for row in rows) == 143


@once
def test_pictures_show_the_labels_in_colours():
    image = np.full((2, 2, 3), 100, "uint8")
    found = painted(image, np.array([[0, 1], [2, 255]], "uint8"))
    assert found.tolist() == [[[40, 40, 40], [117, 40, 40]], [[40, 117, 40], [193, 193, 193]]]


def test_the_poly_schedule_follows_its_formula():
    config = dataclasses.replace(CONFIG, epochs=4, learning_rate=0.3, warmup_epochs=1.0)
    rates = optimizers.learning_rates(config, steps_per_epoch=5)
    for step in (0, 2, 5, 9, 19, 20):
        expected = 0.3 * (step / 5 if step < 5 else (1 - (step - 5) / 15) ** 0.9)
        assert float(keras.ops.convert_to_numpy(rates(step))) == pytest.approx(expected, abs=1e-6)


def test_the_measure_of_a_step_is_keras_own(rng):
    labels, scores = rng.integers(0, 5, (2, 6, 7)), rng.normal(size=(2, 6, 7, 5)).astype("float32")
    labels[0, :2] = 255
    options = {"ignore_class": 255, "sparse_y_pred": False}
    found, expected = optimizers.PixelIoU(5, **options), keras.metrics.MeanIoU(5, **options)
    for part in (slice(0, 1), slice(1, 2)):
        for metric in (found, expected):
            metric.update_state(labels[part], scores[part])
    assert float(found.result()) == pytest.approx(float(expected.result()))
