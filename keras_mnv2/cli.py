"""The command line: `python -m keras_mnv2`, or `keras-mnv2`."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mnv2.cost import cost_profile
from keras_mnv2.evaluation import evaluation_data
from keras_mnv2.model import MobileNetV2
from keras_mnv2.preprocessing import imagenet_labels, preprocessing_of, resize_and_crop
from keras_mnv2.weights.load import checkpoint_of
from keras_mnv2.weights.table import Preprocessing, list_weights

TOP = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; the process's by default.

    Returns:
        The exit status: 0, or 2 where the caller's input was at fault, with one line on stderr.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="keras-mnv2", description="MobileNetV2 for Keras 3, from the command line.")
    parser.add_argument("--version", action="version", version=f"keras_mnv2 {metadata.version('keras_mnv2')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, about):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--json", action="store_true", help="machine-readable output")
        command.set_defaults(run=run)
        return command

    def add_weights(command):
        command.add_argument(
            "--weights",
            default="imagenet",
            help="a published checkpoint by name, an hf:// address, a file of weights, or a whole model as .keras",
        )
        command.add_argument("--alpha", type=float, help="width multiplier, for a file of weights (default 1.0)")

    predict = add("predict", _predict, "names what is on photographs")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--top", type=int, default=TOP, help="how many classes of each image (default 5)")
    add_weights(predict)

    evaluate = add("evaluate", _evaluate, "top-1 and top-5 accuracy on a folder of class folders")
    evaluate.add_argument("folder", metavar="FOLDER")
    evaluate.add_argument("--batch-size", type=int, default=32)
    add_weights(evaluate)

    weights = add("weights", _weights, "the table of published checkpoints")
    weights.add_argument("pattern", nargs="?", default="*", help="of the names, such as 'timm/*'")

    profile = add("profile", _profile, "parameters, multiply-adds and memory of each row")
    profile.add_argument("--alpha", type=float, default=1.0)
    profile.add_argument("--size", type=int, default=224, help="pixels of each side (default 224)")
    return parser


def _predict(options):
    for image in options.images:
        if not Path(image).is_file():
            raise FileNotFoundError(f"There is no image at {image!r}.")
    model, how = _load(options)
    pictures = np.stack([resize_and_crop(image, how) for image in options.images]).astype("float32")
    scores = model.predict(pictures, verbose=0)
    found = dict(zip(options.images, _best(scores, options.top), strict=True))
    if options.json:
        print(json.dumps({image: [dataclasses.asdict(row) for row in rows] for image, rows in found.items()}, indent=2))
        return
    for image, rows in found.items():
        table = [(str(i + 1), row.name, row.wnid, f"{100 * row.probability:.2f} %") for i, row in enumerate(rows)]
        head = ("", "class", "WordNet id" if rows[0].wnid else "", "probability")
        print(f"{image}\n{_table(head, table, right=(0, 3))}\n")


@dataclasses.dataclass(frozen=True)
class _Guess:
    index: int
    name: str
    wnid: str
    probability: float


def _best(scores, top):
    if scores.shape[1] in (1000, 1001):
        names = [("", "background"), *imagenet_labels()][-scores.shape[1] :]
    else:
        names = [("", f"class {i}") for i in range(scores.shape[1])]
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [_Guess(int(i), names[i][1], names[i][0], float(row[i])) for i in indices]
        for row, indices in zip(scores, order, strict=True)
    ]


def _evaluate(options):
    # The folder first: its mistakes show at once, before a download.
    data = evaluation_data(options.folder, batch_size=options.batch_size)
    model, how = _load(options)
    data.how, data.normalize = how, False
    classes = _class_indices(data.class_names, model.output_shape[-1])
    start, done = time.perf_counter(), 0
    right1 = right5 = 0
    for i in range(len(data)):
        x, labels = data[i]
        best = np.argsort(-model.predict_on_batch(x), axis=1, kind="stable")[:, :TOP]
        hits = best == classes[labels][:, None]
        right1, right5, done = right1 + hits[:, 0].sum(), right5 + hits.any(axis=1).sum(), done + len(x)
        speed = done / (time.perf_counter() - start)
        print(f"\r{done}/{len(data.images)} images, {speed:.1f} images/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    result = {
        "weights": options.weights,
        "images": done,
        "classes": len(data.class_names),
        "top1": 100 * right1 / done,
        "top5": 100 * right5 / done,
        "images_per_second": speed,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    rows = [(f"{done}", f"{result['top1']:.2f} %", f"{result['top5']:.2f} %", f"{speed:.1f}")]
    print(_table(("images", "top-1", "top-5", "images/s"), rows, right=range(4)))


def _class_indices(names, width):
    """The network's class of each folder, by its WordNet id or name, or by its place among others than ImageNet's."""
    if width not in (1000, 1001):
        if len(names) != width:
            raise ValueError(
                f"The folder must have as many class folders as the model has classes, {width}, got {len(names)}."
            )
        return np.arange(width)
    known: dict[str, list[int]] = {}
    for index, label in enumerate(imagenet_labels()):
        for name in label:
            known.setdefault(name, []).append(index)
    indices = []
    for name in names:
        found = known.get(name.replace(" ", "_"), [])
        if len(found) != 1:
            raise ValueError(
                f"The class folders must be named by ImageNet's WordNet ids, such as n01440764, or by names that are "
                f"its alone, got {name!r}."
            )
        indices.append(found[0] + width - 1000)
    return np.array(indices)


def _load(options) -> tuple[keras.Model, Preprocessing]:
    """A model that takes pixels of 0..255, and how they are resized and cut."""
    weights = options.weights
    if weights.endswith(".keras") and Path(weights).is_file():
        try:
            model = keras.models.load_model(weights, compile=False)
        except Exception as error:
            raise ValueError(
                f"The file {weights!r} cannot be loaded as a model: {str(error).splitlines()[0]}"
            ) from error
        if len(model.output_shape) != 2:
            raise ValueError(f"The model in {weights!r} must have a classifier, its output is {model.output_shape}.")
        if not any(layer.name == "preprocess" for layer in model.layers):
            model = keras.Sequential([model.inputs[0], keras.layers.Rescaling(1 / 127.5, offset=-1), model])
        size = model.input_shape[1] or 224
        return model, Preprocessing(int(size / 0.875), size)
    checkpoint = None if weights == "imagenet" else checkpoint_of(weights)
    model = MobileNetV2(weights=weights, alpha=options.alpha, include_preprocessing=True)
    return model, preprocessing_of(checkpoint)


def _weights(options):
    found = list_weights(options.pattern)
    if not found:
        raise ValueError(f"No published checkpoint has a name like {options.pattern!r}.")
    if options.json:
        print(json.dumps([dataclasses.asdict(checkpoint) for checkpoint in found], indent=2))
        return
    rows = [
        (
            c.name,
            f"{c.alpha}",
            f"{c.resolution}",
            f"{c.classes or 'no top'}",
            f"{c.top1:.1f}",
            f"{c.top5:.1f}",
            c.licence or "other",
            "published" if c.sha256 else "unknown",
        )
        for c in found
    ]
    head = ("name", "alpha", "pixels", "classes", "top-1", "top-5", "licence", "SHA-256")
    print(_table(head, rows, right=range(1, 6)))
    print(f"\n{len(found)} checkpoints; accuracies in percent, as published.")


def _profile(options):
    shape = (options.size, options.size, 3)
    profile = cost_profile(shape, alpha=options.alpha, print_fn=None if options.json else print)
    if not options.json:
        return
    totals: dict[str, Any] = {
        name: getattr(profile, name)
        for name in ("parameters", "statistics", "multiply_adds", "activations", "peak_memory")
    }
    print(json.dumps({**totals, "rows": [dataclasses.asdict(row) for row in profile.rows]}, indent=2))


def _table(head, rows, right=()):
    """Rows as text in columns; those whose numbers are in `right` are flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, tuple("-" * w for w in widths), *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
