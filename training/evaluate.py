"""`python -m training.evaluate MODEL`: accuracy, confusion and mistakes of a model on a data set.

MODEL is a `.keras` file, the folder of a training run, a file that `keras_mnv2.export` wrote (run in its own runtime),
or a published checkpoint: a name of `keras_mnv2.list_weights()`, an `hf://` address or a file of weights.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from . import files, process
from .process import fail
from .ranges import Batch, MaybePixels, MaybePositive, checked
from .report import metrics

SPLITS = ("test", "validation", "train", "all")
SCALES = ("none", "keras")
EXPORTS = (".onnx", ".tflite", ".xml", ".pt2")
# Rows of the table of classes above which only the worst are printed.
MOST_ROWS, WORST_ROWS = 40, 10
# What `MobileNetV2(weights="imagenet")` loads.
KERAS_OWN = "keras/mobilenet_v2_1.0_224"
IMAGENET_CLASSES, WITH_BACKGROUND = 1000, 1001


@dataclass(frozen=True)
class Network:
    """A classifier, whatever runs it.

    Attributes:
        run: from images, float32 NHWC, as the network takes them, to scores (batch, classes).
        size: side of its images in pixels, or None where any is taken or it is not known.
        channels: of its images, or None where that is not known.
        scale: whether it takes -1..1, and not 0..255.
        runtime: what runs it.
        maps: from images, as `run` takes them, and classes to `report.activation_map.activation_maps`; None where what
            runs it gives its scores alone.
    """

    run: Callable[[np.ndarray], np.ndarray]
    size: int | None
    channels: int | None
    scale: bool
    runtime: str
    maps: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    def score(self, images: np.ndarray) -> np.ndarray:
        """Scores (batch, classes) of images NHWC with values 0..255."""
        scores = np.asarray(self.run(self.prepared(images)), "float32")
        if scores.ndim != 2:
            raise ValueError(f"model must be a classifier with scores (batch, classes), got {scores.shape}.")
        return scores

    def prepared(self, images: np.ndarray) -> np.ndarray:
        """Images NHWC with values 0..255 as the network takes them; grey ones are repeated for RGB networks."""
        if self.channels == 3 and images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        if self.channels not in (None, images.shape[-1]):
            raise ValueError(f"dataset must have images of {self.channels} channels, as the model takes them, "
                             f"got {images.shape[-1]}.")  # fmt: skip
        return images / np.float32(127.5) - 1 if self.scale else images


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
    command: str = "",
) -> dict[str, Any]:
    """Evaluates a model on a split of a data set.

    Args:
        model: a `.keras` file, a run folder, an exported file, or a checkpoint's name, address or file. A `.pt2` file
            must be the first to be evaluated in a process with TensorFlow, before Keras is imported.
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
        out: folder for the page `report.html`, `results.json`, `scores.npy` (images, classes) and `labels.npy`
            (images,), in the order of the split.
        command: what to run to repeat it, for the page.

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
    model = KERAS_OWN if model == "imagenet" else os.fspath(model)
    if model.endswith(".pt2") and Path(model).is_file():
        # What PyTorch loads for it crashes the process when TensorFlow is there first.
        _readable(model, lambda: _input_shape(Path(model)))
    # Here, so that --help does not wait for a backend, and after PyTorch.
    from .data import batches, sets
    from .report import mistakes, page
    from .run import train

    run = _settings(Path(model))
    dataset = dataset or run.get("dataset")
    if dataset is None:
        raise ValueError("dataset must be given, for a model that is no run folder.")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    network = _load(model, image_size, batch_size, alpha, scale)
    size = image_size or network.size
    if size is None:
        raise ValueError(f"image_size must be given for {model!r}, which does not say which size it takes.")
    if network.size not in (None, size):
        raise ValueError(f"image_size must be {network.size}, as the model {model!r} takes it, got {size}.")
    own = run.get("evaluation_size") or run.get("image_size")
    how = batches.centre_crop(size, run.get("weights") or model, resize or (run.get("resize") if size == own else None))
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
    scores, labels = batches.read_scores(network.score, ordered)
    seconds = time.perf_counter() - start
    scores = scores[:, 1:] if background else scores
    if not np.isfinite(scores).all():
        raise ValueError(f"model must give finite scores, got others for {(~np.isfinite(scores)).any(1).sum()} images.")
    worst = mistakes.worst(scores, labels, ordered, names)
    settings = {
        "model": model,
        "runtime": network.runtime,
        "dataset": dataset,
        "split": split,
        "image_size": size,
        "resize": how.resize,
        "batch_size": batch_size,
    }
    results = {
        **settings,
        **metrics.measures(scores, labels, names),
        "images_per_second": round(len(labels) / seconds, 2),
        "waiting": round(ordered.waited / seconds, 4),
        "skipped": ordered.unreadable,
        "mistakes": [
            {"image": one.name, "label": one.label, "prediction": one.prediction, "probability": one.probability}
            for one in worst
        ],
        "versions": train.versions(),
    }
    if out is not None:
        folder = Path(out)
        for name, array in (("scores", scores), ("labels", labels)):
            with files.beside(folder / f"{name}.npy") as part:
                np.save(part, array)
        train.write_json(folder / "results.json", results)
        worst, no_maps = _explained(worst, network, 1 if background else 0)
        report = page.Report(
            title=f"{Path(model).name} on {Path(dataset).name}",
            subtitle=f"{model}, run by {network.runtime}, on {len(labels):,} {split} images of {dataset}.",
            results=_rows(results),
            matrix=metrics.confusion_matrix(scores, labels),
            class_names=names,
            mistakes=worst,
            unreadable=ordered.unreadable,
            command=command,
            settings=settings,
            versions=results["versions"],
            no_maps=no_maps,
        )
        page.write(folder / "report.html", report)
    return results


def _explained(worst, network, first):
    """The mistakes with their activation maps, and why they have none; the network's classes begin with `first`."""
    from .report.mistakes import explained

    if network.maps is None:
        return worst, f"{network.runtime} gives the scores alone."
    try:
        return explained(worst, lambda images, classes: network.maps(network.prepared(images), classes + first)), ""
    except ValueError as error:
        return worst, str(error)


def _rows(results):
    return [
        ("accuracy", f"{results['top1']:.2%} of {results['images']:,} images"),
        *([("accuracy, top 5", f"{results['top5']:.2%}")] if len(results["per_class"]) > 5 else []),
        ("expected calibration error", f"{results['calibration_error']:.4f}"),
        ("images a second, reading included", f"{results['images_per_second']:,.1f}"),
        ("waiting for images", f"{results['waiting']:.0%} of the time"),
    ]


def text(results: dict[str, Any]) -> str:
    """The results as people read them; of many classes the least accurate ones."""
    rows = results["per_class"]
    shown = rows
    head = ""
    if len(rows) > MOST_ROWS:
        shown = sorted((row for row in rows if row["images"]), key=lambda row: row["accuracy"])[:WORST_ROWS]
        head = f"The {len(shown)} least accurate of {len(rows)} classes:\n\n"
    cells = [[row["name"], row["images"], _percent(row["accuracy"]), _percent(row["precision"])] for row in shown]
    lines = [
        f"{results['model']} ({results['runtime']}) on {results['images']:,} {results['split']} images of "
        f"{results['dataset']}, {results['image_size']} pixels a side",
        f"top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}, expected calibration error "
        f"{results['calibration_error']:.4f}",
        f"{results['images_per_second']:,.1f} images/s, reading included; {results['waiting']:.0%} of the time was "
        "waiting for images",
        f"{head}{metrics.table(['class', 'images', 'accuracy', 'precision'], cells)}",
    ]
    return "\n\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates what the command line names; an error of the caller's ends in one sentence."""
    options = vars(_parser().parse_args(argv))
    path = options.pop("json")
    try:
        words = sys.argv[1:] if argv is None else argv
        results = evaluate(**options, command=f"python -m {process.PACKAGE}.evaluate {shlex.join(words)}")
        if path is not None:
            from .run.train import write_json

            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, results)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
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
        help="folder for report.html, results.json, scores.npy and labels.npy",
    )
    return parser


def _settings(path):
    """The settings of a run folder, or of the one that a file lies in; empty elsewhere."""
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not all((folder / name).is_file() for name in ("model.keras", "config.json")):
        return {}
    return json.loads((folder / "config.json").read_text())


def _load(model, image_size, batch_size, alpha, scale):
    """Chooses by the name what `model` is, and loads it."""
    path = Path(model)
    if (path / "model.keras").is_file():
        path = path / "model.keras"
    exported = path.suffix in EXPORTS or (path / "saved_model.pb").is_file()
    if path.is_dir() and not exported:
        raise ValueError(f"model must be a run folder with model.keras or a SavedModel, got the folder {model!r}.")
    if (exported or path.suffix == ".keras") and not path.exists():
        raise FileNotFoundError(f"There is no model at {model!r}.")
    if alpha is not None and (exported or path.suffix == ".keras"):
        raise ValueError(f"alpha must be left out with a whole model, which has its own, got {alpha}.")
    if exported:
        return _exported(path, scale == "keras")
    import keras

    import keras_mnv2

    if path.suffix == ".keras":
        loaded = _readable(path, lambda: keras.models.load_model(path, compile=False, safe_mode=True))
    else:
        known = {checkpoint.name: checkpoint for checkpoint in keras_mnv2.list_weights()}.get(model)
        if known is not None and not known.classes:
            raise ValueError(f"model must have a classifier, which {model!r} has not.")
        shape = None if image_size is None else (image_size, image_size, 3)
        loaded = keras_mnv2.MobileNetV2(shape, alpha, weights=model, include_preprocessing=True)
        if known is None:
            # Without a classifier of its own the file would be evaluated with a random one: this refuses it.
            keras_mnv2.load_weights(loaded, model)
    if not isinstance(loaded.input_shape, tuple):
        raise ValueError(f"model must take images alone, got one with {len(loaded.input_shape)} inputs.")
    size, channels, channels_first = _layout(loaded.input_shape)

    def run(images):
        # One shape for all batches, the smaller ones too: each new shape would be compiled.
        missing = max(0, batch_size - len(images))
        padded = np.concatenate([images, np.repeat(images[:1], missing, axis=0)])
        return loaded.predict_on_batch(np.moveaxis(padded, -1, 1) if channels_first else padded)[: len(images)]

    def maps(images, classes):
        from .report.activation_map import activation_maps

        return activation_maps(loaded, np.moveaxis(images, -1, 1) if channels_first else images, classes)

    scales = any(layer.name == "preprocess" for layer in loaded.layers)
    runtime = f"Keras on {keras.backend.backend()}"
    return Network(run, size, channels, not scales if scale is None else scale == "keras", runtime, maps)


def _exported(path, scale):
    import keras_mnv2

    load_export = _readable(path, lambda: keras_mnv2.load_export(path))
    size, channels, channels_first = _layout(_readable(path, lambda: _input_shape(path)))

    def run(images):
        outputs = load_export(np.moveaxis(images, -1, 1) if channels_first else images)
        if len(outputs) != 1:
            raise ValueError(f"model must have one output, got {', '.join(sorted(outputs))}.")
        return next(iter(outputs.values()))

    return Network(run, size, channels, scale, path.suffix[1:] or "SavedModel")


def _input_shape(path):
    """The shape of an exported model's input; what is free is None."""
    if path.suffix == ".onnx":
        import onnxruntime

        (image,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()
        shape = image.shape
    elif path.suffix == ".tflite":
        from ai_edge_litert.interpreter import Interpreter

        (image,) = Interpreter(model_path=str(path)).get_input_details()
        shape = [int(n) for n in image["shape_signature"]]
    elif path.suffix == ".xml":
        (data,) = ElementTree.parse(path).findall("layers/layer[@type='Parameter']/data")
        shape = [int(n) if n.isdigit() else None for n in data.attrib["shape"].split(",")]
    elif path.suffix == ".pt2":
        import torch

        program = torch.export.load(path)
        (name,) = program.graph_signature.user_inputs
        (shape,) = (node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    else:
        from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

        graphs = SavedModel.FromString((path / "saved_model.pb").read_bytes()).meta_graphs
        (image,) = graphs[0].signature_def["serving_default"].inputs.values()
        shape = [dim.size for dim in image.tensor_shape.dim]
    return tuple(n if isinstance(n, int) and n > 0 else None for n in shape)


def _layout(shape):
    """(side, channels, whether they come first) of a batch of images' shape."""
    if len(shape) != 4:
        raise ValueError(f"model must take images (batch, height, width, channels), got {shape}.")
    channels_first = shape[1] in (1, 3) and shape[3] not in (1, 3)
    height, width, channels = (shape[2], shape[3], shape[1]) if channels_first else shape[1:]
    if None not in (height, width) and height != width:
        raise ValueError(f"model must take square images, got one for {height} x {width} pixels.")
    return height or width, channels, channels_first


def _readable(path, load):
    try:
        return load()
    except ImportError:
        raise
    # Each runtime raises errors of its own.
    except Exception as error:
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"The model {os.fspath(path)!r} cannot be loaded: {told[0]}") from error


def _first_scores(network, size, batch_size):
    shape = (batch_size, size, size, network.channels or 3)
    try:
        return network.score(np.zeros(shape, "float32"))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"model must take images of the shape {shape}: {str(error).splitlines()[0]}") from error


def _percent(share):
    return None if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()
