"""Detectors and segmentation networks on photographs: where boxes and pixels lie, pictures, and the command line."""

import json

import keras
import numpy as np
import pytest
from PIL import Image
from skimage import data

import keras_mnv2
from keras_mnv2 import classifier, predictors
from keras_mnv2.cli import main
from tests.conftest import once
from tests.helpers import randomise

SIDE = 64


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs of three sizes, as files."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def network():
    """An SSDLite whose scores differ."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = keras_mnv2.SSDLite(
        (SIDE, SIDE, 3), alpha=0.35, weights_backbone=None, classes=3, include_preprocessing=True
    )
    randomise(model, rng, rng.uniform(0, 255, (4, SIDE, SIDE, 3)).astype("float32"))
    for layer in model.layers:
        if layer.name.startswith(("box_", "class_")) and layer.name.endswith("project"):
            layer.set_weights([rng.normal(0, 0.2, layer.kernel.shape), rng.normal(0, 0.5, layer.bias.shape)])
    return model


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    """Its file."""
    path = tmp_path_factory.mktemp("saved") / "network.keras"
    network.save(path)
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def found_by(run, shape=(None, 32, 64, 3), scale=False):
    """A detector or segmentation network that a function takes the place of."""
    kind = keras_mnv2.Detector if "box" in run.__name__ else keras_mnv2.Segmenter
    return kind("some", "none", shape, scale, lambda: run)


@once
def test_boxes_are_in_the_photographs_own_pixels():
    seen = []

    def boxes(images):
        seen.append(images)
        of = {"boxes": [[16, 8, 32, 24], [0, 0, 64, 32], [1, 2, 3, 4]], "scores": [0.9, 0.6, 0.4], "classes": [1, 0, 2]}
        return {name: np.array(values)[None] for name, values in of.items()}

    photograph = np.zeros((128, 320, 3), "uint8")
    photograph[:, 160:] = 255
    found = found_by(boxes).detect(photograph)
    np.testing.assert_array_equal(found["boxes"], [[80, 32, 160, 96], [0, 0, 320, 128]])
    np.testing.assert_array_equal(found["classes"], [1, 0])
    assert found_by(boxes).detect(photograph, score_threshold=0.95)["boxes"].shape == (0, 4)
    # The network has seen the whole photograph.
    assert seen[0].shape == (1, 32, 64, 3)
    assert (seen[0][0, :, :31] < 5).all()
    assert (seen[0][0, :, 33:] > 250).all()
    assert found_by(boxes, (None, 3, 32, 64), True).detect(photograph)["scores"][0] == np.float32(0.9)
    assert seen[-1].shape == (1, 3, 32, 64)
    assert (seen[-1].min(), seen[-1].max()) == (-1, 1)


def red(images, stride=1, first=False, labels=False):
    """Scores of two classes: whether a pixel is red."""
    is_red = (images[..., 0] > 200) & (images[..., 1] < 50)
    is_red = is_red[:, ::stride, ::stride].astype("float32")
    scores = is_red if labels else np.stack([0.5 - is_red, is_red - 0.5], axis=1 if first else -1)
    return {"mask": scores}


@once
@pytest.mark.parametrize(
    "how", [{}, {"first": True}, {"labels": True}, {"stride": 16}], ids=["last", "first", "labels", "of the head"]
)
@pytest.mark.parametrize("shape", [(None, None, None, 3), (None, 64, 96, 3)], ids=["any size", "one size"])
def test_a_mask_has_the_photographs_own_pixels(shape, how):
    photograph = np.full((200, 320, 3), 90, "uint8")
    photograph[:100, 160:] = (255, 0, 0)

    def masks(images):
        return red(images, **how)

    for image, size in ((photograph, (200, 320)), (photograph[:40, :50], (40, 50))):
        found = found_by(masks, shape).segment(image)
        assert (found.shape, found.dtype) == (size, np.int32)
    expected = np.zeros((200, 320), int)
    expected[:100, 160:] = 1
    wrong = found_by(masks, shape).segment(photograph) != expected
    # At the edges the network sees mixed pixels, or one in sixteen.
    assert wrong.mean() < (0.2 if "stride" in how else 0.02)
    assert not wrong[:60, 240:].any()
    assert not wrong[:, :120].any()


@once
def test_what_lies_beyond_a_photograph_is_grey():
    seen = []

    def masks(images):
        seen.append(images)
        return red(images)

    found_by(masks, (None, 96, 96, 3)).segment(np.zeros((60, 192, 3), "uint8"))
    assert not seen[0][0, :30].any()
    assert (seen[0][0, 30:] == 127).all()
    found_by(masks, (None, None, None, 3)).segment(np.zeros((20, 1026, 3), "uint8"))
    assert seen[1].shape == (1, 32, 513, 3)
    assert not seen[1][0, :10].any()


@once
def test_the_colours_are_those_of_pascal_voc():
    colours = keras_mnv2.palette()
    assert (colours.shape, colours.dtype) == ((256, 3), np.uint8)
    # Aeroplane, person and tvmonitor of the development kit.
    assert colours[[1, 15, 20]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128]]
    assert len(np.unique(colours, axis=0)) == 256


@once
def test_pictures_show_boxes_and_masks():
    photograph = np.full((120, 200, 3), 255, "uint8")
    found = {"boxes": np.array([[20.0, 30, 180, 110]]), "scores": np.array([0.5]), "classes": np.array([2])}
    picture = np.asarray(keras_mnv2.draw_detections(photograph, found, ["a", "b", "cat"]))
    changed = (picture != photograph).any(axis=-1)
    assert changed[30, 20:181].all()
    assert changed[30:111, 180].all()
    # Nothing outside of the box, and nothing inside of it but its name.
    assert not changed[:29].any()
    assert not changed[:, :19].any()
    assert not changed[60:105, 30:170].any()
    assert picture[110, 100].max() == 255
    assert picture[110, 100].min() < 100
    mask = np.zeros((120, 200), "int32")
    mask[60:, 100:] = 15
    picture = np.asarray(keras_mnv2.draw_mask(photograph, mask, [str(i) for i in range(21)], strength=0.5))
    assert (picture[mask == 15][-1] == [224, 192, 192]).all()
    assert (picture[60:, :100] == 255).all()
    # The names of the classes stand in the corner.
    assert (picture[:15, :15] != 255).any()
    for call, match in (
        (lambda: keras_mnv2.draw_mask(photograph, mask[:5]), "mask must be whole numbers of the shape"),
        (lambda: keras_mnv2.draw_mask(photograph, mask, strength=2), "strength must be a number from 0 to 1"),
        (lambda: keras_mnv2.draw_mask(photograph, mask, ["a"]), "a name for each class, got 1 and the class 15"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@once
def test_the_command_draws_boxes(network, saved, photographs, capsys, tmp_path):
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\n")
    image = photographs / "coffee.png"
    options = ("--task", "detection", "--weights", saved, "--labels", tmp_path / "labels.txt")
    options += ("--score", 0.3, "--out", tmp_path / "out", "--top", 4)
    status, out, err = run(capsys, "predict", image, *options, "--json")
    assert status == 0, err
    (rows,) = json.loads(out).values()
    # A file of the network alone is completed by itself.
    photograph = Image.open(image)
    pixels = np.asarray(photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR), "float32")
    expected = {name: y[0][:4] for name, y in keras_mnv2.detector(network).predict(pixels[None], verbose=0).items()}
    assert expected["scores"].min() > 0.3
    np.testing.assert_allclose([row["score"] for row in rows["detections"]], expected["scores"], rtol=1e-4)
    boxes = expected["boxes"] * (2 * (photograph.width / SIDE, photograph.height / SIDE))
    np.testing.assert_allclose([row["box"] for row in rows["detections"]], boxes, atol=1e-2)
    assert [row["name"] for row in rows["detections"]] == [("ant", "bee", "cat")[i] for i in expected["classes"]]
    assert rows["picture"] == str(tmp_path / "out" / "coffee_detection.png")
    with Image.open(rows["picture"]) as picture:
        assert picture.size == photograph.size
        assert (np.asarray(picture) != np.asarray(photograph)).any()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["coffee_detection.png"]
    status, out, _ = run(capsys, "predict", image, *options)
    lines = out.splitlines()
    assert lines[0] == f"{image} -> {rows['picture']}"
    assert lines[1].split() == ["class", "score", "left", "top", "right", "bottom"]
    assert len(lines[3:-1]) == 4
    options = (*options[:4], "--out", tmp_path / "out", "--score", 1)
    _, out, _ = run(capsys, "predict", image, *options)
    assert out.splitlines()[1] == "nothing of a score of 1 or more"


@once
def test_the_file_of_a_detector_is_taken_as_that_of_its_network(network, saved, photographs, tmp_path):
    keras_mnv2.detector(network).save(tmp_path / "detector.keras")
    files = (tmp_path / "detector.keras", saved)
    one, other = (keras_mnv2.load_detector(path).detect(photographs / "coffee.png", 0.3) for path in files)
    assert len(one["scores"]) > 4
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


@once
def test_the_command_draws_masks(photographs, capsys, tmp_path):
    model = keras_mnv2.DeepLabV3(
        (SIDE, SIDE, 3),
        alpha=0.35,
        weights_backbone=None,
        classes=3,
        classifier_activation=None,
        include_preprocessing=True,
    )
    rng = np.random.default_rng(0)
    randomise(model, rng, rng.uniform(0, 255, (4, SIDE, SIDE, 3)).astype("float32"))
    model.save(tmp_path / "network.keras")
    images = [photographs / "coffee.png", photographs / "astronaut.png"]
    options = ("--task", "segmentation", "--weights", tmp_path / "network.keras", "--out", tmp_path / "out")
    status, out, err = run(capsys, "predict", *images, *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert list(found) == [str(image) for image in images]
    mask = keras_mnv2.load_segmenter(tmp_path / "network.keras").segment(images[0])
    rows = found[str(images[0])]["classes"]
    assert [row["name"] for row in rows] == [f"class {row['index']}" for row in rows]
    shares = {row["index"]: row["share"] for row in rows}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == {int(i): pytest.approx((mask == i).mean()) for i in np.unique(mask)}
    with Image.open(found[str(images[0])]["picture"]) as picture:
        expected = keras_mnv2.draw_mask(images[0], mask)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    # Square photographs are only resized, so that the network's own answer is known.
    pixels = np.asarray(Image.open(images[1]).resize((SIDE, SIDE), Image.Resampling.BILINEAR), "float32")
    scores = model.predict(pixels[None], verbose=0)[0]
    mask = keras_mnv2.load_segmenter(tmp_path / "network.keras").segment(images[1])
    assert (mask[4::8, 4::8] == scores.argmax(-1)).mean() > 0.9
    _, out, _ = run(capsys, "predict", images[0], *options)
    lines = out.splitlines()
    assert lines[0] == f"{images[0]} -> {tmp_path / 'out' / 'coffee_segmentation.png'}"
    assert lines[1].split() == ["class", "pixels"]


@once
def test_pictures_of_one_name_are_numbered(saved, photographs, capsys, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(photographs / "chelsea.png").save(tmp_path / folder / "1.jpg")
    options = ("--task", "detection", "--weights", saved, "--out", tmp_path / "out")
    status, _, _ = run(capsys, "predict", tmp_path / "a" / "1.jpg", tmp_path / "b" / "1.jpg", *options)
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"1_detection.png", "1_detection_2.png"}


@once
def test_a_model_of_another_task_is_named(network, photographs, capsys, tmp_path, monkeypatch):
    common = {"alpha": 0.35, "classes": 3}
    models = {
        "network.keras": network,
        "classes.keras": keras_mnv2.MobileNetV2((32, 32, 3), weights=None, **common),
        "mask.keras": keras_mnv2.DeepLabV3((32, 32, 3), weights_backbone=None, **common),
    }
    for name in (*models, "taken"):
        (tmp_path / name).write_text("")
    # Reading a file takes seconds.
    for module in (classifier, predictors):
        monkeypatch.setattr(module, "load_image_model", lambda name, path: models[path.name])
    image = photographs / "coffee.png"
    detection, segmentation = ("--task", "detection", "--weights"), ("--task", "segmentation", "--weights")
    for words, *parts in (
        (("--weights", "network.keras"), "--weights must be a classifier, got a detector in", "which --task detection"),
        (
            ("--weights", "mask.keras"),
            "must be a classifier, got a segmentation network in",
            "which --task segmentation",
        ),
        ((*detection, "classes.keras"), "--weights must be a detector, got a classifier in", "--task classification"),
        ((*detection, "mask.keras"), "--weights must be a detector, got a segmentation network in"),
        ((*segmentation, "network.keras"), "--weights must be a segmentation network, got a detector in"),
        ((*segmentation, "classes.keras"), "--weights must be a segmentation network, got a classifier in"),
        (detection[:2], "--weights must be a detector for --task detection, got none"),
        ((*detection, "network.keras", "--score", "2"), "--score must be a number from 0 to 1, got 2.0."),
        ((*detection, "network.keras", "--out", "taken"), "--out must be a folder, got the file"),
        (("--weights", "classes.keras", "--score", "0.5"), "--score must be left out but for --task detection, got"),
        (("--weights", "classes.keras", "--out", "x"), "--out must be left out but for --task detection and segment"),
        (("--weights", "classes.keras", "--labels", "taken"), "--labels must have 3 names, one a line, got 0."),
        ((*segmentation, "mask.keras", "--alpha", "0.5"), "--alpha must be left out with a whole model"),
    ):
        given = [tmp_path / word if word.endswith((".keras", "taken")) else word for word in words]
        status, out, err = run(capsys, "predict", image, *given)
        assert (status, out) == (2, ""), err
        assert len(err.splitlines()) == 1
        assert all(part in err for part in parts), err
    for load in (keras_mnv2.load_detector, keras_mnv2.load_segmenter):
        with pytest.raises(ValueError, match=r"got a classifier in .*, which load_classifier takes"):
            load(tmp_path / "classes.keras")


@once
def test_names_of_classes_come_from_the_file_or_the_caller(photographs, capsys, tmp_path):
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=2)
    model.save(tmp_path / "model.keras")
    (tmp_path / "labels.txt").write_text("ant\nbee\n")
    options = ("--weights", tmp_path / "model.keras", "--labels", tmp_path / "labels.txt", "--json")
    status, out, _ = run(capsys, "predict", photographs / "coffee.png", *options)
    ((first, second),) = json.loads(out).values()
    assert status == 0
    assert {first["index"]: first["name"], second["index"]: second["name"]} == {0: "ant", 1: "bee"}
    # A file that export named its classes in; that of a model that was run.
    (tmp_path / "saved" / "assets").mkdir(parents=True)
    (tmp_path / "saved" / "assets" / "labels.txt").write_text("ant\nbee\n")
    assert keras_mnv2.loading.labels_of(tmp_path / "saved") == ("ant", "bee")
    assert keras_mnv2.loading.labels_of(tmp_path / "model.keras") is None
