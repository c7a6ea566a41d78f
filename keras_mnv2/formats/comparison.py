"""An exported file in its own runtime beside the model that it comes from."""

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from keras_mnv2.annotations import Tensor
from keras_mnv2.formats import runtimes
from keras_mnv2.formats.graphs import named
from keras_mnv2.formats.processes import run_python
from keras_mnv2.layers.detections import Detections
from keras_mnv2.rewrite import layers_of
from keras_mnv2.tasks.boxes import overlaps

# The largest difference of an output, as a share of the largest output or of 1. A right export shows about 1e-6 in
# float32, and where weights are rounded to 16 bits up to 0.03 in untrained networks; a wrong one about 1.
LARGEST_DIFFERENCE = {"float32": 1e-4, "float16": 1e-1}
# What makes a pixel of a box, a hundredth of a score and a class comparable.
_SCALES = {"boxes": 1.0, "scores": 100.0, "classes": 1000.0}
# For integers the mean error, as a share of the outputs' mean deviation from their mean: trained networks show some
# hundredths, untrained ones up to 0.7, and outputs that say nothing 1 or more.
LARGEST_MEAN_ERROR = 0.8
# What two detections that are the same have in common.
LEAST_OVERLAP = 0.5
# Share of the detections, by score, that only the model or only the file has.
LARGEST_DISAGREEMENT = {"float16": 0.1, "dynamic_int8": 0.5, "int8": 0.5}


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and how near it is to the model.

    Attributes:
        path: of the file or folder.
        format: as asked for.
        precision: as asked for.
        images: how many were compared; 0 where the format cannot be run here, as Core ML.
        largest_difference: of any number of any output, absolute; None where nothing was run.
        mean_absolute_error: over all numbers of all outputs; None where nothing was run.
        top1_agreement: share of the images whose largest score is of the same class; None unless the model has one
            output (batch, classes).
        size: of the file or folder, in bytes.
        detections_agreement: of a detector, how far the file finds what the model finds: the share of all detections of
            both, weighed by their scores, that have one of the same class in the other with an intersection over union
            of at least 0.5. In other precisions than float32 the differences are those of these pairs; None unless the
            model is a detector.
        reference_difference: for LiteRT's 8-bit integers, `largest_difference` with LiteRT's reference kernels, which
            microcontrollers compute bit for bit; its XNNPACK kernels give `largest_difference`. On up to 8 images.
    """

    path: Path
    format: str
    precision: str
    images: int
    largest_difference: float | None
    mean_absolute_error: float | None
    top1_agreement: float | None
    size: int
    reference_difference: float | None = None
    detections_agreement: float | None = None

    def __str__(self) -> str:
        if self.largest_difference is None:
            return f"{self.path}: {self.size / 1e6:.2f} MB, converted, not run: only Apple's systems run Core ML"
        words = [
            f"{self.path}: {self.size / 1e6:.2f} MB, on {self.images} images largest difference "
            f"{self.largest_difference:.2g}, mean absolute error {self.mean_absolute_error:.2g}"
        ]
        if self.top1_agreement is not None:
            words.append(f"top-1 agreement {self.top1_agreement:.2%}")
        if self.detections_agreement is not None:
            words.append(f"agreement of the detections {self.detections_agreement:.2%}")
        if self.reference_difference is not None:
            words.append(f"with LiteRT's reference kernels largest difference {self.reference_difference:.2g}")
        return ", ".join(words)


def compare(
    model: keras.Model,
    target: Path,
    images: np.ndarray,
    folder: Path,
    path: Path,
    format: str,
    precision: str,
    quantized: bool,
    layout: str | None,
) -> ExportReport:
    """Runs the file in its own runtime, at two batch sizes, and reports how its outputs differ."""
    batches = [images, images[:1] if len(images) > 1 else np.repeat(images, 2, axis=0)]
    # A file of another layout than the model takes the same images in its own.
    moved = {None: lambda x: x, "NCHW": lambda x: np.moveaxis(x, -1, 1), "NHWC": lambda x: np.moveaxis(x, 1, -1)}
    np.savez(folder / "images.npz", *map(moved[layout], batches))
    arguments = (runtimes.__file__, target, folder / "images.npz", folder / "outputs.npz")
    also = ("--reference",) if (format, precision) == ("litert", "int8") else ()
    run_python(*arguments, *also, backend=keras.backend.backend() if format == "keras" else "tensorflow")
    expected = runtimes.outputs_of(lambda x: _numpy(named(model, model.predict(x, verbose=0))), batches)
    with np.load(folder / "outputs.npz") as file:
        found = dict(file)
    first = {name: y[: runtimes.REFERENCE_IMAGES] for name, y in _of_batch(expected, "0").items()}
    reference = {name: found.pop(name) for name in list(found) if name.startswith(runtimes.REFERENCE)}
    if len(model.outputs) == 1:
        # A single tensor of PyTorch has no name.
        found = dict(zip(sorted(expected), (found[name] for name in sorted(found)), strict=True))
    if {name: y.shape for name, y in found.items()} != {name: y.shape for name, y in expected.items()}:
        raise RuntimeError(f"The export has the outputs {_shapes(found)}, the model {_shapes(expected)}.")
    agreement = of_detections = None
    exact = precision == "float32" and not quantized and not computes_in_16_bits(model)
    if detects(model):
        both = [_pairs(*(_of_batch(of, number) for of in (expected, found))) for number in ("0", "1")]
        of_detections = min(share for *_, share in both)
        if exact:
            found = _in_order(expected, found)
        else:
            expected = {f"{i}/{key}": y for i, (mine, _, _) in enumerate(both) for key, y in mine.items()}
            found = {f"{i}/{key}": y for i, (_, others, _) in enumerate(both) for key, y in others.items()}
    errors = {name: np.abs(expected[name].astype("float64") - found[name]) for name in expected}
    largest = max(float(error.max(initial=0)) for error in errors.values())
    mean = float(np.concatenate([np.zeros(1), *(error.ravel() for error in errors.values())]).mean())
    if len(model.outputs) == 1 and (scores := next(iter(expected.values()))).ndim == 2 and scores.shape[1] > 1:
        (name,) = (name for name in expected if name.startswith("0/"))
        agreement = float((expected[name].argmax(1) == found[name].argmax(1)).mean())
    # A last bit more or less rounds some numbers of a quantised model to another level.
    if of_detections is not None and not exact:
        limit = LARGEST_DISAGREEMENT["float16" if precision == "float32" and not quantized else precision]
        what, value = "its disagreement of the detections", 1 - of_detections
    elif precision in LARGEST_DIFFERENCE and not quantized:
        scale = max(1.0, *(float(np.abs(y).max()) for y in expected.values()))
        # A model of 16 bits leaves in float32.
        limit = scale * LARGEST_DIFFERENCE["float16" if computes_in_16_bits(model) else precision]
        what, value = "its largest difference", largest
    else:
        limit = LARGEST_MEAN_ERROR * min(float(np.abs(y - y.mean()).mean()) for y in expected.values())
        what, value = "its mean absolute error", mean
    if not value <= limit:
        raise RuntimeError(
            f"The export to {str(path)!r} differs from the model: {what} is {value:.2g}, the most that {precision} "
            f"may show {limit:.2g}; nothing was written."
        )
    other = None
    if reference and of_detections is not None:
        mine, others, _ = _pairs(first, _of_batch(reference, runtimes.REFERENCE.rstrip("/")))
        other = max(float(np.abs(mine[key] - others[key]).max(initial=0)) for key in mine)
    elif reference:
        # In the order of the names, as above.
        pairs = list(
            zip((first[name] for name in sorted(first)), (reference[n] for n in sorted(reference)), strict=True)
        )
        other = max(float(np.abs(y.astype("float64") - z).max()) for y, z in pairs)
    return ExportReport(
        path, format, precision, len(images), largest, mean, agreement, size_of(target.parent), other, of_detections
    )


def _of_batch(outputs: dict[str, np.ndarray], number: str) -> dict[str, np.ndarray]:
    return {name.partition("/")[2]: y for name, y in outputs.items() if name.partition("/")[0] == number}


def _pairs(
    expected: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """The detections of a batch that two have in common, of the one and of the other, and their share by score.

    The best ones choose first. Two belong together where they have one class, and the intersection over union is at
    least `LEAST_OVERLAP`.
    """
    lists: list[dict[str, list[np.ndarray]]] = [{"boxes": [], "scores": []} for _ in range(2)]
    for i in range(len(expected["scores"])):
        mine, others = ({key: y[i][of["classes"][i] >= 0] for key, y in of.items()} for of in (expected, found))
        over = overlaps(mine["boxes"], others["boxes"])
        over[mine["classes"][:, None] != others["classes"][None]] = 0
        for row in range(len(over)):
            if over.shape[1] and over[row].max() >= LEAST_OVERLAP:
                column = int(over[row].argmax())
                over[:, column] = 0
                for kept, of, place in zip(lists, (mine, others), (row, column), strict=True):
                    for key, values in kept.items():
                        values.append(of[key][place].astype("float64"))
    shapes = {"boxes": (-1, 4), "scores": (-1,)}
    first, second = ({key: np.reshape(values, shapes[key]) for key, values in kept.items()} for kept in lists)
    whole = sum(float(of["scores"][of["classes"] >= 0].sum(dtype="float64")) for of in (expected, found))
    share = (first["scores"].sum() + second["scores"].sum()) / whole if whole else 1.0
    return first, second, float(share)


def detects(model: keras.Model) -> bool:
    """Whether the model's outputs are lists of detections."""
    return any(isinstance(layer, Detections) for layer in layers_of(model))


def _in_order(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a file found, each detection in the place of the expected one that is nearest to it.

    Scores that are equal but for rounding may stand in another order.
    """
    ordered = dict(found)
    for number in {name.partition("/")[0] for name in expected}:
        names = {f"{number}/{key}": scale for key, scale in _SCALES.items()}
        rows = [
            np.concatenate([scale * np.atleast_3d(of[name].astype("float64")) for name, scale in names.items()], axis=2)
            for of in (expected, found)
        ]
        for name in names:
            ordered[name] = found[name].copy()
        for i, (mine, others) in enumerate(zip(*rows, strict=True)):
            nearest = [int(np.abs(others - row).max(axis=1).argmin()) for row in mine]
            for name in names:
                ordered[name][i] = found[name][i][nearest]
    return ordered


def computes_in_16_bits(model: keras.Model) -> bool:
    return any(getattr(layer, "compute_dtype", "") in ("float16", "bfloat16") for layer in layers_of(model))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _numpy(outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: keras.ops.convert_to_numpy(y) for name, y in outputs.items()}


def _shapes(outputs: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name.partition('/')[2]} {y.shape}" for name, y in outputs.items() if name.startswith("0/"))
