"""Models as files for other runtimes, from every backend, each checked in its own runtime."""

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mnv2.annotations import PathLike, Tensor
from keras_mnv2.checks import check_choice, check_flag, check_path, check_whole
from keras_mnv2.files import cleaned_up, folder_beside, move_results
from keras_mnv2.fold import fold_batch_norm
from keras_mnv2.formats import converters, graphs, web
from keras_mnv2.formats.comparison import ExportReport, compare, computes_in_16_bits, detects, size_of
from keras_mnv2.formats.graphs import (
    TRACED_SIDE,
    input_name,
    output_names,
    write_exported_program,
    write_saved_model,
)
from keras_mnv2.formats.images import check_page, finish_litert, preprocessing_of_model, takes_pixels
from keras_mnv2.formats.processes import run_python
from keras_mnv2.layers.detections import Detections
from keras_mnv2.preprocessing import imagenet_labels, scales_pixels
from keras_mnv2.quantize import is_quantized
from keras_mnv2.rewrite import copy_weights, layers_of
from keras_mnv2.stock import to_stock
from keras_mnv2.weights.table import Checkpoint, Preprocessing


@dataclass(frozen=True)
class _Format:
    """What a format is made by, and what it needs.

    Attributes:
        backend: the one whose graph it is made from.
        packages: what must be installed, as modules.
        suffix: what its path must end in; empty for a folder.
        extra: of this package, that brings what it needs.
    """

    backend: str
    packages: tuple[str, ...]
    suffix: str
    extra: str


FORMATS = {
    "tf_saved_model": _Format("tensorflow", ("tensorflow",), "", "tensorflow"),
    "onnx": _Format("torch", ("torch", "onnx", "onnxscript", "onnxruntime"), ".onnx", "onnx"),
    "litert": _Format("tensorflow", ("tensorflow", "ai_edge_litert"), ".tflite", "litert"),
    "openvino": _Format("tensorflow", ("tensorflow", "openvino"), ".xml", "openvino"),
    "torch": _Format("torch", ("torch",), ".pt2", "torch"),
    "web": _Format("torch", ("torch", "onnx", "onnxscript", "onnxruntime"), "", "onnx"),
    "executorch": _Format("torch", ("torch", "executorch"), ".pte", "executorch"),
    "coreml": _Format("torch", ("torch", "coremltools"), ".mlpackage", "coreml"),
    # Made by whatever backend is active, and read by any.
    "keras": _Format(keras.backend.backend(), (), ".keras", ""),
}
# For one image of a fixed size: their memory is planned when they are written.
FIXED = ("executorch", "coreml")
PRECISIONS = ("float32", "float16", "dynamic_int8", "int8")
# What a format has besides float32.
_PRECISIONS_OF = {"litert": PRECISIONS, "onnx": ("float32", "float16", "int8"), "coreml": PRECISIONS[:2]}
IO_DTYPES = ("int8", "uint8")
# Those that can hold the names of the classes.
LABELLED = ("tf_saved_model", "litert", "coreml", "web")
LAYOUTS = ("NHWC", "NCHW")
# Of ONNX: the first with a scale for each channel, and the newest that PyTorch and ONNX Runtime share.
OPSETS = (13, 23)


def export(
    model: keras.Model,
    path: PathLike,
    format: str = "tf_saved_model",
    *,
    precision: str = "float32",
    calibration: Tensor | None = None,
    io_dtype: str = "int8",
    opset: int | None = None,
    layout: str | None = None,
    fold: bool | None = None,
    labels: Sequence[str] | str | None = None,
    preprocessing: str | Checkpoint | Preprocessing | None = None,
    sample: Tensor | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> ExportReport:
    """Writes `model` as a file for another runtime, from any backend, and checks it there before it returns.

    SavedModel, LiteRT and OpenVINO are made through TensorFlow, the others through PyTorch. On another backend
    the model crosses over in a `.keras` file to a child process. The result is run in its own runtime, in a process
    without Keras, on `sample` whole and on one image; only then does it get its final name. Core ML's packages run on
    Apple's systems alone: of these the description is read back, and the report says that nothing was run.

    Args:
        model: a built model with one input, that `keras.models.load_model` can load.
        path: file or folder to write: it ends in `.onnx`, `.tflite`, `.xml` (OpenVINO, which writes a `.bin` beside
            it), `.pt2`, `.pte` (ExecuTorch), `.mlpackage` (Core ML, a folder) or `.keras`; a SavedModel and a page are
            folders.
        format: `"tf_saved_model"`, `"onnx"`, `"litert"`, `"openvino"` or `"torch"`, as in `keras.Model.export`;
            `"executorch"` or `"coreml"`, which take one image of a fixed size; `"web"`, a folder that is a page which
            names what is on photographs, from any static server; or `"keras"`, a model of Keras's own classes that
            `keras.models.load_model` reads without this package, on any backend, to predict or to train on.
        precision: `"float32"`; with `format="litert"` also `"float16"` (weights of 16 bits), `"dynamic_int8"` (weights
            of 8 bits) or `"int8"` (whole numbers alone). A model of `quantize_aware` has `"int8"` there. With
            `format="onnx"` also `"float16"` (computes in 16 bits) or `"int8"` (computes with whole numbers); its input
            and output stay float32. With `format="coreml"` also `"float16"`. A detector's boxes are decoded in float32
            in each precision.
        calibration: for `precision="int8"`, images `(n, *model.input_shape[1:])` as the model takes them: the ranges of
            its activations are those that these give. Some hundred are enough. A model of `quantize_aware` has ranges
            of its own.
        io_dtype: for LiteRT's `precision="int8"`, the type of input and output, `"int8"` or `"uint8"`.
        opset: for ONNX, 13 to 23; by default the lowest that the model needs, mostly 13, which old runtimes read too.
        layout: for ONNX, `"NHWC"` or `"NCHW"`: how the file takes its images; by default as the model does.
        fold: whether to fold the batch norms into the kernels (`fold_batch_norm`) first; by default for each format
            but `"keras"`.
        labels: for a SavedModel, LiteRT, Core ML and a page, the names of the classes, or `"imagenet"`: an asset, one
            name a line; the file of labels in LiteRT's metadata; or Core ML's classifier, which gives the best one's
            name as `classLabel`.
        preprocessing: for LiteRT and a page, how photographs are prepared for the model, as in `preprocess_input` and
            `resize_and_crop`: a page does it, LiteRT's metadata says it. Of a model that scales pixels itself, only
            how they are resized. By default Keras's way, at the model's size.
        sample: images to compare on, `(batch, *model.input_shape[1:])`; by default up to 64 of `calibration`, or four
            random ones.
        overwrite: whether a file or SavedModel that is at `path` may be replaced.
        verbose: whether to print the report.

    Returns:
        A report with the differences and the size.

    Raises:
        ValueError: on an unknown format, a path that exists or ends in another suffix, images of another shape, or a
            model that cannot be folded.
        ImportError: where a package is missing; it says what to install.
        RuntimeError: where a conversion fails, or the outputs differ by more than the precision accounts for (float32:
            1e-4 of the largest output); nothing is left under `path`.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
        >>> export(model, "mobilenet", verbose=False).largest_difference < 1e-4
        True
    """
    check_choice("format", format, tuple(FORMATS))
    path = check_path("path", path)
    overwrite, verbose = check_flag("overwrite", overwrite), check_flag("verbose", verbose)
    fold = None if fold is None else check_flag("fold", fold)
    quantized = _check(model, path, format, precision, calibration, io_dtype, overwrite)
    opset, layout = _check_onnx(model, format, opset, layout)
    if isinstance(model, keras.Sequential):
        # The same layers: a sequential model does not name its outputs.
        model = keras.Model(model.inputs, model.outputs, name=model.name)
    labels = _labels(model, format, labels)
    if preprocessing is not None and format not in ("litert", "web"):
        raise ValueError(f'preprocessing must be left out but for "litert" and "web", got it for {format!r}.')
    how = preprocessing_of_model(model, preprocessing)
    runtime = None
    if format == "web":
        check_page(model, how)
        _require(format)
        runtime = web.find_runtime()
    calibration = None if calibration is None else _images(model, "calibration", calibration)
    images = _sample(model, sample, calibration)
    _require(format)
    source = _folded(model) if (format != "keras" if fold is None else fold) else model
    if computes_in_16_bits(model) and format != "keras":
        source = _in_float32(source)

    with cleaned_up() as check_signal, folder_beside(path) as folder:
        # Files that name each other, as OpenVINO's do, need their final names.
        target = folder / "result" / path.name
        target.parent.mkdir()
        checked = target
        if runtime is not None:
            names = labels or [f"class {i}" for i in range(model.output_shape[-1])]
            web.write_page(target, runtime, model.inputs[0].shape, how, takes_pixels(model), names)
            checked = target / web.MODEL
        if format in converters.CONVERTERS or format == "web":
            options: dict[str, Any] = {"input_name": input_name(model), "output_names": output_names(source)}
            options |= {"precision": precision, "io_dtype": io_dtype, "quantized": quantized}
            options |= {"opset": opset, "layout": layout, "detects": detects(model)}
            if format == "coreml":
                options |= {"labels": labels, "pixels": _takes_image(model)}
            if calibration is not None:
                np.save(folder / "calibration.npy", calibration)
                options["calibration"] = str(folder / "calibration.npy")
            apart = _decoding(source) if format == "litert" and precision != "float32" else None
            _convert(source, folder, "onnx" if format == "web" else format, checked, json.dumps(options), apart)
            if format == "litert":
                finish_litert(model, target, precision, how, labels, calibration)
        elif format == "keras":
            to_stock(source).save(target)
        elif _is_active(format):
            _write(source, target, format, labels)
        else:
            _cross_over(source, folder, format, target, labels)
        if format == "coreml":
            report = ExportReport(path, format, precision, 0, None, None, None, size_of(target.parent))
        else:
            report = compare(model, checked, images, folder, path, format, precision, quantized, layout)
        check_signal()
        move_results(target.parent, path, folder, overwrite)
    if verbose:
        print(report)
    return report


def _check(
    model: keras.Model, path: Path, format: str, precision: str, calibration: Any, io_dtype: str, overwrite: bool
) -> bool:
    """Checks the arguments that go together, and says whether the model has ranges of its own."""
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(f"model must be a built Keras model, got {model!r}.")
    if len(model.inputs) != 1:
        raise ValueError(f"model must have one input, got {len(model.inputs)}.")
    check_choice("precision", precision, _PRECISIONS_OF.get(format, PRECISIONS[:1]))
    if format in FIXED and None in model.inputs[0].shape[1:]:
        raise ValueError(
            f"model must take images of a fixed size for format={format!r}, got {tuple(model.inputs[0].shape)}."
        )
    check_choice("io_dtype", io_dtype, IO_DTYPES)
    if io_dtype != IO_DTYPES[0] and format != "litert":
        raise ValueError(f'io_dtype must be left out but for format="litert", got {io_dtype!r} for {format!r}.')
    quantized = is_quantized(model)
    if quantized and precision == "float16":
        raise ValueError('precision must be "float32" or "int8" for a model of quantize_aware, got \'float16\'.')
    if quantized and format == "litert" and precision != "int8":
        raise ValueError(f'precision must be "int8" for a model of quantize_aware as LiteRT, got {precision!r}.')
    if precision == "int8" and not quantized and calibration is None:
        raise ValueError('calibration must be images for precision="int8", got None.')
    if calibration is not None and (precision != "int8" or quantized):
        raise ValueError('calibration must be left out but for precision="int8" of a model without ranges of its own.')
    suffix = FORMATS[format].suffix
    if suffix and path.suffix != suffix:
        raise ValueError(f"path must end in {suffix!r} for format={format!r}, got {str(path)!r}.")
    # OpenVINO's weights lie beside its graph.
    for file in (path, path.with_suffix(".bin")) if format == "openvino" else (path,):
        # A folder with other things in it is not replaced.
        inside = {"tf_saved_model": ("saved_model.pb",), "coreml": ("Manifest.json",), "web": web.FILES}.get(format)
        files = [file / name for name in inside] if inside else [file]
        if file.exists() and not (overwrite and all(each.is_file() for each in files)):
            kind = {"tf_saved_model": "a SavedModel", "coreml": "a package", "web": "a page"}.get(format, "a file")
            raise ValueError(f"path must be new, or {kind} with overwrite=True, got {str(file)!r}, which exists.")
    return quantized


def _check_onnx(
    model: keras.Model, format: str, opset: int | None, layout: str | None
) -> tuple[int | None, str | None]:
    """Checks what only ONNX has; the layout is None where it is the model's own."""
    for name, value in (("opset", opset), ("layout", layout)):
        if value is not None and format != "onnx":
            raise ValueError(f'{name} must be left out but for format="onnx", got {value!r} for {format!r}.')
    opset = None if opset is None else check_whole("opset", opset, OPSETS[0], OPSETS[1])
    check_choice("layout", layout, (None, *LAYOUTS))
    shape = model.inputs[0].shape
    if layout is not None and len(shape) != 4:
        raise ValueError(f"layout must be left out for a model that does not take images, got {layout!r}.")
    own = LAYOUTS[len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3)]
    return opset, None if layout == own else layout


def _labels(model: keras.Model, format: str, labels: Sequence[str] | str | None) -> list[str] | None:
    if labels is None:
        return None
    if format not in LABELLED:
        raise ValueError(f"labels must be left out but for {', '.join(LABELLED)}, got them for {format!r}.")
    classes = model.output_shape[-1] if isinstance(model.output_shape, tuple) else None
    names = labels if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
    if isinstance(labels, str) and labels == "imagenet":
        # TensorFlow's checkpoints have a class for the background first.
        names = (["background"] if classes == 1001 else []) + [name for _, name in imagenet_labels()]
        if format == "coreml":
            # There a name stands for one class: the two cranes and maillots get their WordNet id.
            ids = [""] * (classes == 1001) + [wnid for wnid, _ in imagenet_labels()]
            names = [n if names.count(n) == 1 else f"{n} ({i})" for n, i in zip(names, ids, strict=True)]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or len(names) != classes or any("\n" in name for name in names):
        what = f"{len(names)} of them" if texts else repr(labels)
        raise ValueError(f'labels must be "imagenet" or {classes} names of one line each, got {what}.')
    if format == "coreml" and len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f'labels must be names of one class each for format="coreml", got {twice!r} twice.')
    return list(names)


def _takes_image(model: keras.Model) -> bool:
    """Whether Core ML can hand an image to it: NHWC pixels of 0..255, in RGB or grey."""
    return scales_pixels(model) and model.inputs[0].shape[-1] in (1, 3)


def _program(model: keras.Model, format: str) -> dict[str, Any]:
    """How the program of PyTorch is written that a format is made from."""
    if format not in FIXED:
        return {}
    return {"batch": 1, "channels_first": format == "coreml" and _takes_image(model)}


def _images(model: keras.Model, name: str, given: Any) -> np.ndarray:
    """`given` as an array in the model's type, with a shape that it takes."""
    expected = model.inputs[0].shape[1:]
    images = np.asarray(given, model.inputs[0].dtype)
    fits = images.ndim == len(expected) + 1 and all(
        n in (None, m) for n, m in zip(expected, images.shape[1:], strict=True)
    )
    if not fits or not len(images):
        raise ValueError(f"{name} must have the shape (batch, *{tuple(expected)}), got {images.shape}.")
    return images


def _sample(model: keras.Model, sample: Any, calibration: np.ndarray | None) -> np.ndarray:
    if sample is None and calibration is not None:
        return calibration[:64]
    if sample is None:
        shape = [4, *(n or TRACED_SIDE for n in model.inputs[0].shape[1:])]
        sample = np.random.default_rng(0).uniform(*((0, 255) if scales_pixels(model) else (-1, 1)), shape)
    return _images(model, "sample", sample)


def missing_packages(format: str) -> list[str]:
    """What a format needs and is not installed, as modules."""
    return [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]


def _require(format: str) -> None:
    missing = missing_packages(format)
    if missing:
        raise ImportError(
            f'format="{format}" needs {" and ".join(missing)}, which is not installed: '
            f'pip install "keras_mnv2[{FORMATS[format].extra}]".'
        )


def _folded(model: keras.Model) -> keras.Model:
    try:
        return fold_batch_norm(model)
    except ValueError as error:
        raise ValueError(f"{error} With fold=False the model is exported as it is.") from error


def _in_float32(model: keras.Model) -> keras.Model:
    """A copy that computes in float32: most runtimes have no other convolutions on a CPU."""
    pairs = []

    def clone(layer: Any) -> Any:
        config = layer.get_config()
        if getattr(layer, "compute_dtype", "") in ("float16", "bfloat16"):
            config["dtype"] = "float32"
        pairs.append((layer, type(layer).from_config(config)))
        return pairs[-1][1]

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    for old, new in pairs:
        copy_weights(old, new)
    return copy


def _decoding(model: keras.Model) -> str | None:
    """The name of the layer that decodes a detector's boxes, which computes in float32 in each precision.

    Raises:
        ValueError: where it is inside another model.
    """
    if not detects(model):
        return None
    names = [layer.name for layer in model.layers if isinstance(layer, Detections)]
    if len(names) != 1:
        raise ValueError(
            'precision must be "float32" in LiteRT for a detector inside another model, got one inside '
            f"{model.name!r}; export the detector itself."
        )
    return names[0]


def _convert(
    model: keras.Model, folder: Path, format: str, target: Path, options: str, apart: str | None = None
) -> None:
    """Writes the model's graph and converts it: in two steps here, or both in a child with the right backend."""
    graph = folder / ("graph.pt2" if FORMATS[format].backend == "torch" else "graph")
    if not _is_active(format):
        _cross_over(model, folder, format, graph, None, target, options, apart=apart)
        return
    _write(model, graph, format, apart=apart)
    run_python(converters.__file__, format, graph, target, options)


def _write(
    model: keras.Model, path: Path, format: str, labels: list[str] | None = None, apart: str | None = None
) -> None:
    try:
        if FORMATS[format].backend == "torch":
            write_exported_program(model, path, **_program(model, format))
        else:
            write_saved_model(model, path, labels, apart)
    except Exception as error:
        # Both frameworks have errors of many kinds, and of many lines.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        raise RuntimeError(f"The export failed: {type(error).__name__}: {lines[0]}") from error


def _cross_over(
    model: keras.Model,
    folder: Path,
    format: str,
    graph: Path,
    labels: list[str] | None,
    *conversion: Any,
    apart: str | None = None,
) -> None:
    """Writes the model's graph, and converts it where `conversion` asks for it, in a child with the right backend."""
    backend = FORMATS[format].backend
    own = {type(layer) for layer in layers_of(model)}
    modules = {kind.__module__ for kind in own if kind.__module__.partition(".")[0] not in ("keras", "keras_mnv2")}
    if "__main__" in modules:
        names = ", ".join(sorted(kind.__name__ for kind in own if kind.__module__ == "__main__"))
        raise ValueError(
            f"model must have layers of modules that can be imported, since {format} is written by a process with "
            f"{backend}, got {names} of the script itself."
        )
    model.save(folder / "model.keras")
    about = json.dumps(
        {"labels": labels, "apart": apart, "program": _program(model, format), "modules": sorted(modules)}
    )
    run_python("-m", graphs.__name__, format, folder / "model.keras", graph, about, *conversion, backend=backend)


def _is_active(format: str) -> bool:
    """Whether this process can write the format's graph. A program of PyTorch keeps the device it was traced on."""
    backend = keras.backend.backend()
    return backend == FORMATS[format].backend and not (backend == "torch" and sys.modules["torch"].cuda.is_available())
