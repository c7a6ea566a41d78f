"""A run of detection: on a folder, stopped and gone on, its measures and its report."""

import csv
import dataclasses
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import keras_mnv2
from tests import runs
from tests.conftest import once_on
from training import evaluate, evaluate_photographs
from training import scenes as command
from training.__main__ import RECIPES
from training.data import crops, objects, scenes
from training.data.objects import overlaps
from training.parallel import engines
from training.report import average_precision
from training.report.average_precision import Detections
from training.run import optimizers, train, validation
from training.state import signals
from training.state.signals import Stop, Stopped

CONFIG = RECIPES["detection"].CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "digits"
    command.write(path, scenes.scenes(8, 32), scenes.CLASS_NAMES)
    return path


def small(folder, run_dir, **changes):
    settings = {
        "dataset": str(folder),
        "image_size": 32,
        "epochs": 1,
        "batch_size": 4,
        "saved_model": False,
        "run_dir": run_dir,
        "learning_rate": 1e-3,
        "iou_crop": True,
        "ema": 0.5,
        "early_stopping": 2,
    }
    return dataclasses.replace(CONFIG, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(run folder, metrics) of a run of two epochs of two steps."""
    path = tmp_path_factory.mktemp("run") / "whole"
    return path, train.run(small(folder, path, epochs=2), "the command")


@once_on("torch")
def test_a_run_leaves_its_measures_and_the_worst_images(whole):
    path, found = whole
    assert found["test_images"] == 2
    assert 0 <= found["test_map"] <= found["test_map_50"] <= 1
    assert list(found["test_ap"]) == list(scenes.CLASS_NAMES[1:])
    assert json.loads((path / "metrics.json").read_text())["test_map"] == found["test_map"]
    (first, second) = csv.DictReader((path / "history.csv").read_text().splitlines())
    for row in (first, second):
        assert all(np.isfinite(float(row[key])) for key in ("loss", "val_loss", "val_map", "val_map_50"))
        assert float(row["loss"]) == pytest.approx(float(row["boxes_loss"]) + float(row["classes_loss"]), rel=1e-4)
    page = (path / "report.html").read_text("utf-8")
    for part in ("test mAP at IoU 0.5", "<code>the command</code>", "The worst images", ">AP</th>", "<h3>mAP</h3>"):
        assert part in page
    assert page.count('alt="The image with the detections"') == 2
    assert 'id="confusion"' not in page
    assert "test mAP" in (path / "report.md").read_text()


@once_on("torch")
def test_the_model_that_is_left_has_the_map(whole, folder):
    path, found = whole
    model = keras.models.load_model(path / "model.keras")
    test = crops.evaluation_batches(objects.load(str(folder), 32).test, 10, small(folder, None))
    images, truth = test[0]
    outputs = model.predict_on_batch(images)
    rows = zip(outputs["boxes"], outputs["classes"], outputs["scores"], strict=True)
    detections = [Detections(boxes[classes >= 0], classes[classes >= 0], scores[classes >= 0])
                  for boxes, classes, scores in rows]  # fmt: skip
    measures = average_precision.measure(truth, detections, 10)
    assert (measures.mean, measures.mean_50) == pytest.approx((found["test_map"], found["test_map_50"]), abs=1e-6)
    # It can go on from there.
    again = train.build_model(small(folder, None, alpha=None, weights=str(path / "model.keras")), 10, 3, 32)
    for new, old in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


@once_on("torch")
def test_an_evaluation_finds_what_the_test_of_the_run_found(whole, folder, tmp_path, capsys):
    path, found = whole
    evaluate.main([str(path), "--out", str(tmp_path / "page")])
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert (results["map"], results["map_50"]) == pytest.approx((found["test_map"], found["test_map_50"]), abs=1e-6)
    assert {row["name"]: row["ap"] for row in results["per_class"]} == found["test_ap"]
    assert (results["task"], results["images"], results["skipped"]) == ("detection", 2, {})
    assert f"mAP at IoU 0.5: {found['test_map_50']:.2%}" in told
    page = (tmp_path / "page" / "report.html").read_text("utf-8")
    assert page.count('alt="The image with the detections"') == 2
    assert ">AP</th>" in page
    # A file elsewhere has no run folder that knows the task and the data.
    (tmp_path / "model.keras").write_bytes((path / "model.keras").read_bytes())
    elsewhere = evaluate.Options(str(tmp_path / "model.keras"), str(folder), "detection", split="validation")
    assert evaluate.evaluate(elsewhere)["images"] == 1


@once_on("torch")
def test_photographs_that_cannot_be_read_are_left_out_and_told(whole, tmp_path, capsys):
    path, _ = whole
    data = tmp_path / "digits"
    command.write(data, scenes.scenes(10, 32), scenes.CLASS_NAMES)
    (data / "test" / "images" / "00001.png").write_bytes(b"no image")
    evaluate.main([str(path), "--dataset", str(data)])
    told = capsys.readouterr().out
    assert "1 images could not be read and were skipped" in told
    assert "00001.png" in told


@once_on("torch")
@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"resize": 40}, "resize must be left out for detection"),
        ({"batch_size": 4}, "batch_size must be left out for detection"),
        ({"split": "all"}, "split must be train, validation or test for detection, got 'all'"),
        ({"image_size": 64}, "image_size must be left out for"),
        ({"task": "segmentation"}, "model must be a segmentation network, got a detector"),
        ({"dataset": "none"}, "dataset must be 'scenes' or a folder"),
    ],
)
def test_what_an_evaluation_does_not_have_is_refused(whole, own, message):
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(evaluate.Options(str(whole[0]), **own))


@once_on("torch")
def test_a_model_of_other_classes_is_refused(whole, folder, tmp_path):
    names = ("background", "a")
    few = [dataclasses.replace(scene, classes=np.ones_like(scene.classes)) for scene in scenes.scenes(20, 32)["train"]]
    command.write(tmp_path / "few", {"train": few}, names)
    with pytest.raises(ValueError, match=r"model must have the 1 classes of the data set, got the class \d"):
        evaluate.evaluate(evaluate.Options(str(whole[0]), str(tmp_path / "few"), split="train"))


@once_on("torch")
def test_a_file_that_names_other_classes_is_refused(whole, monkeypatch):
    load = evaluate_photographs.TASKS["detection"][0]

    def named(*arguments, **options):
        network = load(*arguments, **options)
        network.labels = tuple(reversed(scenes.CLASS_NAMES[1:]))
        return network

    parts = evaluate_photographs.TASKS["detection"][1:]
    monkeypatch.setitem(evaluate_photographs.TASKS, "detection", (named, *parts))
    with pytest.raises(ValueError, match=r"classes of the data set in their order, 0, 1, .*, got 9, 8, "):
        evaluate.evaluate(evaluate.Options(str(whole[0])))


@once_on("torch")
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(whole, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # A machine with other work must not end the process within a step.
        patch.setattr(signals, "GRACE", 600.0)
        runs.signal_after(patch, 1, 1)
        with pytest.raises(Stopped):
            train.run(small(folder, tmp_path / "run", epochs=2))
    train.run(small(folder, tmp_path / "run", epochs=2, resume=True))
    runs.assert_same(runs.outcome(tmp_path / "run"), runs.outcome(whole[0]))


@once_on("torch")
def test_the_settings_reach_the_network():
    model = train.build_model(small(".", None, box_scales=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)), 3, 3, 64)
    layer = model.get_layer("boxes")
    assert (layer.scales, layer.reduce_lowest) == ((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), False)
    plain = train.build_model(small(".", None, box_scales=None, reduce_lowest=True), 3, 3, 64).get_layer("boxes")
    assert (plain.scales[0], plain.reduce_lowest) == (0.2, True)


@once_on("torch")
def test_several_devices_are_refused(folder):
    engine = engines.alone()
    engine.replicas = 2
    with pytest.raises(ValueError, match="task must be classification on several devices, got 'detection' on 2"):
        train.scaled(small(folder, None), engine)


@once_on("torch")
def test_pycocotools_is_asked_for_before_the_training(folder, monkeypatch):
    monkeypatch.setattr(train, "installed", lambda *packages: "pycocotools" not in packages)
    with pytest.raises(ImportError, match=r'pycocotools for its mAP: pip install "keras_mnv2\[train\]"'):
        train.check_packages(small(folder, None))


@pytest.fixture(scope="module")
def network():
    return keras_mnv2.SSDLite((32, 32, 3), alpha=0.35, weights_backbone=None, classes=10)


def test_who_says_the_targets_detects_all_objects(network, folder):
    batches = crops.evaluation_batches(objects.load(str(folder), 32).train, 10, small(folder, None))
    batches.for_model(network)
    _, truth = batches[0]
    targets = batches.encode(truth)
    # Every other image has nothing found.
    logits = 20 * np.eye(11, dtype="float32")[targets["classes"]]
    logits[1::2] = [20, *[0] * 10]
    outputs = {"boxes": targets["boxes"][..., :4], "classes": logits}
    batches.split = objects.FileObjectSplit(batches.split.annotations[:4])
    read, found, loss = validation.detections(SimpleNamespace(stop=Stop()), lambda images: outputs, batches)
    assert [len(one.boxes) for one in read] == [len(one.boxes) for one in truth]
    for one, other, label in zip(read, found, range(4), strict=True):
        # Boxes that are alike go, and what is left is at the objects.
        assert set(other.classes) == (set() if label % 2 else set(one.classes))
        if not label % 2:
            assert overlaps(one.boxes, other.boxes).max(axis=1).min() > 0.95
    missed = targets["boxes"][1::2, :, 4].sum()
    # A box that is missed costs 20, and those of the background next to nothing.
    assert loss == pytest.approx(20 * missed / targets["boxes"][..., 4].sum(), rel=1e-3)


def test_the_means_of_all_losses_are_there_before_the_first_step(network, folder):
    means = optimizers.compile_model(network, small(folder, None), 2)
    assert [mean.name for mean in means] == ["loss", "boxes_loss", "classes_loss"]
    assert [float(mean.result()) for mean in means] == [0, 0, 0]
