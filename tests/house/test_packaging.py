"""The package as it is published: its files, that one backend is enough, and that training needs no clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import keras_mnv2
from tests.conftest import ONCE

ROOT = Path(__file__).parents[2]
# It builds, downloads and installs.
pytestmark = [pytest.mark.slow, *ONCE]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "PYTHONPATH")}


def run(*command, cwd="/", status=0, **environment):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def installed(wheel, extras, folder):
    """The folder of the commands of a new environment with the wheel."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", f"{wheel}[{extras}]")
    run(folder / "bin" / "python", "-m", "pip", "check")
    return folder / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source distribution)"""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_files_are_as_the_index_wants_them(built):
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_wheel_has_the_package_alone(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"keras_mnv2"}
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "keras_mnv2").rglob("*.py")}
    own |= {f"keras_mnv2/{path.relative_to(ROOT)}" for path in (ROOT / "training").rglob("*.py")}
    assert {"keras_mnv2/training/__main__.py", "keras_mnv2/training/recipes/digits.py"} <= own
    own |= {str(path.relative_to(ROOT)) for path in (ROOT / "keras_mnv2" / "formats" / "page").iterdir()}
    assert own | {"keras_mnv2/py.typed", "keras_mnv2/labels.txt"} <= names


def test_the_source_can_run_its_tests(built, tmp_path):
    with tarfile.open(built[1]) as file:
        file.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    for name in ("README.md", "docs/architecture.md", "training/run/train.py", "tests/conftest.py", "examples/unet.py"):
        assert (root / name).is_file(), name
    # The tests of the structure read all of them.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/house/test_structure.py"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_one_backend_is_enough(backend, built, tmp_path):
    commands = installed(built[0], backend, tmp_path / "venv")
    code = f"""
import os
os.environ["KERAS_BACKEND"] = {backend!r}
import numpy as np, keras_mnv2
model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
print(model.predict(np.zeros((2, 32, 32, 3)), verbose=0).shape)
"""
    assert "(2, 3)" in run(commands / "python", "-c", code)
    told = run(commands / "keras-mnv2", "train", status=2, KERAS_BACKEND=backend)
    assert told.splitlines()[-1] == 'error: train needs tyro: pip install "keras_mnv2[train]".'


def test_training_needs_no_clone(built, tmp_path, rng):
    commands = installed(built[0], "torch,train", tmp_path / "venv")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert not {"training", "tests", "examples"} & {path.name for path in site.iterdir()}
    for name, colour in (("blue", (20, 30, 200)), ("red", (210, 40, 30))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(colour, 40, (36, 40, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    model = keras_mnv2.MobileNetV2((32, 32, 3), 0.35, weights=None)
    keras_mnv2.save_weights(model, tmp_path / "weights.safetensors", layout="torchvision")

    # A module of this name is another's affair.
    (site / "training").mkdir()
    (site / "training" / "__init__.py").write_text("raise SystemExit('another training')")

    def command(*words):
        return run(*words, cwd=tmp_path, KERAS_BACKEND="torch", PATH=f"{commands}:{os.environ['PATH']}")

    line = (
        "keras-mnv2 train transfer --dataset photos --weights weights.safetensors --image-size 32 --batch-size 8 "
        "--head-epochs 5 --epochs 1"
    )
    out = command(*line.split(), "--run-dir", "runs/photos")
    assert "photos: 32 + 4 + 4 images of 2 classes" in out
    report = (tmp_path / "runs" / "photos" / "report.html").read_text("utf-8")
    assert f"KERAS_BACKEND=torch {line}</code>" in report
    assert "no SavedModel will be written" in out
    assert not (tmp_path / "runs" / "photos" / "saved_model").exists()
    command("keras-mnv2", "export", "runs/photos/model.keras", "photos.pt2")
    assert (tmp_path / "photos.pt2").is_file()
    evaluated = command("python", "-m", "keras_mnv2.training.evaluate", "photos.pt2", "--dataset", "photos")
    assert "4 test images" in evaluated
    launch = "python -m keras_mnv2.training.launch --processes 2 digits --epochs 1 --alpha 0.1 --steps-per-epoch 2"
    command(*launch.split(), "--run-dir", "runs/two")
    report = (tmp_path / "runs" / "two" / "report.html").read_text("utf-8")
    assert f"KERAS_BACKEND=torch {launch}</code>" in report
