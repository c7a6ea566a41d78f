"""The documentation: its code runs, what it names exists, and its site shows all that is public."""

import contextlib
import importlib.util
import io
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import keras_mnv2
from keras_mnv2.weights import source
from tests.conftest import marks, once
from tests.exports import LABELS

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The blocks of this page that run an exported file do so in a process without Keras.
EXPORT = "docs/export.md"


def code_of(page):
    """(number of the line, code) of each block of Python."""
    text = PAGES[page]
    return [(text[: match.start()].count("\n") + 2, match[2]) for match in FENCE.finditer(text) if match[1] == "python"]


def test_each_block_says_that_it_is_python_or_a_shell():
    # Nothing is shown that no test reads.
    kinds = {(page, match[1]) for page, text in PAGES.items() for match in FENCE.finditer(text)}
    assert {kind for _, kind in kinds} == {"python", "sh"}, kinds
    for page, text in PAGES.items():
        assert text.count("```") == 2 * len(FENCE.findall(text)), page


@pytest.fixture
def published(tmp_path_factory, monkeypatch):
    """Files with random weights in the place of the published ones, in the same layouts and of the same names."""

    def fetch(url, file_name, sha256=None):
        (row,) = (row for row in keras_mnv2.list_weights() if row.url == url)
        path = folder / file_name
        if not path.exists():
            shape = {name: getattr(row, name) for name in ("alpha", "padding", "depth_multiplier", "fix_stem_head")}
            top = {"classes": row.classes} if row.classes else {"include_top": False}
            model = keras_mnv2.MobileNetV2((32, 32, 3), weights=None, norm_epsilon=row.norm_epsilon, **shape, **top)
            keras_mnv2.save_weights(model, path, layout=row.layout)
        return path

    folder = tmp_path_factory.mktemp("published")
    monkeypatch.setattr(source, "fetch", fetch)


@pytest.fixture
def folder(tmp_path, monkeypatch, rng):
    """The working folder of a reader: a photograph, and photographs in class folders."""
    Image.fromarray(rng.integers(0, 256, (80, 100, 3), "uint8")).save(tmp_path / "cat.jpg")
    for part, number in (("train", 8), ("validation", 4)):
        for name, colour in (("blue", (20, 30, 200)), ("red", (210, 40, 30))):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(colour, 40, (36, 40, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page, names=None, changes=()):
    """Runs the blocks of a page in order, and gives the names that they leave.

    Args:
        page: of `PAGES`.
        names: what the page takes for given.
        changes: (found, instead) for lines that would take long.
    """
    names = {"__name__": "__main__", **(names or {})}
    blocks = code_of(page)
    for found, _ in changes:
        assert [found in block for _, block in blocks].count(True) == 1, found
    for line, block in blocks:
        if page == EXPORT and "keras_mnv2" not in block:
            continue
        for found, instead in changes:
            block = block.replace(found, instead)
        # Errors show the page's lines.
        exec(compile("\n" * (line - 1) + block, str(ROOT / page), "exec"), names)
    return names


@once
def test_the_code_of_the_readme(published, folder, capsys):
    names = run_page("README.md")
    assert names["fast"].count_params() < names["model"].count_params()
    assert names["mine"].output_shape == (None, 5)
    assert (folder / "mobilenet.onnx").is_file()
    out = capsys.readouterr().out
    assert len(re.findall(r"'n\d{8}'", out)) == 3


@once
def test_the_code_of_the_start(folder):
    names = run_page("docs/index.md")
    assert keras.models.load_model("model.keras").output_shape == (None, 4)
    assert set(names["backbone"].output) == {f"stride_{n}" for n in (2, 4, 8, 16, 32)}


@pytest.mark.slow
def test_the_code_for_those_who_come_from_keras_applications(folder):
    names = run_page("docs/keras_applications.md")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 96, 96, 3))
    expected = names["transfer"].predict(x, verbose=0)
    for found in (names["model"], *map(keras.models.load_model, ("mine.keras", "plain.keras"))):
        np.testing.assert_allclose(found.predict(x, verbose=0), expected, atol=1e-5)


@once
def test_the_transfer_script_learns(folder):
    small = keras_mnv2.MobileNetV2((32, 32, 3), 0.35, weights=None, padding="symmetric")
    keras_mnv2.save_weights(small, "w.safetensors", layout="torchvision")
    # The preprocessing stays that of the checkpoint.
    changes = [
        ('"torchvision/IMAGENET1K_V2", 224\n', '"torchvision/IMAGENET1K_V2", 32\n'),
        ("(SIZE, SIZE, 3), weights=WEIGHTS", '(SIZE, SIZE, 3), 0.35, weights="w.safetensors"'),
    ]
    names = run_page("docs/transfer_learning.md", changes=changes)
    model = keras.models.load_model("photos.keras", compile=False)
    scores = model.predict(names["validation"], verbose=0)
    assert scores.shape == (8, 2)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    # The statistics are still those that the file has.
    statistics = [weight for weight in names["backbone"].weights if weight.name.startswith("moving_")]
    assert len(statistics) == 104
    for weight in statistics:
        kept = keras.ops.convert_to_numpy(weight)
        np.testing.assert_array_equal(kept, np.full(kept.shape, float(weight.name == "moving_variance")))
    trained = {layer.name for layer in names["backbone"].layers if layer.trainable and layer.weights}
    parts = ("expand", "depthwise", "project")
    assert trained == {"Conv_1", *(f"block_{i}_{part}" for i in range(12, 17) for part in parts)}


@once
def test_the_code_about_weights(published, folder, capsys):
    import torch
    import torchvision

    theirs = keras.applications.MobileNetV2((160, 160, 3), weights=None, include_top=False, pooling="avg")
    keras.Sequential([theirs, keras.layers.Dense(5, name="head")]).save("my_flowers.keras")
    state = torchvision.models.mobilenet_v2().state_dict()
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, "model_best.pth.tar")
    names = run_page("docs/weights.md")
    # What the page says that a line says.
    (said,) = re.findall(r"^# (my_flowers\.keras: .*)$", PAGES["docs/weights.md"], re.MULTILINE)
    assert said in capsys.readouterr().out.splitlines()
    bias = keras.ops.convert_to_numpy(names["raw"].get_layer("predictions").bias)
    np.testing.assert_array_equal(bias, state["classifier.1.bias"].numpy())
    (batch,) = names["photographs"].batch(2).take(1)
    assert (batch.shape, batch.dtype.name) == ((2, 224, 224, 3), "uint8")


def test_the_code_of_each_page_is_run():
    # By the functions below.
    run = set(re.findall(r'run_page\("(.*?)"', Path(__file__).read_text())) | {EXPORT}
    assert run == {page for page in PAGES if code_of(page)}


@once
def test_the_code_about_segmentation(folder, capsys):
    run_page("docs/segmentation.md")
    assert capsys.readouterr().out.splitlines()[-2:] == ["(4, 65, 97)", "(120, 200)"]


@pytest.mark.slow
def test_the_code_about_detection(folder, capsys):
    # The network finds hardly anything after one epoch: what it gives are the same boxes.
    names = run_page("docs/detection.md")
    found, again = names["found"], names["run"](names["images"])
    assert found["boxes"].shape == (4, 10, 4)
    np.testing.assert_allclose(np.sort(again["scores"]), np.sort(found["scores"]), atol=1e-4)
    assert "{'boxes': (1, 10, 4), 'classes': (1, 10), 'scores': (1, 10)}" in capsys.readouterr().out


# Minutes; `formats` has a test of each call.
@pytest.mark.slow
def test_the_code_about_export(decided, folder):
    model, images = decided
    # The model of the page has the classes of the labels, and takes its images.
    labels = model.predict(images, verbose=0).argmax(1)
    model = keras.models.clone_model(model)
    model.set_weights(decided[0].get_weights())
    # One runtime: each would be another export.
    changes = [("keras_mnv2.accelerate(model)", 'keras_mnv2.accelerate(model, "onnxruntime")')]
    names = run_page(EXPORT, {"model": model, "images": images, "labels": labels}, changes)
    np.testing.assert_allclose(names["scores"], model.predict(images, verbose=0), atol=1e-4)
    assert names["report"].largest_difference < 1e-4
    assert {path.name for path in folder.glob("*.*")} >= {"mobilenet.onnx", "mobilenet_int8.tflite"}


RUNS = [
    pytest.param(i, name, format, precision, marks=marks(backend))
    for i, (name, format, precision, backend) in enumerate(
        [
            ("mobilenet", "tf_saved_model", "float32", None),
            ("mobilenet.onnx", "onnx", "float32", None),
            ("mobilenet.tflite", "litert", "float16", None),
            ("mobilenet_int8.tflite", "litert", "int8", "torch"),
            ("mobilenet.xml", "openvino", "float32", None),
            ("mobilenet.pt2", "torch", "float32", None),
        ]
    )
]


@pytest.mark.parametrize(("number", "name", "format", "precision"), RUNS)
def test_exported_files_run_without_keras(number, name, format, precision, decided, exported, tmp_path):
    blocks = [block for _, block in code_of(EXPORT) if "keras_mnv2" not in block]
    assert len(blocks) == len(RUNS)
    path = exported(format, precision).path
    (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / name)
    if format == "openvino":
        shutil.copy(path.with_suffix(".bin"), tmp_path / "mobilenet.bin")
    np.save(tmp_path / "images.npy", images := decided[1][:6])
    first = "import sys\nsys.modules['keras'] = sys.modules['keras_mnv2'] = None\n"
    first += "import numpy as np\nimages = np.load('images.npy')\n"
    done = subprocess.run([sys.executable, "-c", first + blocks[number]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = decided[0].predict(images, verbose=0).argmax(1)
    assert done.stdout.strip() == str([LABELS[i] for i in expected] if name == "mobilenet" else expected)


def test_figures_of_the_readmes_table_stand_there_alone():
    (table,) = re.findall(r"\[start:speed\] -->\n(.*?)<!-- --8<-- \[end:speed\]", PAGES["README.md"], re.DOTALL)
    figures = set(re.findall(r"[\d.]+ (?:ms|images/s)", table))
    assert len(figures) > 10
    for page, text in PAGES.items():
        repeated = {figure for figure in figures if re.search(rf"(?<![\d.,]){re.escape(figure)}", text)}
        assert page == "README.md" or not repeated, f"{page} repeats {repeated}"


def test_files_that_are_named_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:training|tests|keras_mnv2|docs|findings)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"


# Where it is installed the training is `keras_mnv2.training`.
MODULE = r"python -m (?:keras_mnv2\.(?=training))?(keras_mnv2|training(?:\.\w+)?) ?([^`\n]*)"
COMMAND = re.compile(MODULE + r"|keras-mnv2 ([^`\n]*)")


@once
def test_commands_that_are_named_have_these_options(monkeypatch):
    # `python -m training` starts itself again where this is not set.
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    asked: dict = {}
    texts = {**PAGES, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
    for page, text in texts.items():
        # A command may go on in the next line.
        for module, words, short in COMMAND.findall(text.replace("\\\n", " ")):
            words = (short or words).partition(" #")[0].split()
            module = module or "keras_mnv2"
            # Of these the first word is a command, with options of its own.
            key = (module, words[0]) if module in ("keras_mnv2", "training.experiments") and words else (module,)
            if key == ("keras_mnv2", "train"):
                key = ("training",)
            flags = set(re.findall(r"(?<!\[)--[a-z][\w-]*", " ".join(words))) - {"--help"}
            asked.setdefault(key, {}).update(dict.fromkeys(flags, page))
    assert len(asked) >= 8, asked
    shown = {key: help_of(*key, monkeypatch=monkeypatch) for key in asked}
    # A launch hands on what it does not know.
    shown["training.launch",] += shown["training",]
    for key, flags in asked.items():
        for flag, page in flags.items():
            assert re.search(rf"{flag}(?![\w-])", shown[key]), f"{page} has {flag} of {' '.join(key)}"


def help_of(module, *words, monkeypatch):
    """What `--help` of a command shows."""
    assert importlib.util.find_spec(module), module
    text = io.StringIO()
    monkeypatch.setattr(sys, "argv", [module, *words, "--help"])
    # What another test has imported would be run a second time, of which Python warns.
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    monkeypatch.delitem(sys.modules, f"{module}.__main__" if package else module, raising=False)
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert not end.value.code, (module, words)
    return text.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@once
def test_the_reference_has_all_that_is_public(site):
    shown = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    modules = [keras_mnv2.layers, keras_mnv2.applications.mobilenet_v2, keras_mnv2]
    places: dict = {}
    for module in modules:
        for name in module.__all__:
            public = getattr(module, name)
            if not isinstance(public, types.ModuleType):
                places.setdefault(public, {f"{public.__module__}.{public.__name__}"}).add(f"{module.__name__}.{name}")
    assert len(places) > 30
    for public, names in places.items():
        assert any(f'id="{name}"' in shown for name in names), f"{public} is at none of {names}"
    # An example that is no section of its docstring becomes a quotation.
    assert "<blockquote>" not in shown
    assert "&gt;&gt;&gt;" in shown


@once
def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    loads = re.compile(r'<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//|<link[^>]+href="?(?:https?:)?//')
    for path in pages:
        assert not loads.search(path.read_text()), path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text()), path
