"""The command line: what it prints, and how it fails."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

import keras_mnv2
from keras_mnv2.backend import other_backend
from keras_mnv2.cli import main
from tests.conftest import once, once_on
from tests.helpers import hiding, randomise

# What the command does with a model does not depend on its blocks.
FEW = [(1, 16, 1, 1), (6, 24, 2, 2)]


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


@once
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


@once
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
    assert "which has 1000, got 3, of which 'crane' is no name of ImageNet's" in err


@once
def test_a_whole_model_of_other_classes(capsys, tmp_path):
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=2)
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
    assert "must have the classes of the model, which has 2, got 3." in err


@once
def test_logits_become_probabilities(files, capsys, tmp_path):
    folder, _ = files
    model = keras_mnv2.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=3, classifier_activation=None
    )
    model.layers[-1].bias.assign(np.log([0.2, 0.5, 0.3]))
    model.layers[-1].kernel.assign(np.zeros((1280, 3)))
    model.save(tmp_path / "model.keras")
    status, out, _ = run(capsys, "predict", folder / "china.jpg", "--weights", tmp_path / "model.keras")
    assert status == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["class", "probability"],
        ["-", "-------", "-----------"],
        ["1", "class", "1", "50.00", "%"],
        ["2", "class", "2", "30.00", "%"],
        ["3", "class", "0", "20.00", "%"],
        [],
    ]


@once
def test_the_background_shifts_the_names(files, capsys, tmp_path):
    folder, _ = files
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=1001)
    model.layers[-1].bias.assign(10 * np.eye(1001)[284] + 5 * np.eye(1001)[0])
    model.save(tmp_path / "model.keras")
    options = ("--weights", tmp_path / "model.keras", "--json")
    _, out, _ = run(capsys, "predict", folder / "china.jpg", *options, "--top", 2)
    ((first, second),) = json.loads(out).values()
    assert (first["index"], first["wnid"], first["name"]) == (284, "n02123394", "Persian_cat")
    assert (second["index"], second["wnid"], second["name"]) == (0, "", "background")
    for name in ("Persian cat", "n01440764"):
        (tmp_path / "images" / name).mkdir(parents=True)
        shutil.copy(folder / "china.jpg", tmp_path / "images" / name)
    status, out, _ = run(capsys, "evaluate", tmp_path / "images", *options)
    found = json.loads(out)
    assert (status, found["images"], found["top1"]) == (0, 2, 50)


@once
def test_channels_first_models_are_fed_so(files, tmp_path):
    folder, _ = files
    last = keras_mnv2.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=4, include_preprocessing=True
    )
    first = keras.Sequential([keras.Input((3, 32, 32)), keras.layers.Permute((2, 3, 1)), last])
    (x,) = keras_mnv2.evaluation_data([folder / "china.jpg"], size=32, normalize=False)[0]
    first.save(tmp_path / "first.keras")
    classifier = keras_mnv2.load_classifier(tmp_path / "first.keras", scale="none")
    assert (classifier.input_shape, classifier.size, classifier.channels) == ((None, 3, 32, 32), 32, 3)
    np.testing.assert_allclose(classifier.scores(x), last.predict(x, verbose=0), rtol=1e-4)


@pytest.mark.slow
def test_an_exported_file_is_evaluated_as_the_model_is(files, capsys, tmp_path):
    folder, _ = files
    model = keras_mnv2.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=3, include_preprocessing=True
    )
    randomise(model, np.random.default_rng(0), np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)))
    model.save(tmp_path / "model.keras")
    keras_mnv2.export(model, tmp_path / "model.onnx", "onnx", verbose=False)
    for name in ("china", "coffee", "flower"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (photograph,) = folder.glob(f"{name}.*")
        shutil.copy(photograph, tmp_path / "images" / name)
    found = []
    for name in ("model.keras", "model.onnx"):
        options = ("--weights", tmp_path / name, "--json")
        status, out, err = run(capsys, "evaluate", tmp_path / "images", *options)
        assert status == 0, err
        assert json.loads(out)["weights"] == str(tmp_path / name)
        found.append([json.loads(out)["top1"]])
        _, out, _ = run(capsys, "predict", folder / "china.jpg", *options)
        (rows,) = json.loads(out).values()
        found[-1] += [row["probability"] for row in sorted(rows, key=lambda row: row["index"])]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    # Scaled twice, it is another network.
    _, out, _ = run(capsys, "predict", folder / "china.jpg", *options, "--scale", "keras")
    (rows,) = json.loads(out).values()
    again = [row["probability"] for row in sorted(rows, key=lambda row: row["index"])]
    assert again != pytest.approx(found[0][1:], rel=1e-3)


@once
def test_what_a_build_prints_stays_out_of_the_json(files, capsys, monkeypatch):
    folder, model = files

    def build(*_, **__):
        print("[====>   ] downloading")
        return model

    monkeypatch.setattr("keras_mnv2.classifier.MobileNetV2", build)
    status, out, err = run(capsys, "predict", folder / "china.jpg", "--json", "--top", 1)
    assert (status, len(json.loads(out))) == (0, 1)
    assert "downloading" in err


@once
def test_mistakes_come_before_any_download(files, capsys, monkeypatch, tmp_path):
    folder, _ = files
    monkeypatch.setattr("keras_mnv2.classifier.MobileNetV2", lambda *_, **__: pytest.fail("it was built"))
    (tmp_path / "dog_or_cat").mkdir()
    shutil.copy(folder / "china.jpg", tmp_path / "dog_or_cat")
    for arguments, message in (
        (["predict", folder / "gone.jpg"], "There is no image at"),
        (["predict", folder / "china.jpg", "--top", 0], "--top must be a whole number of at least 1, got 0."),
        (["predict", folder / "china.jpg", "--alpha", 0.6], "alpha"),
        (["predict", folder / "china.jpg", "--weights", "keras/mobilenet_v2_1.0_224_no_top"], "must have a classifier"),
        (["evaluate", tmp_path], "'dog_or_cat' is no name of ImageNet's"),
        (["evaluate", tmp_path, "--batch-size", 0], "batch_size must be a whole number of at least 1, got 0."),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert message in err


@once
def test_models_that_cannot_be_used_are_named(files, capsys, tmp_path):
    folder, _ = files
    model = keras_mnv2.MobileNetV2((32, 32, 1), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=2)
    model.save(tmp_path / "grey.keras")
    (tmp_path / "broken.keras").write_bytes(b"no model")
    no_top = keras_mnv2.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, include_top=False
    )
    keras_mnv2.save_weights(no_top, tmp_path / "no_top.h5")
    for options, message in (
        (["grey.keras"], "must take RGB images, got one that takes (None, 32, 32, 1)."),
        (["broken.keras"], "cannot be loaded as a model"),
        (["no_top.h5", "--alpha", 0.35], "must have a classifier"),
        (["grey.keras", "--alpha", 0.35], "--alpha must be left out with a whole model"),
    ):
        name, *others = options
        status, out, err = run(capsys, "predict", folder / "china.jpg", "--weights", tmp_path / name, *others)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


@once
def test_a_broken_image_ends_an_evaluation(files, capsys, tmp_path):
    folder, _ = files
    keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, inverted_residual_setting=FEW, classes=1).save(
        tmp_path / "model.keras"
    )
    (tmp_path / "images" / "all").mkdir(parents=True)
    shutil.copy(folder / "china.jpg", tmp_path / "images" / "all")
    (tmp_path / "images" / "all" / "torn.png").write_bytes((folder / "coffee.png").read_bytes()[:5000])
    status, out, err = run(capsys, "evaluate", tmp_path / "images", "--weights", tmp_path / "model.keras")
    assert (status, out) == (2, "")
    assert "torn.png' cannot be read as an image" in err


@pytest.mark.slow
def test_export_of_integers_calibrated_on_photographs(files, capsys, tmp_path):
    folder, _ = files
    common = {"inverted_residual_setting": FEW, "alpha": 0.35, "weights": None, "classifier_activation": None}
    model = keras_mnv2.MobileNetV2((32, 32, 3), classes=5, include_preprocessing=True, **common)
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run" / "model.keras")
    arguments = ("export", tmp_path / "run", tmp_path / "model.tflite", "--json")
    integers = ("--precision", "int8", "--io-dtype", "uint8", "--calibration", folder)
    status, out, err = run(capsys, *arguments, *integers)
    assert status == 0, err
    report = json.loads(out)
    assert (report["format"], report["precision"]) == ("litert", "int8")
    assert report["path"] == str(tmp_path / "model.tflite")
    photographs = sorted(path for path in folder.iterdir() if path.suffix != ".h5")
    assert report["images"] == len(photographs) == 3
    assert report["size"] == (tmp_path / "model.tflite").stat().st_size
    (pixels,) = keras_mnv2.evaluation_data(photographs, size=32, normalize=False)[0]
    found = keras_mnv2.load_export(tmp_path / "model.tflite")(pixels)["predictions"]
    expected = model.predict(pixels, verbose=0)
    assert np.abs(found - expected).mean() <= 0.1 * np.abs(expected).mean()
    for more, message in (
        ((), "path must be new"),
        (("--overwrite", "--precision", "int8"), "calibration must be images"),
        (
            ("--overwrite", "--precision", "int8", "--calibration", "nowhere"),
            "--calibration must be a folder of images",
        ),
        (("--overwrite", "--labels", tmp_path / "nowhere.txt"), "No such file"),
        (("--overwrite", "--format", "onnx"), "path must end in '.onnx'"),
    ):
        status, out, err = run(capsys, *arguments, *more)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    status, out, err = run(capsys, "export", tmp_path / "model.tflite", tmp_path / "model.onnx")
    assert (status, out) == (2, "")
    assert "model must be a .keras file, a run folder or a published checkpoint, got " in err


def test_without_a_command_it_prints_its_help(capsys):
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    for name in ("predict", "evaluate", "export", "weights", "profile"):
        assert f"    {name} " in err
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"keras_mnv2 {keras_mnv2.__version__}"


def test_weights_is_the_table(capsys):
    status, out, _ = run(capsys, "weights")
    lines = out.splitlines()
    assert status == 0
    assert [line.split()[0] for line in lines[2:-2]] == [c.name for c in keras_mnv2.list_weights()]
    assert lines[-1].startswith(f"{len(keras_mnv2.list_weights())} checkpoints")
    assert max(map(len, lines)) <= 100
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
        (["profile", "--alpha", "0"], "alpha must be a finite number above 0"),
        (["predict", __file__, "--weights", "torchvision/V3"], "the nearest names are"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@once_on("tensorflow")
def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "keras_mnv2", "weights", "torchvision/*"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "torchvision/IMAGENET1K_V2" in done.stdout


ALONE = """
import importlib.metadata, runpy
runpy.run_module("keras_mnv2", run_name="__main__", alter_sys=True)
"""


def alone(tmp_path, present, *words, named=None):
    """The command where only `present` is installed, with a home of its own."""
    hidden = {"tensorflow", "jax", "jaxlib", "torch", "tyro"} - set(present.split(","))
    kept = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "KERAS_HOME")}
    return subprocess.run(
        [sys.executable, "-c", f"{hiding(*hidden)}\nsys.argv[0] = 'keras-mnv2'\n{ALONE}", *words],
        env=kept | {"HOME": str(tmp_path)} | ({"KERAS_BACKEND": named} if named else {}),
        capture_output=True,
        text=True,
    )


@once_on("tensorflow")
def test_the_backend_that_is_installed_is_taken(tmp_path):
    present = {"jax": "jax,jaxlib"}.get(keras.backend.backend(), keras.backend.backend())
    done = alone(tmp_path, present, "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "keras_mnv2"), done.stderr


@once
def test_a_variable_that_names_a_missing_backend_is_named(tmp_path):
    done = alone(tmp_path, "torch", "--version", named="jax")
    assert done.returncode
    assert done.stderr.splitlines()[-1] == "ImportError: KERAS_BACKEND must be torch, which is installed, got 'jax'."
    done = alone(tmp_path, "", "--version")
    assert "keras_mnv2 needs TensorFlow, JAX or PyTorch: pip install" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_train_says_which_extra_it_needs(tmp_path):
    done = alone(tmp_path, "torch", "train")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == 'error: train needs tyro: pip install "keras_mnv2[train]".'


def test_train_hands_its_words_to_the_training(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        main(["train", "mnist"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("torchvision_v2, segmentation, detection, got 'mnist'.\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "transfer", "--help"])
    assert not ended.value.code
    assert "--head-epochs" in capsys.readouterr().out
    handed = []
    command = importlib.import_module("training.__main__")
    monkeypatch.setattr(command, "main", lambda *arguments: handed.append(arguments))
    monkeypatch.setattr(sys, "argv", ["keras-mnv2", "train", "digits"])
    # Only the process's own command may start the process again.
    assert [main(), main(["train", "digits"])] == [0, 0]
    assert handed == [(["digits"], True), (["digits"], False)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the process starts once")
def test_train_starts_its_process_again_before_keras_is_imported():
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "importtime", "-m", "keras_mnv2", "train", "mnist"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    imports = re.findall(r"\| +(site|keras)$", done.stderr, re.MULTILINE)
    assert imports == ["site", "site", "keras"]


@pytest.mark.parametrize(
    ("installed", "environment", "written", "expected"),
    [
        (["tensorflow", "jax", "torch"], {}, None, None),
        (["torch"], {}, None, "torch"),
        (["jax", "torch"], {}, "tensorflow", "jax"),
        (["jax", "torch"], {}, "torch", None),
        (["jax"], {"KERAS_BACKEND": "jax"}, "tensorflow", None),
        (["jax"], {"KERAS_BACKEND": ""}, None, "jax"),
        (["jax"], {"KERAS_BACKEND": "numpy"}, None, None),
        (["jax"], {}, "openvino", None),
    ],
)
def test_which_backend_is_taken(installed, environment, written, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    if written:
        (tmp_path / "keras.json").write_text(json.dumps({"backend": written}))
    assert other_backend({"KERAS_HOME": str(tmp_path), **environment}) == expected
