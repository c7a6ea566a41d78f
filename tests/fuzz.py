"""Calls with arguments drawn at random, good and bad: `python -m tests.fuzz builder --seed 1 --calls 1000`.

Each call gives what was planned, or an error whose sentence names an argument, in ten seconds and two gigabytes.
"""

import argparse
import contextlib
import io
import json
import math
import random
import re
import resource
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import keras
import numpy as np

import keras_mnv2

SECONDS, BYTES = 10, 2 * 2**30
FEW = [(1, 16, 1, 1), (6, 24, 2, 2)]
NUMBERS = (
    0,
    -1,
    -0.5,
    math.nan,
    math.inf,
    1e300,
    10**400,
    "1",
    True,
    None,
    [1],
    b"1",
    2.5,
    np.float32(0.5),
    Fraction(1, 2),
)
WORDS = ("", "x", 5, None, True, [], ("a", "b"), b"x", len, int, object())
SHAPES = (
    None,
    (32, 32, 3),
    [64, 48, 1],
    (None, None, 3),
    (3, 32, 32),
    (31, 32, 3),
    "32",
    32,
    (0, 0, 3),
    (32.5, 32, 3),
    (-1, 32, 3),
    (10**12, 32, 3),
    (32, 32),
    ("a", "b", "c"),
    (True, 32, 3),
    (np.int64(40), 32, np.int32(2)),
    (32, 32, 10**9),
)
BUILDER = {
    "input_shape": SHAPES,
    "alpha": (0.35, 0.5, 1, 100, *NUMBERS),
    "include_top": (True, False, "False", 0, 1, None, np.bool_(True)),
    "weights": ("no/such/file.h5", "nothing", 5, [], b"x", True),
    "input_tensor": ("x", 5, np.zeros((1, 32, 32, 3)), None),
    "pooling": ("avg", "max", *WORDS),
    "classes": (1, 7, np.int64(7), 10**9, 10**30, *NUMBERS),
    "classifier_activation": ("softmax", "relu", keras.activations.softmax, *WORDS),
    "name": ("net", "a b", *WORDS),
    "averaged": (True, "x", 5),
    "inverted_residual_setting": (
        FEW,
        [],
        "paper",
        5,
        [(6, 24, 2, 3)],
        [(0, 1, 1, 1)],
        [(1, 16, 10**9, 1)],
        [[1, 16, 1]],
        [(1, 16, 1, "1")],
        [(1e300, 16, 1, 1)],
        [(1, 10**400, 1, 1)],
        np.array([[1, 16, 1, 1]]),
        {},
        [None],
        [(0.001, 16, 1, 1)],
    ),
    "round_nearest": (1, 4, 10**6, 10**12, *NUMBERS),
    "block": (keras_mnv2.layers.InvertedResidual, lambda *a, **k: None, *WORDS),
    "norm_layer": (
        "batch_norm",
        "group_norm",
        keras.layers.BatchNormalization,
        keras.layers.LayerNormalization(),
        keras.layers.Dense,
        {"class_name": "x"},
        {},
        *WORDS,
    ),
    "dropout": NUMBERS,
    "depth_multiplier": (0.5, 1.4, 1e9, *NUMBERS),
    "fix_stem_head": (True, False, "x", 1),
    "activation": ("relu6", "silu", *WORDS),
    "padding": ("same", "symmetric", "valid", *WORDS),
    "norm_momentum": NUMBERS,
    "norm_epsilon": NUMBERS,
    "stochastic_depth": NUMBERS,
    "stem_stride": (1, 2, 3, *NUMBERS),
    "output_stride": (8, 16, 32, 64, *NUMBERS),
    "include_preprocessing": (True, "no", 1, None),
    "features": (True, ["stem"], ["nothing"], [], 5, "stem", {}),
    "data_format": ("channels_last", "channels_first", "NCHW", *WORDS),
    "dtype": ("float32", "mixed_bfloat16", "float64", "int8", "complex64", *WORDS),
}
JUNK = (
    None,
    5,
    -1,
    2.5,
    math.nan,
    "x",
    "",
    b"x",
    [],
    {},
    (),
    object(),
    True,
    np.zeros(3),
    np.zeros((2, 2)),
    Path("nothing"),
    len,
    int,
    {"a": 1},
    [None],
    [1, 2],
    np.zeros((1, 1000), complex),
    10**400,
)


def functions(folder):
    """Functions by name, with arguments that are right."""
    model = keras_mnv2.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=3, inverted_residual_setting=FEW)
    keras_mnv2.save_weights(model, folder / "w.h5")
    image = np.zeros((40, 50, 3), "uint8")
    package = keras_mnv2
    return {
        package.preprocess_input: {"x": np.zeros((1, 8, 8, 3)), "data_format": None, "weights": None},
        package.decode_predictions: {"preds": np.zeros((1, 1000)), "top": 5},
        package.resize_and_crop: {"image": image, "weights": None, "size": 32},
        package.load_image: {"image": image},
        package.evaluation_data: {
            "images": image[None],
            "labels": [0],
            "weights": None,
            "batch_size": 2,
            "size": 32,
            "workers": 1,
            "normalize": True,
        },
        package.cost_profile: {
            "input_shape": (32, 32, 3),
            "classes": 3,
            "include_top": True,
            "print_fn": None,
            "alpha": 1.0,
        },
        package.freeze: {"model": model, "before": "block_2", "norms": True},
        package.unfreeze: {"model": model},
        package.fold_batch_norm: {"model": model},
        package.quantize_aware: {"model": model},
        package.from_keras: {"model": model},
        package.export: {
            "model": model,
            "path": folder / "out.keras",
            "format": "keras",
            "precision": "float32",
            "labels": None,
            "sample": None,
            "calibration": None,
            "overwrite": False,
            "io_dtype": "int8",
            "fold": None,
        },
        package.save_weights: {"model": model, "path": folder / "w.h5", "layout": "keras"},
        package.load_weights: {"model": model, "weights": folder / "w.h5", "averaged": None},
        package.load_export: {"path": folder / "nothing.onnx"},
        package.load_classifier: {"model": folder / "w.h5", "image_size": 32, "alpha": 0.35, "scale": None},
        package.probabilities: {"scores": np.zeros((1, 3))},
        package.list_weights: {"pattern": "*", "library": None, "alpha": None},
        package.class_folders: {"folder": folder, "class_names": None},
        package.layers.InvertedResidual: {"filters": 8, "stride": 1, "expand_ratio": 6, "dilation_rate": 1},
        package.layers.ConvNormActivation: {"filters": 8, "kernel_size": 3, "stride": 1, "norm_layer": "batch_norm"},
    }


def builder_call(chance, folder):
    """What to call, and a check of what it gives; with the arguments."""
    drawn = {name: chance.choice(BUILDER[name]) for name in chance.sample(sorted(BUILDER), chance.randint(1, 3))}
    base = {"input_shape": (32, 32, 3), "alpha": 0.35, "weights": None, "classes": 5, "inverted_residual_setting": FEW}
    arguments = {**base, **drawn}

    def call():
        model = keras_mnv2.MobileNetV2(**arguments)
        if arguments.get("include_top", True) is True and arguments["classes"] is not None:
            assert model.output_shape == (None, int(arguments["classes"]))

    return call, drawn


def function_call(chance, folder):
    """Likewise, of one of the public functions."""
    if folder not in made:
        made[folder] = functions(folder)
    function, right = chance.choice(list(made[folder].items()))
    names = chance.sample(sorted(right), min(len(right), chance.randint(1, 2)))
    wrong = {name: chance.choice(JUNK) for name in names}
    return lambda: function(**{**right, **wrong}), wrong


def settings_call(chance, folder):
    """Likewise, of a training command up to its first batch and model."""
    from training.__main__ import settings
    from training.config import Config

    fields = Config.__dataclass_fields__
    names = [name for name in fields if name not in ("recipe", "dataset", "run_dir", "data_dir")]
    drawn = {name: chance.choice(FLAGS) for name in chance.sample(names, chance.randint(1, 2))}
    words: list[str] = []
    for name, value in drawn.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if fields[name].type in (bool, "bool") else [flag, value]

    def call():
        from training.data import sets
        from training.data.batches import training_batches
        from training.run import train

        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                config = settings("digits", words)
        except SystemExit as ended:
            if ended.code == 2:
                raise ValueError(said.getvalue().strip()) from None
            raise
        # As the command goes on.
        dataset = sets.load("digits", config.image_size, None, config.held_out)
        batches = training_batches(dataset.train, 10, config, (0, 1))
        if config.batch_size <= 256 and config.image_size <= 64:
            assert batches[0][0].shape[1:3] == (config.image_size, config.image_size)
            assert not batches.unreadable, batches.unreadable
        train.build_model(config, 10, 1, config.image_size)

    return call, drawn


FLAGS = (
    "0",
    "-1",
    "3",
    "0.5",
    "-0.5",
    "1e9",
    "nan",
    "inf",
    "x",
    "None",
    "1",
    "2",
    "32",
    "99999999999",
    "True",
    "linear",
)
made: dict = {}
KINDS = {"builder": builder_call, "functions": function_call, "settings": settings_call}


def fuzz(kind: str, seed: int, calls: int) -> dict:
    """Makes the calls, and gives counts and a line for each fault."""
    chance = random.Random(seed)
    counts = {"built": 0, "named": 0, "faults": []}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        for number in range(calls):
            call, drawn = KINDS[kind](chance, folder)
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
            fault = ""
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    call()
                counts["built"] += 1
            except (ValueError, TypeError, OSError) as error:
                told = str(error)
                if any(re.search(rf"(?<![a-z]){name}(?![a-z])", told.replace("-", "_")) for name in drawn):
                    counts["named"] += 1
                else:
                    fault = f"{type(error).__name__}: {told[:200]}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                fault = f"{type(error).__name__}: {str(error)[:200]}"
            seconds = time.monotonic() - start
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if seconds > SECONDS or grown > BYTES:
                fault = f"{seconds:.0f} s and {grown / 2**20:.0f} MiB; {fault}"
            if fault:
                shown = {name: repr(value)[:40] for name, value in drawn.items()}
                counts["faults"].append(f"call {number}, {shown}: {fault}")
            if number % 20 == 0:
                keras.backend.clear_session()
    return counts


def main() -> None:
    """Prints what `fuzz` gives as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    found = fuzz(options.kind, options.seed, options.calls)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["faults"] else 0)


if __name__ == "__main__":
    main()
