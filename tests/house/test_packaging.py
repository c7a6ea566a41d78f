"""The package as it is published: what is in its files, and that it installs with one backend alone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ONCE

ROOT = Path(__file__).parents[2]
# It builds, downloads and installs.
pytestmark = [pytest.mark.slow, *ONCE]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "PYTHONPATH")}


def run(*command):
    done = subprocess.run(list(map(str, command)), cwd="/", env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    assert own | {"keras_mnv2/py.typed", "keras_mnv2/labels.txt"} <= names


def test_the_source_can_run_its_tests(built, tmp_path):
    with tarfile.open(built[1]) as file:
        file.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    for name in ("README.md", "docs/architecture.md", "training/train.py", "tests/conftest.py", "findings/README.md"):
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
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", f"{built[0]}[{backend}]")
    run(python, "-m", "pip", "check")
    code = f"""
import os
os.environ["KERAS_BACKEND"] = {backend!r}
import numpy as np, keras_mnv2
model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3)
print(model.predict(np.zeros((2, 32, 32, 3)), verbose=0).shape)
"""
    assert "(2, 3)" in run(python, "-c", code)
