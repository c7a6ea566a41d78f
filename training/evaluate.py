"""`python -m training.evaluate MODEL`: how good a model is on a data set, and where it is wrong."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from . import files, process
from .config import MEASURES
from .process import fail
from .ranges import Batch, MaybePixels, MaybePositive, check_all, parsed


@dataclass(frozen=True)
class Options:
    """How good a model is on a data set, and where it is wrong."""

    model: str
    """A .keras file, a run folder, an exported file (.onnx, .tflite, .xml, .pt2, .pte or a SavedModel), a published
    checkpoint by name, an hf:// address or a file of weights."""
    dataset: str | None = None
    """'digits', a folder of class folders, a .npz file or a data set of TFDS; for segmentation and detection 'scenes'
    or a folder, as for their training; by default the run folder's."""
    task: Literal[None, "classification", "segmentation", "detection"] = None
    """What the model gives; by default that of the run in whose folder it lies, or else classification."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets."""
    split: Literal["test", "validation", "train", "all"] = "test"
    """As training divides the data set; all: every image of a folder without parts."""
    image_size: MaybePixels = None
    """Side of the images in pixels; by default the model's own, needed where that takes any. Of segmentation and
    detection the side of the scenes alone: photographs are looked at whole."""
    resize: MaybePixels = None
    """Shorter side of a photograph before its centre is cut out; by default that of the checkpoint or run, or 256 for
    each 224 pixels."""
    batch_size: Batch = 32
    """Images a call, of a classifier."""
    alpha: MaybePositive = None
    """Width multiplier, for a file of weights."""
    scale: Literal[None, "none", "keras"] = None
    """What is done to pixels of 0..255 before the model sees them: nothing, or 'keras' for -1..1. By default nothing
    for exported files, whose model is thought to scale them itself; a Keras model tells whether it does."""
    json: Path | None = None
    """File for the results."""
    out: Path | None = None
    """Folder for the page report.html and results.json, and of a classifier scores.npy (images, classes) and
    labels.npy (images,), in the order of the split."""

    def __post_init__(self):
        check_all(self)


def evaluate(options: Options, command: str = "") -> dict[str, Any]:
    """Evaluates a model on a split of a data set.

    Args:
        options: what to evaluate.
        command: what to run to repeat it, for the page.

    Returns:
        The results, as JSON takes them: `images`, `top1`, `top5`, `calibration_error` and `per_class` of
        `report.metrics`, `images_per_second` of reading and inference together, `waiting`, the fraction of that time
        spent waiting for images, `skipped`, the images that could not be read and why, and `mistakes`, the most
        confident with name, label, prediction and probability. Of segmentation and detection those of
        `evaluate_photographs.evaluate`.

    Raises:
        ValueError: on an argument out of range, a model that cannot be loaded, or one of other classes than the data
            set's.
        ImportError: where a runtime or TFDS is needed and missing.
        ConnectionError: where a checkpoint cannot be downloaded.
    """
    task = options.task or _task_of_run(options.model)
    # Here, so that --help does not wait for a backend.
    if task != "classification":
        from . import evaluate_photographs

        return evaluate_photographs.evaluate(task, options, command)
    import keras

    import keras_mnv2

    from .data import batches, sets
    from .report import evaluation, metrics, mistakes, page
    from .report.versions import versions

    network = keras_mnv2.load_classifier(
        options.model, image_size=options.image_size, alpha=options.alpha, scale=options.scale
    )
    run = network.settings
    dataset, split, out = options.dataset or run.get("dataset"), options.split, options.out
    if dataset is None:
        raise ValueError("dataset must be given, for a model that is no run folder.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    size = options.image_size or network.size
    if size is None:
        raise ValueError(f"image_size must be given for {network.name!r}, which does not say which size it takes.")
    how = network.preprocessing.at(size, options.resize)
    parts, names = sets.read(dataset, size, options.data_dir or run.get("data_dir"))
    if split == "all":
        if set(parts) != {"train"}:
            raise ValueError(f"split must be one of {', '.join(parts)} for {dataset!r}, which has these, got 'all'.")
        images = parts["train"]
    else:
        images = parts.get(split) or getattr(sets.complete(parts, names, run.get("held_out", True)), split)
    ordered = batches.ordered_batches(images, len(names), how, options.batch_size)

    # Not timed: the first call compiles.
    _first_scores(network, size, options.batch_size)
    left_out, columns, names = network.match(names)
    bar = keras.utils.Progbar(-(-len(images) // options.batch_size))

    def shown(x):
        found = network.scores(x)
        bar.add(1)
        return found

    start = time.perf_counter()
    try:
        scores, labels = batches.read_scores(shown, ordered)
    except ValueError as error:
        raise ValueError(str(error).replace("images must have", "dataset must have images of", 1)) from error
    seconds = time.perf_counter() - start
    scores, labels = scores[:, left_out:], columns[labels]
    if not np.isfinite(scores).all():
        raise ValueError(f"model must give finite scores, got others for {(~np.isfinite(scores)).any(1).sum()} images.")
    worst = mistakes.worst(scores, labels, ordered, names)
    settings = {
        "model": network.name,
        "runtime": network.runtime,
        "dataset": dataset,
        "split": split,
        "image_size": size,
        "resize": how.resize,
        "batch_size": options.batch_size,
    }
    results = {
        **settings,
        **metrics.measures(scores, labels, names),
        "images_per_second": round(len(labels) / seconds, 2),
        "waiting": round(ordered.waited / seconds, 4),
        "skipped": ordered.unreadable,
        "mistakes": [mistake.facts() for mistake in worst],
        "versions": versions(),
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(options.json, results)
    if out is not None:
        for name, array in (("scores", scores), ("labels", labels)):
            with files.beside(out / f"{name}.npy") as part:
                np.save(part, array)
        files.write_json(out / "results.json", results)
        worst, no_maps = evaluation.explained(worst, network, left_out)
        report = page.Report(
            title=f"{Path(network.name).name} on {Path(dataset).name}",
            subtitle=f"{network.name}, run by {network.runtime}, on {len(labels):,} {split} images of {dataset}.",
            results=evaluation.rows(results),
            matrix=metrics.confusion_matrix(scores, labels),
            class_names=names,
            mistakes=worst,
            unreadable=ordered.unreadable,
            command=command,
            settings=settings,
            versions=results["versions"],
            no_maps=no_maps,
        )
        page.write(out / "report.html", report)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates what the command line names; an error of the caller's ends in one sentence."""
    options = parsed(
        Options, args=argv, prog=f"python -m {process.PACKAGE}.evaluate", config=(tyro.conf.PositionalRequiredArgs,)
    )
    try:
        words = sys.argv[1:] if argv is None else argv
        results = evaluate(options, f"python -m {process.PACKAGE}.evaluate {shlex.join(words)}")
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    if "task" in results:
        from .evaluate_photographs import text
    else:
        from .report.evaluation import text
    print(text(results))
    if skipped := results["skipped"]:
        print(f"\n{len(skipped)} images could not be read and were skipped:")
        print("\n".join(f"{name}: {why}" for name, why in sorted(skipped.items())))


def _task_of_run(model: str) -> str:
    """The task of the run in whose folder a model lies, or classification."""
    path = Path(model)
    try:
        folder = path if path.is_dir() and (path / "config.json").exists() else path.parent
        task = json.loads((folder / "config.json").read_text("utf-8"))["task"] if path.exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return "classification"
    return task if task in MEASURES else "classification"


def _first_scores(network, size, batch_size):
    shape = (batch_size, size, size, network.channels or 3)
    try:
        network.scores(np.zeros(shape, "float32"))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"model must take images of the shape {shape}: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    main()
