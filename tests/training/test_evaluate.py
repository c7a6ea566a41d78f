import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import keras_mnv2
from keras_mnv2 import cli
from tests.conftest import once, once_on
from tests.helpers import randomise
from training import evaluate
from training.report.evaluation import text

COLOURS = {"blue": (20, 30, 200), "green": (30, 180, 40), "red": (210, 40, 30)}
EACH = 6
# Two stages, so that building and compiling is quick.
TINY = {
    "alpha": 0.35,
    "weights": None,
    "classes": 3,
    "inverted_residual_setting": [(1, 16, 1, 1), (6, 24, 2, 2)],
}


def evaluated(model, *dataset, **options):
    return evaluate.evaluate(evaluate.Options(str(model), *dataset, **options))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Six blocks of noisy colour a class in `test`, one of them a truncated file; two a class in `train`."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for part, number in (("train", 2), ("test", EACH)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(colour, 60, (32, 32, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).resize((40, 36)).save(folder / part / name / f"{i}.png")
    broken = folder / "test" / "green" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def model(photographs):
    keras.utils.set_random_seed(0)
    built = keras_mnv2.MobileNetV2((32, 32, 3), **TINY, include_preprocessing=True)
    randomise(built, np.random.default_rng(0), images_of(photographs)[0])
    return built


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.keras"
    model.save(path)
    return path


def images_of(photographs):
    """The readable test images and their labels, read without the training's code."""
    how = keras_mnv2.Preprocessing(36, 32, crop_rounding="round")
    images, labels = [], []
    for label, name in enumerate(sorted(COLOURS)):
        for i in range(EACH):
            if (name, i) != ("green", 3):
                images.append(keras_mnv2.resize_and_crop(photographs / "test" / name / f"{i}.png", how))
                labels.append(label)
    return np.stack(images).astype("float32"), np.array(labels)


def right_share(model, photographs):
    images, labels = images_of(photographs)
    return float((model.predict(images, verbose=0).argmax(1) == labels).mean())


@once
def test_the_results_are_those_of_predict(model, saved, photographs, tmp_path):
    found = evaluated(saved, str(photographs), batch_size=4, out=tmp_path / "out")
    images, labels = images_of(photographs)
    scores = model.predict(images, verbose=0)
    assert found["images"] == len(labels) == 3 * EACH - 1
    assert found["image_size"] == 32
    assert found["top1"] == pytest.approx((scores.argmax(1) == labels).mean())
    assert 0 < found["top1"] < 1, "the test must tell right from wrong"
    assert found["top5"] == 1
    assert [row["images"] for row in found["per_class"]] == [EACH, EACH - 1, EACH]
    assert found["images_per_second"] > 0
    (broken,) = found["skipped"]
    assert broken.endswith("green/3.png")

    wrong = [m["image"] for m in found["mistakes"]]
    assert len(wrong) == (scores.argmax(1) != labels).sum()
    assert all(m["label"] != m["prediction"] and m["label"] in m["image"] for m in found["mistakes"])
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"report.html", "results.json", "scores.npy", "labels.npy"}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count("<img ") == 2 * len(wrong), "each with its activation map"
    assert "green/3.png" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert np.load(tmp_path / "out" / "scores.npy") == pytest.approx(scores, abs=1e-5)
    assert np.array_equal(np.load(tmp_path / "out" / "labels.npy"), labels)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "format"), [(".tflite", "litert"), (".onnx", "onnx")])
def test_an_exported_model_has_the_models_accuracy(suffix, format, model, photographs, tmp_path):
    path = tmp_path / f"tiny{suffix}"
    keras_mnv2.export(model, path, format, verbose=False)
    found = evaluated(path, str(photographs), batch_size=4)
    assert found["image_size"] == 32
    assert found["top1"] == pytest.approx(right_share(model, photographs))


def write_onnx(path, side):
    import onnx

    shapes = (("image", ["batch", side, side, 3]), ("scores", ["batch", 3]))
    image, scores = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes)
    # With opset 17 the axes are an attribute.
    node = onnx.helper.make_node("ReduceMean", ["image"], ["scores"], axes=[1, 2], keepdims=0)
    graph = onnx.helper.make_graph([node], "means", [image], [scores])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


def write_saved_model(path, side):
    import tensorflow as tf

    module = tf.Module()
    module.means = tf.function(
        lambda image: {"scores": tf.reduce_mean(image, (1, 2))},
        input_signature=[tf.TensorSpec((None, side, side, 3), tf.float32, name="image")],
    )
    tf.saved_model.save(module, str(path), signatures=module.means)


def write_litert(path, side):
    import tensorflow as tf

    folder = path.with_name("for_litert")
    write_saved_model(folder, side)
    path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder)).convert())


def write_openvino(path, side):
    import openvino
    from openvino import opset13

    image = opset13.parameter([-1, side or -1, side or -1, 3], np.float32, name="image")
    mean = opset13.reduce_mean(image, np.array([1, 2]), keep_dims=False)
    mean.output(0).get_tensor().set_names({"scores"})
    openvino.save_model(openvino.Model([mean], [image]), path, compress_to_fp16=False)


def write_torch(path, side):
    import torch

    class Means(torch.nn.Module):
        def forward(self, image):
            return image.mean((2, 3))

    free = dict(enumerate([torch.export.Dim.DYNAMIC] * (1 if side else 4)))
    free.pop(1, None)
    image = torch.zeros(2, 3, side or 48, side or 48)
    torch.export.save(torch.export.export(Means(), (image,), dynamic_shapes=(free,)), path)


EXPORTS = {
    "means.onnx": write_onnx,
    "means": write_saved_model,
    "means.tflite": write_litert,
    "means.xml": write_openvino,
    "means.pt2": write_torch,
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_files_are_run_in_their_own_runtimes(name, photographs, tmp_path):
    """Their scores are the means of red, green and blue: those of the classes, in another order."""
    EXPORTS[name](tmp_path / name, 32)
    found = evaluated(tmp_path / name, str(photographs), batch_size=4)
    images, labels = images_of(photographs)
    assert found["image_size"] == 32, "the file says which size it takes"
    assert found["top1"] == pytest.approx((images.mean((1, 2)).argmax(1) == labels).mean())
    assert found["top1"] == pytest.approx((EACH - 1) / (3 * EACH - 1)), "green alone is in its place"
    scaled = evaluated(tmp_path / name, str(photographs), scale="keras", out=tmp_path / "scaled")
    expected = images.mean((1, 2)) / 127.5 - 1
    assert np.load(tmp_path / "scaled" / "scores.npy") == pytest.approx(expected, abs=1e-4)
    assert scaled["top1"] == found["top1"]
    page = (tmp_path / "scaled" / "report.html").read_text("utf-8")
    assert page.count("<img ") == len(scaled["mistakes"])
    assert "gives the scores alone" in page


@pytest.mark.parametrize("name", [name for name in EXPORTS if name != "means.tflite"])
def test_files_that_take_any_size_need_one(name, photographs, tmp_path):
    EXPORTS[name](tmp_path / name, None)
    with pytest.raises(ValueError, match="image_size must be given"):
        evaluated(tmp_path / name, str(photographs))
    assert evaluated(tmp_path / name, str(photographs), image_size=40)["image_size"] == 40


def test_a_model_that_does_not_scale_pixels_gets_them_scaled(model, photographs, tmp_path):
    plain = keras_mnv2.MobileNetV2((32, 32, 3), **TINY)
    plain.set_weights(model.get_weights())
    plain.save(tmp_path / "plain.keras")
    found = evaluated(tmp_path / "plain.keras", str(photographs))
    assert found["top1"] == pytest.approx(right_share(model, photographs))


def test_the_test_images_of_digits_and_a_network_of_one_channel(tmp_path):
    built = keras_mnv2.MobileNetV2((32, 32, 1), **TINY | {"classes": 10}, include_preprocessing=True)
    built.save(tmp_path / "digits.keras")
    found = evaluated(tmp_path / "digits.keras", "digits", batch_size=128)
    assert found["images"] == 360
    assert found["skipped"] == {}


def test_a_run_folder_knows_its_data_set(saved, photographs, tmp_path):
    (tmp_path / "model.keras").write_bytes(saved.read_bytes())
    settings = {"dataset": str(photographs), "image_size": 32, "resize": 34, "weights": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = evaluated(tmp_path)
    assert (found["dataset"], found["resize"]) == (str(photographs), 34)
    assert evaluated(tmp_path / "model.keras", resize=40)["resize"] == 40


def test_all_images_of_a_folder_without_parts(saved, photographs):
    found = evaluated(saved, str(photographs / "test"), split="all", batch_size=4)
    assert found["images"] == 3 * EACH - 1
    with pytest.raises(ValueError, match="split must be one of train, test for"):
        evaluated(saved, str(photographs), split="all")


@once
def test_a_file_of_weights(tmp_path):
    built = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
    keras_mnv2.save_weights(built, tmp_path / "tiny.h5")
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(9, 32, 32, 3), dtype="uint8"), np.arange(9) % 3
    np.savez(tmp_path / "noise.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    found = evaluated(tmp_path / "tiny.h5", str(tmp_path / "noise.npz"), image_size=32, alpha=0.35)
    expected = built.predict(x / np.float32(127.5) - 1, verbose=0).argmax(1)
    assert found["top1"] == pytest.approx((expected == y).mean())

    top = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, include_top=False)
    keras_mnv2.save_weights(top, tmp_path / "no_top.h5")
    with pytest.raises(ValueError, match="model must have a classifier"):
        evaluated(tmp_path / "no_top.h5", str(tmp_path / "noise.npz"), image_size=32, alpha=0.35)


@once
def test_the_background_of_1001_classes_is_dropped(tmp_path, monkeypatch):
    x, y = np.zeros((4, 32, 32, 3), "uint8"), np.array([0, 1, 2, 999])
    np.savez(
        tmp_path / "imagenet.npz", **{f"{v}_{part}": a for part in ("train", "test") for v, a in (("x", x), ("y", y))}
    )
    scores = np.zeros((4, 1001), "float32")
    scores[range(4), [1, 2, 3, 999]] = 1
    how = keras_mnv2.Preprocessing(36, 32)
    network = keras_mnv2.Classifier(
        "some", "none", (None, 32, 32, 3), how, False, 1001, lambda: lambda images: scores[: len(images)]
    )
    monkeypatch.setattr(keras_mnv2, "load_classifier", lambda *arguments, **options: network)
    found = evaluated("some", str(tmp_path / "imagenet.npz"), batch_size=4)
    assert found["top1"] == 0.75
    assert "The 4 least accurate of 1000 classes" in text(found)


def accuracy_of_both_commands(capsys, model, folder):
    """Top-1 as `keras-mnv2 evaluate` and `python -m training.evaluate` give it, which must agree in top-5 too."""
    assert cli.main(["evaluate", str(folder), "--weights", str(model), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    other = evaluated(model, str(folder), split="all")
    assert one["images"] == other["images"]
    assert (one["top1"], one["top5"]) == pytest.approx((100 * other["top1"], 100 * other["top5"]))
    return other


@once
def test_both_commands_cut_photographs_of_an_unknown_model_alike(capsys, tmp_path):
    inputs = keras.Input((32, 32, 3))
    left = keras.layers.GlobalAveragePooling2D()(keras.layers.Cropping2D(((0, 0), (0, 31)))(inputs))
    keras.Model(inputs, left).save(tmp_path / "left.keras")
    for label, name in enumerate(COLOURS):
        # The crop's left column is 3.5, rounded to 4; the one before has another class's colour.
        pixels = np.zeros((36, 39, 3), "uint8")
        pixels[:, 4, (2, 1, 0)[label]] = pixels[:, 3, label - 1] = 255
        (tmp_path / "colours" / f"{2 - label}{name}").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "colours" / f"{2 - label}{name}" / "0.png")
    assert accuracy_of_both_commands(capsys, tmp_path / "left.keras", tmp_path / "colours")["top1"] == 1


@once
def test_both_commands_leave_the_background_of_1001_classes_out(capsys, tmp_path, rng):
    inputs = keras.Input((32, 32, 3))
    scores = keras.layers.Dense(1001)(keras.layers.GlobalAveragePooling2D()(inputs))
    model = keras.Model(inputs, scores)
    kernel = rng.normal(size=(3, 1001)).astype("float32")
    # Names of ImageNet's classes 0, 1 and 283, whose order is another one.
    for place, (name, colour) in enumerate({"tench": 0, "goldfish": 1, "Persian cat": 2}.items()):
        kernel[colour, 1 + (0, 1, 283)[place]] = 9
        pixels = np.zeros((36, 36, 3), "uint8")
        pixels[..., colour] = 255
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "0.png")
    Image.fromarray(pixels).save(tmp_path / "photos" / "tench" / "cat.png")
    model.layers[-1].set_weights([kernel, np.eye(1, 1001)[0] * 1000])
    model.save(tmp_path / "background.keras")
    found = accuracy_of_both_commands(capsys, tmp_path / "background.keras", tmp_path / "photos")
    assert found["top1"] == 0.75
    (mistake,) = found["mistakes"]
    assert (mistake["label"], mistake["prediction"]) == ("tench", "Persian cat")
    assert len(found["per_class"]) == 1000


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "training.evaluate", *map(str, arguments)], capture_output=True, text=True
    )


@once_on("tensorflow")
def test_the_command(model, saved, photographs, tmp_path):
    done = command(saved, "--dataset", photographs, "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    share = right_share(model, photographs)
    assert f"top-1 {share:.2%}, top-5 100.00%" in done.stdout
    assert "| green |" in done.stdout
    assert re.search(r"1/1\D.*/step", done.stdout)
    assert "1 images could not be read" in done.stdout
    assert "3.png" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["top1"] == pytest.approx(share)


@pytest.mark.slow
def test_a_program_of_pytorch_is_evaluated_in_a_process_with_tensorflow(photographs, tmp_path, monkeypatch):
    write_torch(tmp_path / "means.pt2", 32)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    done = command(tmp_path / "means.pt2", "--dataset", photographs)
    assert done.returncode == 0, done.stderr
    assert "means.pt2 (pt2) on 17 test images" in done.stdout


def test_bad_inputs_end_in_one_sentence(saved, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.keras").write_bytes(b"no model")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    free = keras_mnv2.MobileNetV2((None, None, 3), **TINY)
    free.save(tmp_path / "free.keras")
    data = ["--dataset", str(photographs)]
    for arguments, message in (
        ([saved], "dataset must be given"),
        ([saved, "--dataset", "cats of mine"], "dataset must be"),
        ([saved, "--dataset", "digits"], "data set must have the classes of the model, which has 3, got 10"),
        ([saved, *data, "--image-size", "64"], "image_size must be 32"),
        ([saved, *data, "--batch-size", "0"], "batch_size must be a whole number of at least 1 and at most"),
        ([saved, *data, "--image-size", "-32"], "image_size must be a whole number of at least 1"),
        ([saved, *data, "--resize", "0"], "resize must be a whole number of at least 1"),
        ([saved, *data, "--alpha", "nan"], "alpha must be a finite number above 0, got nan"),
        ([saved, *data, "--alpha", "1"], "alpha must be left out"),
        (["free.keras", *data], "image_size must be given"),
        (["broken.keras", *data], "cannot be loaded"),
        (["broken.onnx", *data], "cannot be loaded"),
        (["other.safetensors", *data], "other.safetensors"),
        (["missing.tflite", *data], "There is no model"),
        (["empty", *data], "model must be a run folder"),
        (["torchvision/IMAGENET1K_V3", *data], "nearest names"),
        (["keras/mobilenet_v2_1.0_224_no_top", *data], "model must have a classifier"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate.main([str(argument) for argument in arguments])
        assert end.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@once
def test_help_does_not_wait_for_a_backend():
    code = "import sys; from training import evaluate; assert not {'keras', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
