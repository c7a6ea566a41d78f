"""`python -m training.evaluate MODEL`: accuracy, confusion and mistakes of a model on a data set.

MODEL is a `.keras` file, the folder of a training run, a file that `keras_mnv2.export` wrote (run in its own runtime),
or a published checkpoint: a name of `keras_mnv2.list_weights()`, an `hf://` address or a file of weights.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import files, process
from .process import fail
from .ranges import Batch, MaybePixels, MaybePositive, checked

SPLITS = ("test", "validation", "train", "all")
SCALES = ("none", "keras")
IMAGENET_CLASSES, WITH_BACKGROUND = 1000, 1001


def evaluate(
    model: str | os.PathLike,
    dataset: str | None = None,
    data_dir: str | os.PathLike | None = None,
    split: str = "test",
    image_size: int | None = None,
    resize: int | None = None,
    batch_size: int = 32,
    alpha: float | None = None,
    scale: str | None = None,
    out: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates a model on a split of a data set.

    Args:
        model: a `.keras` file, a run folder, an exported file, or a checkpoint's name, address or file, as in
            `keras_mnv2.load_classifier`.
        dataset: as in `data.sets.load`; by default that of the run folder.
        data_dir: as there.
        split: `"test"`, `"validation"`, `"train"`, as training divides the data set, or `"all"`, every image of one
            that has no such parts.
        image_size: side of the images in pixels; by default the model's own, needed where that takes any.
        resize: shorter side of a photograph before its centre is cut out; by default that of the checkpoint or run, or
            256 for each 224 pixels.
        batch_size: images a call.
        alpha: width multiplier, for a file of weights.
        scale: `"keras"` scales pixels to -1..1, `"none"` leaves 0..255, for models that scale them themselves. By
            default none for exported files; for Keras models whatever their `include_preprocessing` asks for.
        out: folder for `results.json`, `confusion.png`, `mistakes.png` (of the most confident; none where there are no
            mistakes), `scores.npy` (images, classes) and `labels.npy` (images,), in the order of the split.

    Returns:
        The results, as JSON takes them: `images`, `top1`, `top5`, `calibration_error` and `per_class` of
        `report.metrics`, `images_per_second` of reading and inference together, `waiting`, the share of that time
        spent waiting for images, `skipped`, the images that could not be read and why, and `mistakes`, the most
        confident with name, label, prediction and probability.

    Raises:
        ValueError: on an argument out of range, a model that cannot be loaded, or one of other classes than the data
            set's.
        ImportError: where a runtime or TFDS is needed and missing.
        ConnectionError: where a checkpoint cannot be downloaded.
    """
    split, scale = checked("split", Literal[SPLITS], split), checked("scale", Literal[None, *SCALES], scale)
    image_size, resize = checked("image_size", MaybePixels, image_size), checked("resize", MaybePixels, resize)
    batch_size, alpha = checked("batch_size", Batch, batch_size), checked("alpha", MaybePositive, alpha)
    # Here, so that --help does not wait for a backend.
    import keras_mnv2

    from .data import batches, sets
    from .report import evaluation, metrics
    from .report.versions import versions

    run = _settings(Path(model))
    dataset = dataset or run.get("dataset")
    if dataset is None:
        raise ValueError("dataset must be given, for a model that is no run folder.")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    network = keras_mnv2.load_classifier(model, image_size=image_size, alpha=alpha, scale=scale)
    size = image_size or network.size
    if size is None:
        raise ValueError(f"image_size must be given for {network.name!r}, which does not say which size it takes.")
    if resize is None and size == (run.get("evaluation_size") or run.get("image_size")):
        resize = run.get("resize")
    how = batches.centre_crop(size, run.get("weights") or network.name, resize)
    parts, names = sets.read(dataset, size, data_dir or run.get("data_dir"))
    if split == "all":
        if set(parts) != {"train"}:
            raise ValueError(f"split must be one of {', '.join(parts)} for {dataset!r}, which has these, got 'all'.")
        images = parts["train"]
    else:
        images = parts.get(split) or getattr(sets.complete(parts, names, run.get("held_out", True)), split)
    ordered = batches.ordered_batches(images, len(names), how, batch_size)

    # Not timed: the first call compiles.
    width = _first_scores(network, size, batch_size).shape[1]
    background = width == WITH_BACKGROUND and len(names) == IMAGENET_CLASSES
    if not background and width != len(names):
        raise ValueError(f"dataset must have the classes of the model, which has {width}, got {len(names)} classes.")
    start = time.perf_counter()
    try:
        scores, labels = batches.read_scores(network.scores, ordered)
    except ValueError as error:
        raise ValueError(str(error).replace("images must have", "dataset must have images of", 1)) from error
    seconds = time.perf_counter() - start
    scores = scores[:, 1:] if background else scores
    if not np.isfinite(scores).all():
        raise ValueError(f"model must give finite scores, got others for {(~np.isfinite(scores)).any(1).sum()} images.")
    results = {
        "model": network.name,
        "runtime": network.runtime,
        "dataset": dataset,
        "split": split,
        "image_size": size,
        "resize": how.resize,
        "batch_size": batch_size,
        **metrics.measures(scores, labels, names),
        "images_per_second": round(len(labels) / seconds, 2),
        "waiting": round(ordered.waited / seconds, 4),
        "skipped": ordered.unreadable,
        "mistakes": evaluation.mistakes(scores, labels, ordered, names),
        "versions": versions(),
    }
    if out is not None:
        folder = Path(out)
        for name, array in (("scores", scores), ("labels", labels)):
            with files.beside(folder / f"{name}.npy") as part:
                np.save(part, array)
        (folder / "mistakes.png").unlink(missing_ok=True)
        evaluation.draw(scores, labels, ordered, names, folder)
        files.write_json(folder / "results.json", results)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates what the command line names; an error of the caller's ends in one sentence."""
    options = vars(_parser().parse_args(argv))
    path = options.pop("json")
    try:
        results = evaluate(**options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, results)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    from .report.evaluation import text

    print(text(results))
    if skipped := results["skipped"]:
        print(f"\n{len(skipped)} images could not be read and were skipped:")
        print("\n".join(f"{name}: {why}" for name, why in sorted(skipped.items())))


def _parser():
    parser = argparse.ArgumentParser(
        prog=f"python -m {process.PACKAGE}.evaluate",
        description="Accuracy, confusion and mistakes of a model on a data set.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a .keras file, a run folder, an exported file (.onnx, .tflite, .xml, .pt2 or a SavedModel), a published "
        "checkpoint by name, an hf:// address or a file of weights",
    )
    parser.add_argument(
        "--dataset",
        help="'digits', a folder of class folders, a .npz file or a data set of TFDS; by default the run folder's",
    )
    parser.add_argument("--data-dir", type=Path, help="where TFDS keeps its data sets")
    parser.add_argument(
        "--split", choices=SPLITS, default=SPLITS[0], help="default test; all: every image of a folder without parts"
    )
    parser.add_argument("--image-size", type=int, help="side of the images in pixels; by default the model's")
    parser.add_argument(
        "--resize",
        type=int,
        help="shorter side of a photograph before its centre is cut out; by default that of the checkpoint or run, or "
        "256 for each 224 pixels",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images a call (default 32)")
    parser.add_argument("--alpha", type=float, help="width multiplier, for a file of weights (default 1.0)")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        help="what is done to pixels of 0..255 before the model sees them: 'none', or 'keras' for -1..1. By default "
        "none for exported files, whose model is thought to scale them itself; a Keras model tells whether it does",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for the results")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for results.json, confusion.png, mistakes.png, scores.npy and labels.npy",
    )
    return parser


def _settings(path):
    """The settings of a run folder, or of the one that a file lies in; empty elsewhere."""
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not all((folder / name).is_file() for name in ("model.keras", "config.json")):
        return {}
    return json.loads((folder / "config.json").read_text())


def _first_scores(network, size, batch_size):
    shape = (batch_size, size, size, network.channels or 3)
    try:
        return network.scores(np.zeros(shape, "float32"))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"model must take images of the shape {shape}: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    main()
