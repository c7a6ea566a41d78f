"""The layering of the imports, the public names, the documentation's code, and one backend at a time."""

import ast
import doctest
import importlib
import os
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_mnv2
from tests.conftest import marks
from tests.helpers import hiding, run_python

ROOT = Path(__file__).parents[2]
# Each module imports only from levels below its own (docs/architecture.md).
LEVELS = {
    "annotations": 0,
    "arguments": 1,
    "checks": 0,
    "backend": 0,
    "start": 0,
    "initializers": 1,
    "ops.padding": 0,
    "architecture": 1,
    "tasks": 0,
    "tasks.boxes": 1,
    "losses": 1,
    "ops.default": 1,
    "ops.torch_block": 1,
    "ops.jax_pallas": 0,
    "ops.jax_depthwise": 1,
    "ops.tensorflow": 2,
    "ops.jax": 2,
    "ops.torch": 2,
    "ops": 3,
    "tables": 0,
    "norms": 0,
    "files": 0,
    "cost": 2,
    "weights": 0,
    "weights.bounds": 0,
    "weights.torch_pickle": 0,
    "weights.torch_file": 1,
    "weights.hdf5": 1,
    "weights.table": 1,
    "weights.read": 2,
    "weights.fetch": 3,
    "weights.rename": 2,
    "weights.source": 4,
    "weights.widths": 5,
    "preprocessing": 2,
    "folders": 0,
    "photographs": 3,
    "layers.block": 2,
    "layers.fusing": 4,
    "layers.parts": 5,
    "layers.detections": 5,
    "layers.resize": 5,
    "layers.compact": 6,
    "layers": 7,
    "network": 5,
    "rewrite": 5,
    "build": 7,
    "freeze": 7,
    "quantize": 7,
    "fold": 8,
    "stock": 8,
    "weights.load": 8,
    "model": 9,
    "tasks.segmentation": 10,
    "tasks.detection": 10,
    "formats": 0,
    "formats.converters": 0,
    "formats.onnx_file": 0,
    "formats.onnx_integers": 0,
    "formats.runtimes": 0,
    "formats.coreml": 0,
    "formats.executorch_file": 0,
    "formats.exported_program": 0,
    "formats.graphs": 1,
    "formats.litert_file": 0,
    "formats.litert_integers": 1,
    "formats.litert_metadata": 1,
    "formats.processes": 0,
    "formats.web": 0,
    "formats.comparison": 8,
    "formats.images": 8,
    "formats.export": 9,
    "formats.accelerate": 10,
    "loading": 4,
    "drawing": 3,
    "classifier": 10,
    "predictors": 11,
    "cli": 12,
    "__main__": 13,
    "applications.mobilenet_v2": 10,
    "applications": 11,
    "": 12,
}


def module_name(path):
    return ".".join(path.relative_to(ROOT / "keras_mnv2").with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_name(path): path for path in (ROOT / "keras_mnv2").rglob("*.py")}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = path.relative_to(ROOT).parent.parts if node.level else ()
            start = start[: len(start) + 1 - node.level]
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_point_strictly_downward():
    assert set(MODULES) == set(LEVELS)
    for name, path in MODULES.items():
        for target in imported(path):
            below = target.removeprefix("keras_mnv2").removeprefix(".")
            if target.startswith("keras_mnv2.") and below in LEVELS:
                # A package's modules, and its front page, say `from package import module`.
                package = below == name or (below == "ops" and name.startswith("ops."))
                assert package or LEVELS[below] < LEVELS[name], f"{name} imports {below}"


def test_only_public_keras_is_used():
    for path in [*MODULES.values(), *(ROOT / "training").rglob("*.py")]:
        assert not [name for name in imported(path) if name.startswith("keras.src")], path


def test_training_imports_only_public_names():
    for path in (ROOT / "training").rglob("*.py"):
        names = {name for name in imported(path) if name.startswith("keras_mnv2.")}
        assert not names, f"{path} imports {names}"


# Rooms and files of the training; each imports only from those on lower levels, and a room's files from one another.
ROOMS = {
    "": 0,
    "process": 0,
    "files": 0,
    "ranges": 1,
    "config": 2,
    "recipes": 3,
    "parallel": 3,
    "data": 4,
    "state": 5,
    "report": 6,
    "run": 7,
    "benchmark": 7,
    "evaluate_photographs": 7,
    "preprocessing": 7,
    "scenes": 7,
    "evaluate": 8,
    "experiments": 8,
    "__main__": 8,
    "launch": 9,
}


def room(name):
    return name.removeprefix("training").removeprefix(".").partition(".")[0]


def test_rooms_of_the_training_import_from_lower_levels():
    seen = {""}
    for path in (ROOT / "training").rglob("*.py"):
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        seen.add(own)
        for name in imported(path):
            if name.startswith("training.") and room(name) in ROOMS and room(name) != own:
                assert ROOMS[room(name)] < ROOMS[own], f"{path} imports {name}"
    assert seen == set(ROOMS)


def levels_of(text):
    """The levels that a page's table gives its files."""
    found = {}
    for level, names in re.findall(r"^\| (\d+) \| (`[^|]*) \|", text, re.MULTILINE):
        for name in re.findall(r"`([\w/.]+?)`", names):
            found[name.removesuffix(".py").removesuffix("/").replace("/", ".").removesuffix(".__init__")] = int(level)
    return found


def test_the_pages_tables_are_the_levels():
    library, _, training = (ROOT / "docs" / "architecture.md").read_text().partition("## Training")
    # Packages without content have no row, and the front page of all is `__init__.py`.
    expected = {name or "__init__": level for name, level in LEVELS.items()}
    assert levels_of(library) == {
        n: f for n, f in expected.items() if n not in ("__main__", "weights", "formats", "tasks")
    }
    assert levels_of(training) == {name: level for name, level in ROOMS.items() if name}


def test_the_public_names():
    assert set(keras_mnv2.__all__) == {
        "Accelerated",
        "accelerate",
        "Checkpoint",
        "Classifier",
        "CostProfile",
        "DeepLabV3",
        "Detector",
        "ExportReport",
        "MobileNetV2",
        "Preprocessing",
        "SSDLite",
        "SegmentationCheckpoint",
        "Segmenter",
        "TargetEncoder",
        "applications",
        "class_folders",
        "cost_profile",
        "decode_predictions",
        "detector",
        "draw_detections",
        "draw_mask",
        "evaluation_data",
        "export",
        "fold_batch_norm",
        "freeze",
        "from_keras",
        "layers",
        "list_weights",
        "load_classifier",
        "load_detector",
        "load_export",
        "load_image",
        "load_segmenter",
        "load_weights",
        "losses",
        "palette",
        "preprocess_input",
        "probabilities",
        "quantize_aware",
        "resize_and_crop",
        "save_weights",
        "unfreeze",
    }
    for name in keras_mnv2.__all__:
        assert getattr(keras_mnv2, name).__doc__


# Their examples take long. Those that start processes start one fewer on the backend that writes the graph. None: slow.
LONG: dict[str, str | None] = {
    "classifier": "torch",
    "formats.accelerate": None,
    "formats.export": "tensorflow",
    "formats.runtimes": None,
    "model": "torch",
    "predictors": "torch",
    "quantize": "torch",
    "stock": "torch",
    "tasks.detection": "torch",
    "tasks.segmentation": "torch",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(LONG[n]) if n in LONG else []) for n in sorted(LEVELS)])
def test_the_examples_of_docstrings_run(name, tmp_path, monkeypatch):
    parts = name.split(".")
    if parts[0] == "ops" and parts[-1].partition("_")[0] in {"tensorflow", "jax", "torch"} - {keras.backend.backend()}:
        assert ">>>" not in MODULES[name].read_text()
        return
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"keras_mnv2.{name}".rstrip("."))
    names = {**{n: getattr(keras_mnv2, n) for n in keras_mnv2.__all__}, **vars(module), "np": np}
    assert doctest.testmod(module, globs=names).failed == 0


def test_readme_is_short_and_has_two_set_up_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    commands = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
    assert len(commands) == 2


ALONE = """
import numpy as np, keras
before = set(sys.modules)
import keras_mnv2
# What takes long to import waits until it is needed.
late = {"tensorflow", "jax", "torch", "torchvision", "onnx", "onnxruntime", "openvino", "ai_edge_litert", "scipy"}
late |= {"coremltools", "executorch", "matplotlib", "pandas", "sklearn", "transformers", "timm"}
imported = {name.partition(".")[0] for name in set(sys.modules) - before} & late - {keras.backend.backend()}
assert not imported, f"importing keras_mnv2 imports {sorted(imported)}"
rows = [(1, 16, 1, 1), (6, 24, 2, 2)]
model = keras_mnv2.MobileNetV2((32, 32, 3), weights=None, classes=3, inverted_residual_setting=rows)
model.compile("sgd", "sparse_categorical_crossentropy")
x, y = np.zeros((4, 32, 32, 3), "float32"), np.zeros(4, "int32")
model.fit(x, y, verbose=0)
expected = model.predict(x, verbose=0)
model.save(sys.argv[1])
assert np.array_equal(keras.models.load_model(sys.argv[1]).predict(x, verbose=0), expected)
if "tensorflow" in hidden:
    try:
        keras_mnv2.export(model, "nowhere")
    except ImportError as error:
        assert "pip install" in str(error)
    else:
        raise SystemExit("the missing TensorFlow went unnoticed")
print("fit, predicted, saved, loaded")
"""


def test_one_backend_alone_is_enough(tmp_path):
    backend = keras.backend.backend()
    hidden = {"tensorflow", "jax", "jaxlib", "torch"} - {backend, {"jax": "jaxlib"}.get(backend)}
    code = f"{hiding(*hidden)}\nhidden = {hidden}\n{ALONE}"
    assert run_python(code, backend, tmp_path / "model.keras").strip() == "fit, predicted, saved, loaded"


def test_ci_runs_readmes_command():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
