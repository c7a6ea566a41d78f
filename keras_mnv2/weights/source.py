"""From what a user names as `weights` to the arrays of one network."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keras_mnv2.annotations import PathLike
from keras_mnv2.weights.fetch import fetch
from keras_mnv2.weights.read import read_arrays
from keras_mnv2.weights.rename import (
    LAYOUTS,
    Array,
    Layout,
    detector_names,
    file_names,
    find_networks,
    head_names,
    later_blocks,
)
from keras_mnv2.weights.table import CHECKPOINTS, Checkpoint, SegmentationCheckpoint, find_checkpoint

HUB = "https://huggingface.co/"
# What says nothing of a network: the keys that training scripts have for it, and what PyTorch's wrappers add.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PLAIN = {*_WRAPPERS, "module", "_orig_mod"}
_AVERAGED = re.compile("(?<![a-z])(ema|swa)(?![a-z])|averag", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A file of weights that was read.

    Attributes:
        path: of the file.
        arrays: of the network, by its library's names.
        layout: of the names.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    layout: Layout


def checkpoint_of(weights: PathLike) -> Checkpoint | None:
    """The published checkpoint that `weights` names, or None where it is a path or another hf:// address.

    Raises:
        ValueError: where it is neither a known name, nor an existing file, nor an hf:// address.
    """
    text = os.fspath(weights) if isinstance(weights, str | os.PathLike) else weights
    if isinstance(text, str) and text.startswith("hf://"):
        found = [c for c in CHECKPOINTS if c.url.startswith(f"{HUB}{text.removeprefix('hf://')}/resolve/")]
        return found[0] if found else None
    return None if isinstance(text, str) and Path(text).is_file() else find_checkpoint(text)


def read_source(
    weights: PathLike | Checkpoint | SegmentationCheckpoint | Source, averaged: bool | None = None
) -> Source:
    """Fetches and reads a checkpoint: a record of the table, an hf:// address, a path, or one that was read.

    Where the file holds more than one network, a line says which is taken; another, where the network is a part of
    the file, says which part, and what is left.

    Args:
        weights: the checkpoint.
        averaged: whether the running average of the weights is taken, where a training script saved both; None for
            the average where there is one.

    Raises:
        ConnectionError: where it cannot be downloaded.
        ValueError: where the file cannot be read, has no such weights, or is of no known layout.
    """
    # Before the file is fetched.
    if not (averaged is None or isinstance(averaged, bool)):
        raise ValueError(f"averaged must be None, True or False, got {averaged!r}.")
    if isinstance(weights, Source):
        return weights
    if isinstance(weights, Checkpoint | SegmentationCheckpoint):
        path = fetch(weights.url, weights.file_name, weights.sha256)
    elif os.fspath(weights).startswith("hf://"):
        path = _fetch_from_hub(os.fspath(weights))
    else:
        path = Path(weights)
    arrays = read_arrays(path)
    networks = find_networks(arrays)
    if not networks:
        raise ValueError(
            f"The file {str(path)!r} holds no MobileNetV2 of a known layout ({', '.join(LAYOUTS)}); "
            f"its first arrays are {', '.join(sorted(arrays)[:3]) or 'none'}."
        )
    prefix = _choose(path, list(networks), arrays, averaged)
    layout = networks[prefix]
    taken = {key: key.removeprefix(prefix) for key in arrays if key.startswith(prefix)}
    if not layout.torch:
        own = _own(layout, taken.values())
        taken = {key: name for key, name in taken.items() if name in own}
    _check_numbers(path, arrays, taken)
    others = tuple(networks.keys() - {prefix})
    _tell(path, prefix, layout, {key: arrays[key] for key in arrays.keys() - taken if not key.startswith(others)})
    return Source(path, {name: arrays[key] for key, name in taken.items()}, layout)


def classes_of(source: Source) -> int:
    """The width of a file's classifier, or 0 where it has none."""
    key = file_names(source.layout, [], False, True, source.arrays)["predictions/bias"].key
    return source.arrays[key].size if key in source.arrays else 0


def segmentation_classes_of(source: Source) -> int:
    """The classes of a file's segmentation head, or 0 where it has none."""
    names = head_names(source.layout, source.arrays)
    return source.arrays[names["logits/bias"].key].size if names else 0


def detector_classes_of(source: Source, boxes_per_place: Sequence[int]) -> int:
    """The classes of a file's `SSDLite` without the background, or 0 where it is none.

    Args:
        source: the file.
        boxes_per_place: default boxes of each place of each map, by which the file's widths are divided.

    Raises:
        ValueError: where the file has another number of default boxes.
    """
    names = detector_names(source.layout, source.arrays)
    if not names:
        return 0
    width = 0
    for number, count in enumerate(boxes_per_place, 1):
        coded, logits = (source.arrays.get(names[f"{kind}_{number}/project/bias"].key) for kind in ("box", "class"))
        if coded is None or logits is None:
            continue  # Loading names what is missing.
        if coded.size != 4 * count or logits.size % count:
            raise ValueError(
                f"aspect_ratios and reduce_lowest must be those of the file {str(source.path)!r}, which has "
                f"{coded.size // 4} default boxes in each place of map {number}, got {count}."
            )
        width = logits.size // count
    return width - 1


def without(source: Source, names: Mapping[str, Array]) -> Source:
    """The file without arrays of these names, but for those of the stem."""
    left = {array.key for name, array in names.items() if not name.startswith("stem/")}
    return replace(source, arrays={key: value for key, value in source.arrays.items() if key not in left})


def check_channels(source: Source | Checkpoint, channels: int) -> None:
    """Raises `ValueError` unless images of so many channels are what the weights were trained on."""
    if isinstance(source, Checkpoint):
        name, wanted = source.name, 3
    else:
        key = file_names(source.layout, [], False, False, source.arrays)["stem/kernel"].key
        name, axis = str(source.path), 1 if source.layout.torch else 2
        # Loading names what is missing or of another shape.
        kernel = source.arrays.get(key)
        wanted = kernel.shape[axis] if kernel is not None and kernel.ndim == 4 else channels
    if channels != wanted:
        raise ValueError(f"input_shape must have {wanted} channels with the weights {name!r}, got {channels}.")


def _choose(path: Path, prefixes: Sequence[str], arrays: dict[str, np.ndarray], averaged: bool | None) -> str:
    """Which of the networks in a file is meant."""
    means = [prefix for prefix in prefixes if _is_averaged(prefix, arrays)]
    raw = [prefix for prefix in prefixes if prefix not in means]
    chosen = (means or raw) if averaged is None else means if averaged else raw
    if not chosen:
        kind = "the running average of the weights alone" if means else "no running average of the weights"
        raise ValueError(
            f"averaged must be None or {not averaged} with the file {str(path)!r}, which holds {kind}, got {averaged}."
        )
    # Of several a training script's usual key is the one that training scripts load.
    usual = [prefix for prefix in chosen if prefix.partition("/")[0] in _WRAPPERS]
    if len(chosen) > 1 and len(usual) != 1:
        raise ValueError(
            f"The file {str(path)!r} holds {len(chosen)} networks ({_quoted(chosen)}), and nothing says which is meant."
        )
    prefix = usual[0] if len(chosen) > 1 else chosen[0]
    if means and raw:
        ours, others = ("averaged", raw) if prefix in means else ("raw", means)
        print(
            f"{path.name}: the {ours} weights ({_quoted([prefix])}) are taken; averaged={prefix not in means} takes "
            f"the others ({_quoted(others)})."
        )
    elif len(chosen) > 1:
        print(f"{path.name}: of the networks {_quoted(chosen)} {_quoted([prefix])} is taken.")
    return prefix


def _is_averaged(prefix: str, arrays: dict[str, np.ndarray]) -> bool:
    """timm's scripts name it state_dict_ema, torchvision's model_ema; PyTorch's AveragedModel counts its models."""
    within = prefix.removesuffix("module.")
    return _AVERAGED.search(prefix) is not None or f"{within}n_averaged" in arrays


def _quoted(prefixes: Sequence[str]) -> str:
    return ", ".join(repr(prefix.rstrip("./")) for prefix in prefixes)


def _own(layout: Layout, keys: Collection[str]) -> set[str]:
    """Those of the keys whose layer is one of the network's own."""
    names = file_names(layout, later_blocks(layout, keys, 0), True, True, keys)
    names |= head_names(layout, keys) | detector_names(layout, keys)
    units = {_unit(array.key) for array in names.values()}
    return {key for key in keys if _unit(key) in units or re.match(layout.block, key)}


def _unit(key: str) -> str:
    return key.partition("/")[0]


def _tell(path: Path, prefix: str, layout: Layout, left: dict[str, np.ndarray]) -> None:
    """Says what is taken of a file that is more than a network, and what is left."""
    if layout.torch:
        # Beside the network, not what a training script keeps besides.
        scope = prefix[: prefix.rfind("/") + 1]
        left = {key.removeprefix(scope): value for key, value in left.items() if key.startswith(scope)}
        left = {key: value for key, value in left.items() if "/" not in key and key.endswith(".weight")}
    else:
        left = {key: value for key, value in left.items() if key.endswith("/kernel")}
    heads = []
    for key, value in left.items():
        width = value.shape[0 if layout.torch else 1] if value.ndim == 2 else None
        heads.append(re.sub(r"[./](weight|kernel)$", "", key) + (f" ({width} classes)" if width else ""))
    if heads or any(part not in _PLAIN and not _AVERAGED.search(part) for part in re.findall("[^./]+", prefix)):
        where = f"in {_quoted([prefix])} " if prefix else ""
        without = f", without {', '.join(heads[:3])}" + (f" and {len(heads) - 3} more" if len(heads) > 3 else "")
        print(f"{path.name}: the MobileNetV2 {where}is taken{without if heads else ''}.")


def _check_numbers(path: Path, arrays: dict[str, np.ndarray], taken: Collection[str]) -> None:
    """Refuses a file of quantised weights, whose numbers mean nothing without the layers around them."""
    told = f"The file {str(path)!r} holds a quantised model, which keras.models.load_model loads whole"
    for key, value in arrays.items():
        if re.search(r"(^|[/_])range/", key):
            raise ValueError(f"{told}: {key} is part of an 8-bit layer.")
        if key in taken and value.dtype.kind in "biu" and not key.endswith("num_batches_tracked"):
            raise ValueError(f"{told}: {key} has integers ({value.dtype}) where a network has weights.")


def _fetch_from_hub(address: str) -> Path:
    match = re.fullmatch(r"hf://([\w.-]+)/([\w.-]+)(?:/([\w./-]+))?", address)
    if match is None or ".." in address:
        raise ValueError(
            f"weights must have the form hf://OWNER/REPOSITORY or hf://OWNER/REPOSITORY/FILE, got {address!r}."
        )
    owner, repository, file = match[1], match[2], match[3] or "model.safetensors"
    name = "--".join([owner, repository, *file.split("/")])
    return fetch(f"{HUB}{owner}/{repository}/resolve/main/{file}", name)
