"""The settings of a run: each is checked when they are made, and by the command before a backend starts."""

import dataclasses
import subprocess
import sys
import typing

import numpy as np
import pytest

from tests.conftest import once
from training import launch
from training.__main__ import RECIPES, main, settings
from training.config import Config
from training.recipes import digits

WHOLE, POSITIVE = "a whole number of at least", "a finite number above 0"
REFUSED = [
    ("epochs", -1, f"{WHOLE} 0"),
    ("epochs", 2.5, f"{WHOLE} 0"),
    ("epochs", True, f"{WHOLE} 0"),
    ("learning_rate", -1.0, POSITIVE),
    ("learning_rate", 0.0, POSITIVE),
    ("learning_rate", float("nan"), POSITIVE),
    ("learning_rate", float("inf"), POSITIVE),
    ("learning_rate", "0.1", POSITIVE),
    ("head_learning_rate", 0.0, POSITIVE),
    ("quantize_learning_rate", -1e-4, POSITIVE),
    ("alpha", 0.0, POSITIVE),
    ("label_smoothing", 3.0, "a number from 0 up to, and not including, 1"),
    ("label_smoothing", 1.0, "a number from 0 up to, and not including, 1"),
    ("dropout", 1.0, "a number from 0 up to, and not including, 1"),
    ("momentum", -0.1, "a number from 0 up to, and not including, 1"),
    ("ema", 1.0, "a number from 0 up to, and not including, 1"),
    ("weight_decay", -1.0, "a finite number of at least 0"),
    ("warmup_epochs", -3.0, "a finite number of at least 0"),
    ("checkpoint_seconds", -1.0, "a finite number of at least 0"),
    ("mixup", float("nan"), "a finite number of at least 0"),
    ("shift", -0.5, "a number from 0 to 1"),
    ("cutmix", 1.5, "a number from 0 to 1"),
    ("erase", 2.0, "a number from 0 to 1"),
    ("crop_area", 0.0, "a number above 0 and at most 1"),
    ("crop_area", 2.0, "a number above 0 and at most 1"),
    ("power", 0.0, POSITIVE),
    ("rescale", 0.5, "a finite number of at least 1"),
    ("zoom_out", 0.5, "a finite number of at least 1"),
    ("box_scales", (0.2, 0.3), "7 finite numbers above 0"),
    ("box_scales", (0.0,) * 7, "7 finite numbers above 0"),
    ("box_scales", "0.2", "7 finite numbers above 0"),
    ("rescale", float("inf"), "a finite number of at least 1"),
    ("decay_rate", 0.0, "a number above 0 and at most 1"),
    ("steps_per_epoch", -1, f"{WHOLE} 1"),
    ("steps_per_epoch", 0, f"{WHOLE} 1"),
    ("checkpoint_steps", 0, f"{WHOLE} 1"),
    ("keep_checkpoints", 0, f"{WHOLE} 1"),
    ("batch_size", 0, f"{WHOLE} 1 and at most 1048576"),
    ("image_size", 0, f"{WHOLE} 32 and at most 8192"),
    ("image_size", 10**6, f"{WHOLE} 32 and at most 8192"),
    ("evaluation_size", 31, f"{WHOLE} 32 and at most 8192"),
    ("resize", -1, f"{WHOLE} 1 and at most 16384"),
    ("workers", 0, f"{WHOLE} 1 and at most 1024"),
    ("devices", 0, f"{WHOLE} 1 and at most 1024"),
    ("seed", -1, f"{WHOLE} 0 and at most 4294967295"),
    ("pad", -1, f"{WHOLE} 0"),
    ("pad", 32, "less than image_size, 32"),
    ("head_epochs", -1, f"{WHOLE} 0"),
    ("early_stopping", -1, f"{WHOLE} 0"),
    ("quantize_epochs", -1, f"{WHOLE} 0"),
    ("stem_stride", 3, "one of 1, 2"),
    ("optimizer", "adam", "one of 'adamw', 'sgd', 'rmsprop'"),
    ("schedule", None, "one of 'cosine', 'poly', 'exponential', 'constant'"),
    ("task", "depth", "one of 'classification', 'segmentation', 'detection'"),
    ("output_stride", 32, "one of 8, 16"),
    ("precision", "int8", "one of 'float32', 'bfloat16', 'float16'"),
    ("scale_with_devices", "twice", "one of 'no', 'linear', 'sqrt'"),
    ("flip", "no", "True or False"),
    ("saved_model", 1, "True or False"),
    ("saved_model", "True", "True or False"),
    ("dataset", "", "a text that is not empty"),
    ("weights", 5, "a text that is not empty"),
    ("run_dir", 5, "a path that is not empty"),
    ("stages", ((1, 16, 1, 3),), "rows of 4 whole numbers of at least 1, the last 1 or 2"),
    ("stages", ((1, 16, 1),), "rows of 4 whole numbers of at least 1, the last 1 or 2"),
    ("stages", ((1, 0, 1, 1),), "rows of 4 whole numbers of at least 1, the last 1 or 2"),
    ("stages", (), "rows of 4 whole numbers of at least 1, the last 1 or 2"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), REFUSED)
def test_a_setting_that_is_not_allowed_is_one_sentence(field, value, allowed):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  The whole text is compared.
        dataclasses.replace(digits.CONFIG, **{field: value})
    assert str(caught.value) == f"{field} must be {allowed}, got {value!r}."


def test_every_number_has_a_range():
    refused = {field for field, _, _ in REFUSED}
    kinds = typing.get_type_hints(Config, include_extras=True)
    bare = {name for name, kind in kinds.items() if not hasattr(kind, "__metadata__")}
    assert set(kinds) - bare <= refused
    # What has none is a text, a path, a choice or a flag.
    assert not {name for name in bare if isinstance(getattr(digits.CONFIG, name), float)}
    assert not {name for name in bare if type(getattr(digits.CONFIG, name)) is int} - {"stem_stride", "output_stride"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("label_smoothing", 0.0),
        ("shift", 1),
        ("cutmix", 1.0),
        ("crop_area", 1.0),
        ("crop_area", None),
        ("steps_per_epoch", None),
        ("pad", 31),
        ("weight_decay", 0),
        ("alpha", None),
        ("seed", 2**32 - 1),
        ("learning_rate", np.float32(0.5)),
        ("batch_size", np.int64(8)),
        ("flip", True),
        ("stages", [[1, 16, 1, 2]]),
    ],
)
def test_what_is_allowed_is_kept_as_a_value_of_python(field, value):
    found = getattr(dataclasses.replace(digits.CONFIG, **{field: value}), field)
    assert found == (((1, 16, 1, 2),) if field == "stages" else value)
    assert type(found) in (int, float, bool, tuple, type(None))


def test_a_run_that_goes_on_needs_its_folder():
    with pytest.raises(ValueError, match="resume needs run_dir"):
        dataclasses.replace(digits.CONFIG, resume=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_made_and_asked_for(recipe):
    config = RECIPES[recipe].CONFIG
    assert settings(recipe, ["--dataset", config.dataset]) == config


COMMANDS = [
    ("--epochs", "-1"),
    ("--learning-rate", "-1"),
    ("--label-smoothing", "3"),
    ("--weight-decay", "-1"),
    ("--warmup-epochs", "-3"),
    ("--shift", "-0.5"),
    ("--crop-area", "0"),
    ("--crop-area", "2"),
    ("--steps-per-epoch", "-1"),
    ("--batch-size", "0"),
    ("--image-size", "0"),
    ("--resize", "-1"),
]


@pytest.mark.parametrize(("flag", "value"), COMMANDS)
def test_a_command_with_a_bad_setting_is_one_line_and_status_2(flag, value, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", "digits", flag, value])
    with pytest.raises(SystemExit) as ended:
        main()
    out, told = capsys.readouterr()
    assert ended.value.code == 2
    assert not out
    assert told.count("\n") == 1
    assert told.startswith(f"{flag[2:].replace('-', '_')} must be a")
    assert f"got {value}" in told


def test_a_launch_with_a_bad_setting_says_so_once_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch", "--processes", "2", "digits", "--epochs", "-1"])
    monkeypatch.setattr(launch.subprocess, "Popen", None)
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "epochs must be a whole number of at least 0, got -1.\n"


@once
def test_settings_do_not_wait_for_a_backend():
    code = """
import sys
sys.argv = ["training", "--epochs", "-1"]
from training.__main__ import main
try:
    main()
finally:
    assert not {"keras", "keras_mnv2", "torch", "tensorflow", "jax"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "epochs must be a whole number of at least 0, got -1.\n"


def test_help_shows_the_ranges(capsys):
    with pytest.raises(SystemExit) as ended:
        settings("digits", ["--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    for text in ("--epochs INT>=0", "--learning-rate FLOAT>0", "--dropout 0<=FLOAT<1", "--crop-area None|0<FLOAT<=1"):
        assert text in shown
