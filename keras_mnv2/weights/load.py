"""Weights from a checkpoint into a model, and back into a library's layout."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from safetensors.numpy import save_file

from keras_mnv2.annotations import PathLike
from keras_mnv2.arguments import check_model
from keras_mnv2.checks import check_choice, check_flag, check_path
from keras_mnv2.files import folder_beside
from keras_mnv2.layers import ConvNormActivation, InvertedResidual
from keras_mnv2.weights.rename import (
    LAYOUTS,
    Block,
    detector_names,
    file_names,
    from_keras,
    head_names,
    later_blocks,
    to_keras,
)
from keras_mnv2.weights.source import Source, checkpoint_of, read_source

# The layouts that `save_weights` writes.
WRITTEN = ("torchvision", "timm", "transformers", "sequential", "keras")
KEEP = "skip_classifier=True keeps the model's own"
# Of a classifier, of a segmentation network and of a detector.
_CLASSIFIER = tuple(
    f"{layer}/{variable}"
    for layer in ("predictions", "logits", *(f"class_{number}/project" for number in range(1, 7)))
    for variable in ("kernel", "bias")
)
# The convolutions of a detector without a batch norm.
_DETECTOR_BIASES = {f"{kind}_{number}/project/bias" for kind in ("box", "class") for number in range(1, 7)}
# The layers of stem and head in a model of one layer each operation.
_ENDS = {
    "Conv1": "stem",
    "bn_Conv1": "stem/norm",
    "Conv1_norm": "stem/norm",
    "Conv_1": "head",
    "Conv_1_bn": "head/norm",
    "Conv_1_norm": "head/norm",
}


def load_weights(
    model: keras.Model, weights: PathLike, skip_classifier: bool = False, averaged: bool | None = None
) -> None:
    """Loads a checkpoint of any library into a model that `MobileNetV2` made.

    Every array of the file is used once and every variable filled once, in equal shapes, or nothing is
    loaded at all. Only what the model has no place for behind its last layer may be left: the classifier
    without the top, and the later blocks where `features` ends before them; a line says so. Padding and
    epsilon are the model's own: `MobileNetV2(weights=...)` sets them as the checkpoint needs.

    Args:
        model: of `MobileNetV2`, before `fold_batch_norm`.
        weights: name of a published checkpoint (`list_weights`), `hf://OWNER/REPOSITORY[/FILE]`, or the path
            of a file in one of the layouts of `save_weights`: `.safetensors`, `.h5`, `.weights.h5`, `.keras`,
            `.pth`, `.pt` or `.bin`. PyTorch's files are read without PyTorch, and nothing in them is run. The file
            may hold more than the network: a transfer model around it, or what a training script saved besides.
        skip_classifier: keeps the model's own classifier, for another number of classes.
        averaged: whether the running average of the weights is taken, where a training script saved both (timm's
            `state_dict_ema`, torchvision's `model_ema`). None, the default, takes the average where there is one, as
            timm's `load_checkpoint` and torchvision's evaluation do, and says so; False takes the others.

    Raises:
        ValueError: where the file cannot be read or does not fit; the message names what differs. The model
            keeps the weights that it had.
        ConnectionError: where a checkpoint cannot be downloaded.

    Examples:
        >>> model = MobileNetV2((32, 32, 3), alpha=0.35, weights=None)
        >>> save_weights(model, "mobilenet.safetensors", layout="torchvision")
        >>> load_weights(model, "mobilenet.safetensors")
    """
    check_model("model", model)
    skip_classifier = check_flag("skip_classifier", skip_classifier)
    checkpoint = checkpoint_of(weights)
    load_source(model, read_source(checkpoint or weights, averaged), skip_classifier)


def load_source(model: keras.Model, source: Source, skip_classifier: bool = False) -> None:
    """`load_weights` from a file that was read already."""
    variables = model_variables(model)
    if variables is None or not _known(variables):
        if source.layout.name != "keras_mnv2":
            raise ValueError(
                f"The model must have the layers of MobileNetV2 with its normalisations, as it is made with norm_layer="
                f'"batch_norm" and before fold_batch_norm, to take the {source.layout.name} layout of '
                f"{str(source.path)!r}."
            )
        _load_as_keras_does(model, source.path)
        return
    blocks = _blocks(model)
    later = [] if "head/kernel" in variables else later_blocks(source.layout, source.arrays, len(blocks))
    names = file_names(source.layout, [*blocks, *later], True, True, source.arrays)
    told = f"The file {str(source.path)!r} ({source.layout.name} layout) does not fit the model"
    names |= head_names(source.layout, source.arrays) | detector_names(source.layout, source.arrays)
    if strange := sorted(variables.keys() - names.keys()):
        raise ValueError(f"{told}: it has no {_some(strange)}.")

    wanted = {name: names[name] for name in variables if not (skip_classifier and name in _CLASSIFIER)}
    unknown = sorted(source.arrays.keys() - {array.key for array in names.values()})
    missing = sorted(a.key for a in wanted.values() if a.key not in source.arrays)
    if missing:
        no_top = set(missing) <= {names[name].key for name in _CLASSIFIER if name in names}
        hint = f" (it has no classifier; {KEEP})" if no_top else ""
        raise ValueError(f"{told}: it lacks {_some(missing)}{hint}.")
    if unknown:
        raise ValueError(f"{told}: the model has no place for {_some(unknown)}.")

    values = {}
    for name, array in wanted.items():
        found = to_keras(source.arrays[array.key], array.role, source.layout)
        shape = tuple(variables[name].shape)
        if found.shape != shape:
            hint = f"; {KEEP}" if name in _CLASSIFIER else ""
            raise ValueError(
                f"{told}: {array.key} gives {name} the shape {found.shape}, the model's is {shape}; alpha, "
                f"classes and the other arguments must be those of the checkpoint{hint}."
            )
        if not np.isfinite(found).all():
            raise ValueError(f"{told}: {array.key} holds values that are not finite.")
        values[name] = found
    # Every known array but the counters that has no variable: the classifier, and what follows a model's last block.
    unused = [array.key for name, array in names.items() if name not in wanted and array.role != "counter"]
    statistics = [
        array.key
        for name, array in names.items()
        if name not in variables and name.replace("moving_mean", "gamma") in variables and array.key in source.arrays
    ]
    if statistics:
        raise ValueError(
            f"{told}: it is of a network with batch norms, such as {statistics[0]}, the model's are others."
        )
    left = sorted(key for key in unused if key in source.arrays)
    for name, value in values.items():
        variables[name].assign(value)
    if skip_classifier:
        print(f"{source.path.name}: the classifier is left out, the model's own stays as it was initialised.")
    elif left:
        print(f"{source.path.name}: loaded without {_some(left)}, which the model has no place for.")


def save_weights(model: keras.Model, path: PathLike, layout: str = "keras") -> None:
    """Writes the weights of a model that `MobileNetV2` made in the layout of another library.

    Its own model takes the file: `torchvision.models.mobilenet_v2().load_state_dict(torch.load(path))`,
    `timm.create_model(name, checkpoint_path=path)`, the `state_dict` of transformers'
    `MobileNetV2ForImageClassification`, `keras.applications.MobileNetV2(weights=path)`. Padding and epsilon
    are that library's: a model trained with others computes other numbers there.

    Args:
        model: of `MobileNetV2`, before `fold_batch_norm`.
        path: of the file, which is replaced if it is there: `.safetensors`, or `.pth`, `.pt` and `.bin`, which need
            PyTorch, for the layouts of PyTorch; `.h5` for `"keras"`.
        layout: `"torchvision"`, `"timm"`, `"transformers"`, `"sequential"` (the PyTorch port with one flat
            Sequential a block) or `"keras"`.

    Raises:
        ValueError: on an unknown layout, a suffix that does not fit, or a model of other layers.
        ImportError: where PyTorch is needed and not installed.

    Examples:
        >>> save_weights(MobileNetV2((32, 32, 3), alpha=0.35, weights=None), "weights.h5", layout="keras")
    """
    check_model("model", model)
    check_choice("layout", layout, WRITTEN)
    path = check_path("path", path)
    suffixes = (".safetensors", ".pth", ".pt", ".bin") if LAYOUTS[layout].torch else (".h5",)
    if path.suffix not in suffixes or path.name.endswith(".weights.h5"):
        raise ValueError(f"path must end in {', '.join(suffixes)} for layout={layout!r}, got {str(path)!r}.")
    variables = model_variables(model)
    if variables is None or not _known(variables):
        raise ValueError(
            'model must be one that MobileNetV2 made with norm_layer="batch_norm" or "group_norm", before '
            f"fold_batch_norm, got {model.name!r}."
        )
    names = file_names(LAYOUTS[layout], _blocks(model), "head/kernel" in variables, _CLASSIFIER[0] in variables)
    if "logits/kernel" in variables:
        names |= head_names(LAYOUTS[layout])
    if left := sorted(variables.keys() - names.keys()):
        raise ValueError(f"layout must have a place for all weights of the model, got {layout!r}: no {_some(left)}.")
    arrays = {}
    for name, array in names.items():
        if array.role == "counter" and name.replace("/counter", "/moving_mean") in variables:
            arrays[array.key] = np.zeros((), "int64")
        elif name in variables:
            value = keras.ops.convert_to_numpy(variables[name])
            arrays[array.key] = from_keras(value, array.role, LAYOUTS[layout])
    _write(path, arrays)


def model_variables(model: keras.Model) -> dict[str, Any] | None:
    """The variables by their names in `file_names`, or None where a layer of the model is not one of MobileNetV2's."""
    variables: dict[str, Any] = {}
    for layer in model.layers:
        if isinstance(layer, InvertedResidual):
            for part, conv in layer.convolutions().items():
                variables |= _conv_variables(f"{layer.name}/{part}", conv)
        elif isinstance(layer, ConvNormActivation):
            variables |= _conv_variables(layer.name, layer)
        else:
            name = _own_name(layer.name)
            variables |= {f"{name}/{v.name}": v for v in layer.weights}
    return variables if len(variables) == len(model.weights) and "stem/kernel" in variables else None


def _conv_variables(name: str, conv: ConvNormActivation) -> dict[str, Any]:
    variables = {f"{name}/{v.name}": v for v in (conv.kernel, conv.bias) if v is not None}
    if conv.norm is not None:
        variables |= {f"{name}/norm/{v.name}": v for v in conv.norm.weights}
    return variables


def _own_name(layer_name: str) -> str:
    """This package's name of a layer of one operation, such as `block_1/expand/norm` of `block_1_expand_BN`."""
    if layer_name in _ENDS:
        return _ENDS[layer_name]
    if (match := re.fullmatch(r"(image_pooling|aspp\d|projection)_BN", layer_name)) is not None:
        return f"{match[1]}/norm"
    match = re.fullmatch(
        r"(expanded_conv|block_\d+|extra_\d|box_\d|class_\d)_(expand|reduce|depthwise|project)(_BN|_norm)?", layer_name
    )
    if match is None:
        return layer_name
    block = "block_0" if match[1] == "expanded_conv" else match[1]
    return f"{block}/{match[2]}" + ("/norm" if match[3] else "")


def _blocks(model: keras.Model) -> list[Block]:
    """Blocks with their stages: the first of a stage is the one that adds no input."""
    names = {layer.name for layer in model.layers}
    found: dict[str, tuple[bool, bool]] = {}
    for layer in model.layers:
        if isinstance(layer, InvertedResidual):
            found[layer.name] = (layer.residual, layer.expand is not None)
        elif match := re.fullmatch(r"(expanded_conv|block_\d+)_depthwise", layer.name):
            found[match[1]] = (f"{match[1]}_add" in names, f"{match[1]}_expand" in names)
    blocks: list[Block] = []
    for residual, expanded in found.values():
        again = blocks and residual
        stage = blocks[-1].stage + (not again) if blocks else 0
        blocks.append(Block(stage, blocks[-1].position + 1 if again else 0, expanded))
    return blocks


def _known(variables: Mapping[str, Any]) -> bool:
    """Whether these are the variables of a network with batch norms, or with group norms, in each place."""
    kernels = [name.removesuffix("/kernel") for name in variables if name.endswith("/kernel")]
    tops = {name for name in kernels if name in ("predictions", "logits") or f"{name}/bias" in _DETECTOR_BIASES}
    top = {f"{name}/bias" for name in tops}
    top |= {f"{name}/kernel" for name in kernels}
    for own in (("gamma", "beta", "moving_mean", "moving_variance"), ("gamma", "beta")):
        norms = {f"{name}/norm/{v}" for name in kernels if name not in tops for v in own}
        if top | norms == set(variables):
            return True
    return False


def _unit(name: str) -> str:
    return name.partition("/")[0]


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _load_as_keras_does(model: keras.Model, path: Path) -> None:
    before = model.get_weights()
    try:
        model.load_weights(path)
    except Exception as error:
        model.set_weights(before)
        raise ValueError(f"The file {str(path)!r} does not fit the model: {str(error).splitlines()[0]}") from error


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes beside, and moves into place."""
    writers: dict[str, Callable] = {".safetensors": _write_safetensors, ".h5": _write_h5}
    with folder_beside(path) as scratch:
        part = scratch / path.name
        writers.get(path.suffix, _write_torch)(part, arrays)
        os.replace(part, path)


def _write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # transformers refuses files that do not say which framework's axes they have.
    save_file(arrays, path, metadata={"format": "pt"})


def _write_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"Writing {path.suffix} needs PyTorch (pip install torch); a .safetensors file does not."
        ) from None
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}, path)


def _write_h5(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """The HDF5 form of Keras 2, which `keras.applications` reads: layers in order, each with its weights."""
    layers: dict[str, list[str]] = {}
    for name in arrays:
        layers.setdefault(_unit(name), []).append(name)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", keras.__version__.encode()
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{name}:0".encode() for name in names]
            for name in names:
                group[f"{name}:0"] = arrays[name]
