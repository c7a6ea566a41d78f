"""The command line: `python -m keras_mnv2`, or `keras-mnv2`."""

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
from PIL import Image

from keras_mnv2.checks import check_number, check_whole
from keras_mnv2.classifier import IMAGENET, Classifier, load_classifier
from keras_mnv2.cost import cost_profile
from keras_mnv2.drawing import draw_detections, draw_mask, name_of
from keras_mnv2.files import folder_beside, move_results
from keras_mnv2.folders import SUFFIXES, images_below
from keras_mnv2.formats.export import FORMATS, IO_DTYPES, LAYOUTS, PRECISIONS, export
from keras_mnv2.loading import SCALES, TASKS, is_exported, load_model, path_of_model
from keras_mnv2.model import MobileNetV2
from keras_mnv2.photographs import evaluation_data
from keras_mnv2.predictors import SCORE, Detector, Segmenter, load_detector, load_segmenter
from keras_mnv2.preprocessing import SIDE, imagenet_labels, preprocessing_of, probabilities, scales_pixels
from keras_mnv2.start import training
from keras_mnv2.tables import in_columns
from keras_mnv2.weights.table import Preprocessing, list_weights

TOP = 5
# Threads that read images, each a batch ahead of the network.
READERS = 2
BAR = 30
# Photographs that the ranges of 8-bit activations are taken from, evenly chosen.
CALIBRATION_IMAGES = 200
# What messages of the library's name arguments are options here.
OPTIONS = {
    "model must": "--weights must",
    "alpha must": "--alpha must",
    **{f"which {load} takes": f"which --task {task} takes" for task, (_, load) in TASKS.items()},
}
# Where the pictures of detections and masks go.
PICTURES = "predictions"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; the process's by default.

    Returns:
        The exit status: 0, or 2 where the caller's input was at fault, with one line on stderr.

    Raises:
        SystemExit: where the words are no command, after `--help`, and where a training ends early; with the status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        return _train(words[1:], own_process=argv is None)
    parser = _parser()
    options = parser.parse_args(words)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # Keras's errors may have several lines.
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="keras-mnv2", description="MobileNetV2 for Keras 3, from the command line.")
    parser.add_argument("--version", action="version", version=f"keras_mnv2 {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--json", action="store_true", help="machine-readable output")
        command.set_defaults(run=run)
        return command

    def add_weights(command: argparse.ArgumentParser, default: str | None = "imagenet") -> None:
        command.add_argument(
            "--weights",
            default=default,
            help="a published checkpoint by name, an hf:// address, a file of weights, a whole model as .keras, a run "
            "folder, or an exported file (.onnx, .tflite, .xml, .pt2, .pte or a SavedModel)",
        )
        command.add_argument(
            "--scale",
            choices=SCALES,
            help="what is done to pixels of 0..255 before the model sees them: 'none', or 'keras' for -1..1; by "
            "default what a Keras model asks for, and none for exported files",
        )
        command.add_argument("--alpha", type=float, help="width multiplier, for a file of weights (default 1.0)")

    predict = add("predict", _predict, "names what is on photographs, and draws where it is")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument(
        "--task",
        choices=tuple(TASKS),
        default="classification",
        help="what the model does: of 'detection' and 'segmentation' a picture of each image is drawn, with boxes or a "
        "mask in colours (default classification)",
    )
    predict.add_argument(
        "--top", type=int, help="how many classes, or detections, of each image (default 5 classes, all detections)"
    )
    predict.add_argument("--score", type=float, help=f"least score of a detection (default {SCORE})")
    predict.add_argument("--out", metavar="FOLDER", help=f"for the pictures (default {PICTURES})")
    predict.add_argument(
        "--labels",
        metavar="FILE",
        help="with the name of a class a line; by default what the model says, or ImageNet's",
    )
    add_weights(predict, default=None)

    evaluate = add("evaluate", _evaluate, "top-1 and top-5 accuracy on a folder of class folders")
    evaluate.add_argument("folder", metavar="FOLDER")
    evaluate.add_argument("--batch-size", type=int, default=32)
    add_weights(evaluate)

    export_ = add("export", _export, "writes a model as a file for another runtime, and checks it there")
    export_.add_argument(
        "model", metavar="MODEL", help="a .keras file, a run folder, or a published checkpoint by name"
    )
    export_.add_argument(
        "path", metavar="OUT", help="ends in .onnx, .tflite, .xml, .pt2, .pte or .mlpackage; a SavedModel is a folder"
    )
    export_.add_argument("--format", choices=FORMATS, help="by default that of OUT's suffix")
    export_.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of LiteRT, ONNX and Core ML (default float32)"
    )
    export_.add_argument(
        "--calibration", metavar="FOLDER", help=f"photographs for int8; {CALIBRATION_IMAGES} of them are used"
    )
    export_.add_argument("--io-dtype", choices=IO_DTYPES, default=IO_DTYPES[0], help="of LiteRT's int8 (default int8)")
    export_.add_argument("--opset", type=int, help="of ONNX, 13 to 23 (default the lowest that the model needs)")
    export_.add_argument("--layout", choices=LAYOUTS, help="of ONNX's input (default that of the model)")
    export_.add_argument("--no-fold", action="store_true", help="leaves the batch norms as they are")
    export_.add_argument("--labels", metavar="FILE", help="of the classes: 'imagenet', or a file with a class a line")
    export_.add_argument("--overwrite", action="store_true", help="replaces what is at OUT")

    weights = add("weights", _weights, "the table of published checkpoints")
    weights.add_argument("pattern", nargs="?", default="*", help="of the names, such as 'timm/*'")

    commands.add_parser("train", help="trains a recipe on a data set; `train --help` lists recipes and settings")

    profile = add("profile", _profile, "parameters, multiply-adds and memory of each row")
    profile.add_argument("--alpha", type=float, default=1.0)
    profile.add_argument("--size", type=int, default=224, help="pixels of each side (default 224)")
    return parser


def _train(words: Sequence[str], own_process: bool) -> int:
    """The training's own command, whose arguments its settings are."""
    try:
        command = training("__main__")
    except ModuleNotFoundError as error:
        print(f'error: train needs {error.name}: pip install "keras_mnv2[train]".', file=sys.stderr)
        return 2
    command.main(words, own_process)
    return 0


def _version() -> str:
    try:
        return metadata.version("keras_mnv2")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _predict(options: argparse.Namespace) -> None:
    if options.top is not None:
        check_whole("--top", options.top)
    for image in options.images:
        if not Path(image).is_file():
            raise FileNotFoundError(f"There is no image at {image!r}.")
    for name, tasks in (("score", ("detection",)), ("out", ("detection", "segmentation"))):
        if getattr(options, name) is not None and options.task not in tasks:
            raise ValueError(
                f"--{name} must be left out but for --task {' and '.join(tasks)}, got {getattr(options, name)!r}."
            )
    labels = None if options.labels is None else _lines(options.labels)
    predict = {"classification": _predict_classes, "detection": _predict_boxes, "segmentation": _predict_masks}
    try:
        predict[options.task](options, labels)
    except ValueError as error:
        raise ValueError(_in_options(str(error))) from error


def _predict_classes(options: argparse.Namespace, labels: Sequence[str] | None) -> None:
    options.weights = options.weights or "imagenet"
    network = _loaded(_classifier(options))
    data = evaluation_data(options.images, weights=network.preprocessing, normalize=False)
    scores = probabilities(np.concatenate([network.scores(x) for (x,) in _read_ahead(data)]))
    labels = network.labels if labels is None else labels
    found = dict(zip(options.images, _best(scores, options.top or TOP, labels), strict=True))
    if options.json:
        print(json.dumps({image: [dataclasses.asdict(row) for row in rows] for image, rows in found.items()}, indent=2))
        return
    for image, rows in found.items():
        table = [(str(i + 1), row.name, row.wnid, f"{100 * row.probability:.2f} %") for i, row in enumerate(rows)]
        # Only ImageNet's classes have an id.
        head = ("", "class", "WordNet id" if any(row.wnid for row in rows) else "", "probability")
        print(f"{image}\n{_table(head, table, right=(0, 3))}\n")


def _predict_boxes(options: argparse.Namespace, labels: Sequence[str] | None) -> None:
    score = SCORE if options.score is None else options.score
    check_number("--score", score, "a number from 0 to 1", lambda number: 0 <= number <= 1)
    if options.weights is None:
        raise ValueError("--weights must be a detector for --task detection, got none; no published one is known.")
    network: Detector = _loaded(_network(load_detector, options))
    labels = network.labels if labels is None else labels
    results = {}
    for image, path in _pictures(options).items():
        found = {name: values[: options.top] for name, values in network.detect(image, score).items()}
        _save(draw_detections(image, found, labels), path)
        rows = [
            {"index": int(label), "name": name_of(int(label), labels), "score": float(of), "box": box.tolist()}
            for label, of, box in zip(found["classes"], found["scores"], found["boxes"], strict=True)
        ]
        results[image] = {"picture": str(path), "detections": rows}
        if not options.json:
            table = [
                (str(i + 1), row["name"], f"{row['score']:.2f}", *(f"{edge:.1f}" for edge in row["box"]))
                for i, row in enumerate(rows)
            ]
            head = ("", "class", "score", "left", "top", "right", "bottom")
            told = _table(head, table, right=(0, *range(2, 7))) if rows else f"nothing of a score of {score:g} or more"
            print(f"{image} -> {path}\n{told}\n")
    if options.json:
        print(json.dumps(results, indent=2))


def _predict_masks(options: argparse.Namespace, labels: Sequence[str] | None) -> None:
    options.weights = options.weights or list_weights(task="segmentation")[0].name
    network: Segmenter = _loaded(_network(load_segmenter, options))
    labels = network.labels if labels is None else labels
    results = {}
    for image, path in _pictures(options).items():
        mask = network.segment(image)
        _save(draw_mask(image, mask, labels), path)
        counts = np.bincount(mask.ravel())
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)][: options.top]
        rows: list[dict[str, Any]] = [
            {"index": int(i), "name": name_of(int(i), labels), "share": float(counts[i] / mask.size)} for i in order
        ]
        results[image] = {"picture": str(path), "classes": rows}
        if not options.json:
            table = [(str(i + 1), row["name"], f"{100 * row['share']:.2f} %") for i, row in enumerate(rows)]
            print(f"{image} -> {path}\n{_table(('', 'class', 'pixels'), table, right=(0, 2))}\n")
    if options.json:
        print(json.dumps(results, indent=2))


def _pictures(options: argparse.Namespace) -> dict[str, Path]:
    """The file of each image's picture: its name and the task, and a number where another image has that name."""
    folder = Path(options.out or PICTURES)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, got the file {str(folder)!r}.")
    names: collections.Counter[str] = collections.Counter()
    paths = {}
    for image in dict.fromkeys(options.images):
        stem = Path(image).stem
        names[stem] += 1
        number = f"_{names[stem]}" if names[stem] > 1 else ""
        paths[image] = folder / f"{stem}_{options.task}{number}.png"
    return paths


def _save(picture: Image.Image, path: Path) -> None:
    """Writes a picture, in the place of an earlier one of that name."""
    with folder_beside(path) as scratch:
        (scratch / "result").mkdir()
        picture.save(scratch / "result" / path.name)
        move_results(scratch / "result", path, scratch, overwrite=True)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


@dataclasses.dataclass(frozen=True)
class _Guess:
    index: int
    name: str
    wnid: str
    probability: float


def _best(scores: np.ndarray, top: int, labels: Sequence[str] | None) -> list[list[_Guess]]:
    if labels is not None:
        if len(labels) != scores.shape[1]:
            raise ValueError(f"--labels must have {scores.shape[1]} names, one a line, got {len(labels)}.")
        names = [("", label) for label in labels]
    elif scores.shape[1] in IMAGENET:
        names = [("", "background"), *imagenet_labels()][-scores.shape[1] :]
    else:
        names = [("", f"class {i}") for i in range(scores.shape[1])]
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [_Guess(int(i), names[i][1], names[i][0], float(row[i])) for i in indices]
        for row, indices in zip(scores, order, strict=True)
    ]


def _evaluate(options: argparse.Namespace) -> None:
    # The folder first, then its names: their mistakes show before a download.
    data = evaluation_data(options.folder, batch_size=options.batch_size, normalize=False)
    network = _classifier(options)
    data.how = network.preprocessing
    left_out, classes, _ = network.match(data.class_names)
    network = _loaded(network)
    total, done = len(data.images), 0
    right1 = right5 = 0
    start = time.perf_counter()
    for x, labels in _read_ahead(data):
        best = np.argsort(-network.scores(x)[:, left_out:], axis=1, kind="stable")[:, :TOP]
        hits = best == classes[labels][:, None]
        right1, right5, done = right1 + hits[:, 0].sum(), right5 + hits.any(axis=1).sum(), done + len(x)
        speed = done / (time.perf_counter() - start)
        bar = ("=" * (BAR * done // total)).ljust(BAR)
        told = f"\r[{bar}] {done:>{len(str(total))}}/{total} images, {speed:7.1f} images/s"
        print(told, end="", file=sys.stderr, flush=True)
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


def _read_ahead(data: keras.utils.PyDataset) -> Iterator[tuple[np.ndarray, ...]]:
    """The batches in order; the next ones are read while the network has one."""
    with ThreadPoolExecutor(READERS) as readers:
        waiting = collections.deque(readers.submit(data.__getitem__, i) for i in range(min(READERS, len(data))))
        for i in range(len(data)):
            batch = waiting.popleft().result()
            if i + READERS < len(data):
                waiting.append(readers.submit(data.__getitem__, i + READERS))
            yield batch


def _classifier(options: argparse.Namespace) -> Classifier:
    """The classifier that the options name; one of the table is downloaded only when it is loaded."""
    return _network(load_classifier, options)


def _network(load: Callable[..., Any], options: argparse.Namespace) -> Any:
    """What a function of the library loads of the network that the options name."""
    # A download's progress bar must not come between what is printed for other programs.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = load(options.weights, alpha=options.alpha, scale=options.scale)
        except ValueError as error:
            raise ValueError(_in_options(str(error))) from error
    if found.channels not in (None, 3):
        raise ValueError(f"The model must take RGB images, got one that takes {found.input_shape}.")
    return found


def _in_options(told: str) -> str:
    """An error of the library in the words of the command line."""
    return re.sub(rf"\b(?<!--)({'|'.join(OPTIONS)})", lambda match: OPTIONS[match[0]], told)


def _loaded(network: Any) -> Any:
    with contextlib.redirect_stdout(sys.stderr):
        network.load()
    return network


def _export(options: argparse.Namespace) -> None:
    suffixes = {how.suffix: name for name, how in FORMATS.items()}
    path = Path(options.path)
    format = options.format or suffixes.get(path.suffix, suffixes[""])
    labels = options.labels
    if labels not in (None, "imagenet"):
        labels = _lines(labels)
    # A download's progress bar, and what the frameworks say, must not come between what is printed for programs.
    with contextlib.redirect_stdout(sys.stderr):
        model, how = _to_export(options.model)
        report = export(
            model,
            path,
            format,
            precision=options.precision,
            calibration=None if options.calibration is None else _calibration(options.calibration, model, how),
            io_dtype=options.io_dtype,
            opset=options.opset,
            layout=options.layout,
            fold=not options.no_fold,
            labels=labels,
            preprocessing=how if format in ("litert", "web") else None,
            overwrite=options.overwrite,
            verbose=False,
        )
    print(json.dumps({**dataclasses.asdict(report), "path": str(path)}, indent=2) if options.json else report)


def _to_export(name: str) -> tuple[keras.Model, Preprocessing | None]:
    """The whole model of a file or run folder, or the network of a checkpoint and how that takes photographs."""
    path = path_of_model(name)
    if path is None:
        return MobileNetV2(weights=name, include_preprocessing=True), preprocessing_of(name)
    if is_exported(path):
        raise ValueError(f"model must be a .keras file, a run folder or a published checkpoint, got {name!r}.")
    return load_model(path), None


def _calibration(folder: str, model: keras.Model, how: Preprocessing | None) -> np.ndarray:
    """Photographs from anywhere below a folder, evenly chosen, as the model takes them."""
    paths = images_below(folder) if Path(folder).is_dir() else []
    if not paths:
        raise ValueError(f"--calibration must be a folder of images ({', '.join(SUFFIXES)}), got {folder!r}.")
    count = min(len(paths), CALIBRATION_IMAGES)
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    how = how or Preprocessing.for_evaluation(model.input_shape[2] or SIDE)
    data = evaluation_data(chosen, weights=how, normalize=not scales_pixels(model))
    images = np.concatenate([x for (x,) in _read_ahead(data)])
    return np.moveaxis(images, -1, 1) if model.input_shape[-1] != 3 else images


def _weights(options: argparse.Namespace) -> None:
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
            "known" if c.sha256 else "unknown",
        )
        for c in found
    ]
    head = ("name", "alpha", "size", "classes", "top-1", "top-5", "licence", "SHA-256")
    print(_table(head, rows, right=range(1, 6)))
    print(f"\n{len(found)} checkpoints; accuracies in percent, as published.")


def _profile(options: argparse.Namespace) -> None:
    shape = (options.size, options.size, 3)
    profile = cost_profile(shape, alpha=options.alpha, print_fn=None if options.json else print)
    if not options.json:
        return
    totals: dict[str, Any] = {
        name: getattr(profile, name)
        for name in ("parameters", "statistics", "multiply_adds", "activations", "peak_memory")
    }
    print(json.dumps({**totals, "rows": [dataclasses.asdict(row) for row in profile.rows]}, indent=2))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    return "\n".join(line.rstrip() for line in in_columns([head, *rows], right, rule=True))
