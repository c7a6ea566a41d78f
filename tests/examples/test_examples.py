"""The scripts of `examples`, run as they stand, on small photographs and weights that the tests make."""

import ast
import re
import runpy
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import train_test_split

import keras_mnv2
from tests.conftest import once
from tests.helpers import randomise

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
COLOURS = {"blue": (20, 30, 200), "green": (30, 180, 40), "red": (210, 40, 30)}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with `photos`, of three classes that a colour tells apart, and random `weights.safetensors`."""
    folder, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.normal(colour, 20, (36, 40, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    keras.utils.set_random_seed(0)
    model = keras_mnv2.MobileNetV2((32, 32, 3), 0.35, weights=None, padding="symmetric")
    # Statistics of these photographs: those of others would let the network's rounding errors grow.
    pixels = np.concatenate([x for x, _ in keras_mnv2.evaluation_data(folder / "photos", size=32, normalize=False)])
    randomise(model, rng, keras_mnv2.preprocess_input(pixels, weights="torchvision/IMAGENET1K_V2"))
    keras_mnv2.save_weights(model, folder / "weights.safetensors", layout="torchvision")
    return folder


@pytest.fixture
def run(material, tmp_path, monkeypatch, capsys):
    """Runs a script in a folder of its own, and gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        words = [*map(str, words), "--weights", str(material / "weights.safetensors")]
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@once
def test_transfer_learning(run, material):
    out = run("transfer_learning.py", material / "photos", "--size", 32, "--head-epochs", 100, "--epochs", 1)
    # The bars of both phases, and what is frozen.
    assert "Epoch 100/100" in out
    assert "52 normalisations among them; block_12 and what follows train." in out
    assert Path("photos.txt").read_text().split() == list(COLOURS)
    model = keras.models.load_model("photos.keras")
    data = keras_mnv2.evaluation_data(material / "photos", size=32, normalize=False)
    assert np.mean(model.predict(data, verbose=0).argmax(1) == data.labels) > 0.8


@pytest.mark.slow
def test_unet(run):
    out = run("unet.py", "--size", 64, "--images", 160, "--epochs", 6)
    (found,) = re.findall(r"mean IoU on 40 test images: (0\.\d{3})\n", out)
    # Of background alone it is less than a half.
    assert float(found) > 0.5
    model = keras.models.load_model("unet.keras")
    assert model.output_shape == (None, 64, 64, 2)
    sheet = np.asarray(Image.open("unet.png"))
    assert sheet.shape == (6 * 64, 3 * 64, 3)
    images, masks, predicted = np.split(sheet, 3, axis=1)
    assert set(np.unique(masks)) == set(np.unique(predicted)) == {0, 255}
    again = model.predict(images.reshape(6, 64, 64, 3).astype("float32"), verbose=0).argmax(-1)
    # The picture's images are rounded to bytes, which a network of random weights makes much of.
    assert np.mean(255 * again.reshape(-1, 64) == predicted[..., 0]) > 0.9


@once
def test_neighbours(run, material):
    photos = material / "photos"
    out = run("neighbours.py", photos, "--size", 32, "--neighbours", 3)
    with np.load("neighbours.npz") as found:
        embeddings, paths = found["embeddings"], [Path(path) for path in found["paths"]]
    assert paths == sorted(photos.rglob("*.png"))
    assert embeddings.shape == (30, 1280)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    lines = re.findall(r"^(\S+): (\S+) [01]\.\d\d, (\S+) [01]\.\d\d, (\S+) [01]\.\d\d$", out, re.MULTILINE)
    assert [Path(query) for query, *_ in lines] == paths[::4]
    for query, *best in lines:
        others = np.setdiff1d(np.arange(30), paths.index(Path(query)))
        similarities = embeddings[others] @ embeddings[paths.index(Path(query))]
        assert similarities[[list(others).index(paths.index(Path(p))) for p in best]].min() >= np.sort(similarities)[-3]
    assert np.asarray(Image.open("neighbours.png").convert("L")).std() > 10
    with pytest.raises(SystemExit):
        run("neighbours.py", photos / "nowhere")


@pytest.mark.parametrize("epochs", [0, 5])
@pytest.mark.slow
def test_phone(epochs, run, material):
    from ai_edge_litert.interpreter import Interpreter

    words = "--size", 32, "--epochs", 20, "--aware-epochs", epochs
    out = run("phone.py", material / "photos", *words)
    assert Path("labels.txt").read_text().split() == list(COLOURS)
    paths, labels, _ = keras_mnv2.class_folders(material / "photos")
    _, test, _, test_labels = train_test_split(paths, labels, test_size=0.2, stratify=labels, random_state=0)
    (images,) = keras_mnv2.evaluation_data(test, size=32, normalize=False)[0]
    for name, dtype in (("phone_float.tflite", "float32"), ("phone.tflite", "uint8")):
        assert np.dtype(Interpreter(name).get_input_details()[0]["dtype"]) == dtype
        right = np.mean(keras_mnv2.load_export(name)(images)["predictions"].argmax(1) == test_labels)
        assert re.search(rf"^{name}: \d\.\d\d MB, accuracy {right:.2%} on 6 photographs$", out, re.MULTILINE)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_says_how_it_is_run_and_keeps_to_public_names(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert f"\n    python examples/{path.name}" in ast.get_docstring(ast.parse(text), clean=False)
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()
    used = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and
            isinstance(node.value, ast.Name) and node.value.id == "keras_mnv2"}  # fmt: skip
    assert used
    assert used <= set(keras_mnv2.__all__)
    assert "keras_mnv2." not in "".join(re.findall(r"^(?:from|import) .*$", text, re.MULTILINE))
