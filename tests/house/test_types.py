"""The annotations of the public names, as Python and as a user's type checker read them."""

import inspect
import subprocess
import sys
import sysconfig
import typing
import venv
from pathlib import Path

import keras_mnv2
from tests.conftest import once_on

ROOT = Path(__file__).parents[2]
PACKAGE = keras_mnv2.__name__


def public_functions():
    """Each public function, and of each public class the methods that this package writes, by name."""
    for module in (keras_mnv2, keras_mnv2.layers, keras_mnv2.applications, keras_mnv2.applications.mobilenet_v2):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield f"{module.__name__}.{name}", thing
            for kind in thing.__mro__ if inspect.isclass(thing) else ():
                for key, member in vars(kind).items() if kind.__module__.startswith(PACKAGE) else ():
                    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                    member = inspect.unwrap(member) if inspect.isfunction(member) else None
                    # A data class has some of its methods written.
                    if member is not None and member.__code__.co_filename != "<string>":
                        yield f"{kind.__module__}.{kind.__name__}.{key}", member


def test_public_functions_are_annotated():
    functions = dict(public_functions())
    assert {"keras_mnv2.export", "keras_mnv2.layers.compact.InvertedResidual.call"} <= functions.keys()
    bare = []
    for name, function in functions.items():
        signature = inspect.signature(function)
        wanted = {key for key in signature.parameters if key not in ("self", "cls")} | {"return"}
        # The hints as Python resolves them: a name that is only there for the checker would raise.
        bare += [f"{name}: {key}" for key in sorted(wanted - typing.get_type_hints(function).keys())]
    assert not bare


# Every line says a type, or has a mistake that must be found: `warn_unused_ignores` tells where it is not.
SCRIPT = """
from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import keras
import numpy as np
from PIL import Image

import keras_mnv2
from keras_mnv2 import layers

model: keras.Model = keras_mnv2.MobileNetV2((96, 96, 3), weights=None, features=["stride_16"], include_top=False)
model = keras_mnv2.MobileNetV2(weights=Path("mobilenet.pth"), block=layers.InvertedResidual, norm_layer="group_norm")
model = keras_mnv2.applications.MobileNetV2(weights=None)
keras_mnv2.MobileNetV2(alpha="wide")  # type: ignore[arg-type]
keras_mnv2.MobileNetV2(weights=1)  # type: ignore[arg-type]
keras_mnv2.MobileNetV2(pooled="avg")  # type: ignore[call-arg]
keras_mnv2.applications.MobileNetV2(classes="ten")  # type: ignore[arg-type]
layers.ConvNormActivation("32", stride=2)  # type: ignore[arg-type]
layers.InvertedResidual(16, linear_bottleneck=None)  # type: ignore[arg-type]
layers.ScaleShift(axis="last")  # type: ignore[arg-type]

assert_type(keras_mnv2.freeze(model, before="block_12"), int)
assert_type(keras_mnv2.unfreeze(model), int)
keras_mnv2.freeze(model, before=12)  # type: ignore[arg-type]
assert_type(keras_mnv2.load_weights(model, "mobilenet.h5"), None)
assert_type(keras_mnv2.save_weights(model, Path("mobilenet.h5")), None)
keras_mnv2.load_weights(model, None)  # type: ignore[arg-type]
keras_mnv2.save_weights(model, None)  # type: ignore[arg-type]

report = keras_mnv2.export(keras_mnv2.fold_batch_norm(model), "mobilenet.onnx", format="onnx")
assert_type(report, keras_mnv2.ExportReport)
assert_type(report.top1_agreement, float | None)
keras_mnv2.export(model, "mobilenet", overwrite="yes")  # type: ignore[arg-type]
run = keras_mnv2.load_export(report.path)
assert_type(run, Callable[[np.ndarray], dict[str, np.ndarray]])

profile = keras_mnv2.cost_profile(alpha=0.5, print_fn=None)
assert_type(profile, keras_mnv2.CostProfile)
assert_type(profile.largest_tensors, dict[tuple[int, int], tuple[int, int]])
checkpoint = keras_mnv2.list_weights("timm/*")[0]
assert_type(checkpoint, keras_mnv2.Checkpoint)
assert_type(checkpoint.preprocessing, keras_mnv2.Preprocessing)

assert_type(keras_mnv2.load_image("cat.jpg"), Image.Image)
assert_type(keras_mnv2.resize_and_crop("cat.jpg", checkpoint, size=192), np.ndarray)
keras_mnv2.resize_and_crop(4)  # type: ignore[arg-type]
keras_mnv2.preprocess_input(np.zeros((1, 96, 96, 3)), weights=4)  # type: ignore[arg-type]
assert_type(keras_mnv2.class_folders("pets"), tuple[list[Path], list[int], tuple[str, ...]])
assert_type(keras_mnv2.decode_predictions(np.zeros((1, 1000))), list[list[tuple[str, str, float]]])
keras_mnv2.evaluation_data("pets", batch_size="all")  # type: ignore[arg-type]
quantised: keras.Model = keras_mnv2.quantize_aware(keras_mnv2.from_keras(model))
"""
# What is large, and is in none of the types; and what has none.
SETTINGS = """
[mypy]
strict = True

[mypy-jax.*,onnx.*,safetensors.*,torch.*]
follow_imports = skip

[mypy-keras.*]
ignore_missing_imports = True
"""


@once_on("tensorflow")
def test_a_users_type_checker_reads_them(tmp_path):
    # An environment with the package beside all else that is installed: mypy takes it by its `py.typed` alone.
    venv.create(tmp_path / "venv", symlinks=True)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "paths.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "venv" / "bin" / "python")]
    done = subprocess.run([*command, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
