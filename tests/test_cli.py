"""The command line: what it prints, and how it fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

import keras_mnv2
from keras_mnv2.cli import main
from tests.helpers import randomise


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photographs and a file of weights, on one folder: (folder, model)."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("china", "flower"):
        index = ("china", "flower").index(name)
        Image.fromarray(load_sample_images().images[index]).save(folder / f"{name}.jpg")
    Image.fromarray(data.coffee()).save(folder / "coffee.png")
    model = keras_mnv2.MobileNetV2((224, 224, 3), alpha=0.35, weights=None, include_preprocessing=True)
    randomise(model, np.random.default_rng(0), np.random.default_rng(0).uniform(0, 255, (4, 224, 224, 3)))
    keras_mnv2.save_weights(model, folder / "weights.h5", "keras")
    return folder, model


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_predict(files, capsys):
    folder, model = files
    images = [folder / "china.jpg", folder / "coffee.png"]
    options = ("--weights", folder / "weights.h5", "--alpha", 0.35, "--top", 3)
    status, out, _ = run(capsys, "predict", *images, *options, "--json")
    assert status == 0
    found = json.loads(out)
    pixels = np.stack([keras_mnv2.resize_and_crop(image) for image in images]).astype("float32")
    expected = keras_mnv2.decode_predictions(model.predict(pixels, verbose=0), top=3)
    assert list(found) == [str(image) for image in images]
    for rows, right in zip(found.values(), expected, strict=True):
        assert [(row["wnid"], row["name"]) for row in rows] == [(wnid, name) for wnid, name, _ in right]
        np.testing.assert_allclose([row["probability"] for row in rows], [p for *_, p in right], rtol=1e-3)
    status, out, _ = run(capsys, "predict", images[0], *options)
    lines = out.splitlines()
    assert lines[0] == str(images[0])
    assert lines[1].split() == ["class", "WordNet", "id", "probability"]
    wnid, name, probability = expected[0][0]
    assert lines[3].split() == ["1", name, wnid, f"{100 * probability:.2f}", "%"]
    assert len(lines) == 7


def test_evaluate(files, capsys, tmp_path):
    folder, model = files
    pixels = {name: keras_mnv2.resize_and_crop(folder / f"{name}.jpg") for name in ("china", "flower")}
    scores = model.predict(np.stack([*pixels.values()]).astype("float32"), verbose=0)
    # One folder has the name of the first photograph's best class, one that of the second one's third.
    ids = [label[0] for label in keras_mnv2.decode_predictions(np.eye(1000), top=1)[0:1000] for label in label]
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = [order[0][0], next(i for i in order[1][2:5] if i != order[0][0])]
    for index, name in zip(chosen, pixels, strict=True):
        (tmp_path / ids[index]).mkdir()
        Image.fromarray(pixels[name]).save(tmp_path / ids[index] / "image.png")
    options = ("--weights", folder / "weights.h5", "--alpha", 0.35)
    # The saved crops are resized once more: the same is done for the expectation.
    again = [keras_mnv2.resize_and_crop(tmp_path / ids[index] / "image.png") for index in chosen]
    order = np.argsort(-model.predict(np.stack(again).astype("float32"), verbose=0), axis=1, kind="stable")
    top1 = 50.0 * sum(row[0] == index for row, index in zip(order, chosen, strict=True))
    top5 = 50.0 * sum(index in row[:5] for row, index in zip(order, chosen, strict=True))
    status, out, err = run(capsys, "evaluate", tmp_path, *options, "--json", "--batch-size", 1)
    found = json.loads(out)
    assert (status, found["images"], found["classes"], found["top1"], found["top5"]) == (0, 2, 2, top1, top5)
    assert "2/2 images" in err
    status, out, _ = run(capsys, "evaluate", tmp_path, *options)
    assert out.splitlines()[0].split() == ["images", "top-1", "top-5", "images/s"]
    assert out.splitlines()[2].split()[:3] == ["2", f"{top1:.2f}", "%"]
    (tmp_path / "crane").mkdir()
    Image.fromarray(again[0]).save(tmp_path / "crane" / "image.png")
    status, _, err = run(capsys, "evaluate", tmp_path, *options)
    assert status == 2
    assert "got 'crane'" in err


def test_a_whole_model_of_other_classes(capsys, tmp_path):
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=2)
    model.save(tmp_path / "model.keras")
    for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "images" / name / "image.jpg")
    options = ("--weights", tmp_path / "model.keras")
    status, out, _ = run(capsys, "evaluate", tmp_path / "images", *options, "--json")
    found = json.loads(out)
    images = keras_mnv2.evaluation_data(tmp_path / "images", size=32)
    right = np.mean(model.predict(images, verbose=0).argmax(1) == [0, 1])
    assert (status, found["top1"], found["top5"]) == (0, 100 * right, 100)
    status, out, _ = run(capsys, "predict", tmp_path / "images/china/image.jpg", *options)
    assert "class 0" in out
    (tmp_path / "images" / "third").mkdir()
    status, _, err = run(capsys, "evaluate", tmp_path / "images", *options)
    assert status == 2
    assert "as many class folders as the model has classes, 2, got 3" in err


def test_weights_is_the_table(capsys):
    status, out, _ = run(capsys, "weights")
    lines = out.splitlines()
    assert status == 0
    assert [line.split()[0] for line in lines[2:-2]] == [c.name for c in keras_mnv2.list_weights()]
    assert lines[-1].startswith("55 checkpoints")
    _, out, _ = run(capsys, "weights", "timm/*120d*", "--json")
    (record,) = json.loads(out)
    assert (record["alpha"], record["depth_multiplier"], record["top1"]) == (1.2, 1.4, 77.302)


def test_profile(capsys):
    _, out, _ = run(capsys, "profile", "--json")
    found = json.loads(out)
    assert (found["parameters"], len(found["rows"])) == (3_504_872, 20)
    _, out, _ = run(capsys, "profile", "--alpha", 0.35, "--size", 96)
    assert out.strip() == str(keras_mnv2.cost_profile((96, 96, 3), alpha=0.35, print_fn=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere.jpg"], "There is no image at 'nowhere.jpg'."),
        (["predict", __file__, "--weights", __file__], "cannot be read as weights"),
        (["evaluate", "nowhere"], "images must be an existing folder of class folders, got 'nowhere'."),
        (["weights", "caffe/*"], "No published checkpoint has a name like 'caffe/*'."),
        (["profile", "--alpha", "0"], "alpha must be a finite number above 0, got 0.0."),
        (["predict", __file__, "--weights", "torchvision/V3"], "the nearest names are"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "keras_mnv2", "weights", "torchvision/*"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "torchvision/IMAGENET1K_V2" in done.stdout
