"""The names of a checkpoint's arrays in each library's layout, and how its axes lie."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from keras_mnv2.weights.table import HALF, IMAGENET_MEAN, IMAGENET_STD


class Block(NamedTuple):
    """Where an inverted residual stands, and whether it expands its input.

    Attributes:
        stage: of the paper's table, from 0.
        position: within its stage, from 0.
        expanded: False where the expansion is 1, so that there is no first 1x1 convolution.
    """

    stage: int
    position: int
    expanded: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The convolutions in order, by their names in `InvertedResidual`."""
        return ("expand", "depthwise", "project") if self.expanded else ("depthwise", "project")


class Array(NamedTuple):
    """An array of a file.

    Attributes:
        key: its name in the file.
        role: `"conv"`, `"depthwise"`, `"dense"`, `"vector"`, or `"counter"`, PyTorch's count of batches, which
            no computation reads.
    """

    key: str
    role: str


@dataclass(frozen=True)
class Layout:
    """How a library names the arrays of its MobileNetV2, and what its models compute besides.

    Attributes:
        name: what `save_weights` takes.
        mark: pattern of a key that only files of this layout have.
        torch: whether it is PyTorch's: `weight`, `running_mean`, and axes OIHW.
        conv: the prefixes of a convolution and of its batch norm; takes the number of the block, or None
            for stem (-1 of the blocks) and head, see `names`.
        block: pattern of a key of a block, whose groups are the block's numbers.
        classifier: prefixes that the classifier may have; the first is written.
        padding: of the library's own models.
        norm_epsilon: of the library's own models.
        norm_momentum: likewise, in Keras's convention.
        mean: that the library's checkpoints expect, of pixels of 0..1.
        std: likewise.
        prefixes: what may stand before every name but the classifier's; the first is written.
    """

    name: str
    mark: str
    torch: bool
    conv: Callable[[str, Sequence[Block], int, int], tuple[str, str]]
    block: str
    classifier: tuple[str, ...]
    padding: str
    norm_epsilon: float
    norm_momentum: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    prefixes: tuple[str, ...] = ("",)


def _torchvision(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    if kind != "block":
        base = f"features.{0 if kind == 'stem' else len(blocks) + 1}"
        return f"{base}.0", f"{base}.1"
    base = f"features.{number + 1}.conv.{part}"
    if part + 1 < len(blocks[number].parts):
        return f"{base}.0", f"{base}.1"
    return base, f"features.{number + 1}.conv.{part + 1}"


def _sequential(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    if kind != "block":
        return _torchvision(kind, blocks, number, part)
    # A convolution, its batch norm and its activation follow each other.
    return f"features.{number + 1}.conv.{3 * part}", f"features.{number + 1}.conv.{3 * part + 1}"


def _timm(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    if kind != "block":
        return ("conv_stem", "bn1") if kind == "stem" else ("conv_head", "bn2")
    block = blocks[number]
    base = f"blocks.{block.stage}.{block.position}"
    convs = ("conv_pw", "conv_dw", "conv_pwl") if block.expanded else ("conv_dw", "conv_pw")
    return f"{base}.{convs[part]}", f"{base}.bn{part + 1}"


def _transformers(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    if kind == "block":
        base = f"layer.{number - 1}" if number else "conv_stem"
        inner = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}[blocks[number].parts[part]]
        base = f"{base}.{inner}"
    else:
        base = "conv_stem.first_conv" if kind == "stem" else "conv_1x1"
    return f"{base}.convolution", f"{base}.normalization"


def _keras(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    if kind != "block":
        return ("Conv1", "bn_Conv1") if kind == "stem" else ("Conv_1", "Conv_1_bn")
    base = f"{f'block_{number}' if number else 'expanded_conv'}_{blocks[number].parts[part]}"
    return base, f"{base}_BN"


def _keras_2018(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    if kind != "block":
        return _keras(kind, blocks, number, part)
    inner = blocks[number].parts[part]
    return f"mobl{number}_conv_{number}_{inner}", f"bn{number}_conv_{number}_bn_{inner}"


def _own(kind: str, blocks: Sequence[Block], number: int, part: int) -> tuple[str, str]:
    base = f"block_{number}/{blocks[number].parts[part]}" if kind == "block" else kind
    return base, f"{base}/norm"


# What their own models compute besides: padding, epsilon, momentum, mean and std.
_PYTORCH = ("symmetric", 1e-5, 0.9, IMAGENET_MEAN, IMAGENET_STD)
_KERAS = ("same", 1e-3, 0.999, HALF, HALF)

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "torchvision",
            r"features\.1\.conv\.0\.0\.weight",
            True,
            _torchvision,
            r"features\.(\d+)\.conv\.",
            ("classifier.1",),
            *_PYTORCH,
        ),
        # The PyTorch port of tonylins, which many later projects copied: each block is one flat Sequential.
        Layout(
            "sequential",
            r"features\.1\.conv\.0\.weight",
            True,
            _sequential,
            r"features\.(\d+)\.conv\.",
            ("classifier", "classifier.1"),
            *_PYTORCH,
        ),
        Layout(
            "timm",
            r"blocks\.0\.0\.conv_dw\.weight",
            True,
            _timm,
            r"blocks\.(\d+)\.(\d+)\.",
            ("classifier",),
            *_PYTORCH,
        ),
        Layout(
            "transformers",
            r"(mobilenet_v2\.)?conv_stem\.first_conv\.convolution\.weight",
            True,
            _transformers,
            r"(?:mobilenet_v2\.)?layer\.(\d+)\.",
            ("classifier",),
            "same",
            1e-3,
            # Its code has PyTorch's momentum=0.997 (transformers 5.23): the authors' fraction of the old statistics as
            # that of the new ones, so that one step replaces them. Here it is what the authors meant.
            0.997,
            HALF,
            HALF,
            ("mobilenet_v2.", ""),
        ),
        # The names of the first port to Keras, which published files still have.
        Layout(
            "keras_2018",
            r"mobl0_conv_0_depthwise/kernel",
            False,
            _keras_2018,
            r"mobl(\d+)_conv_",
            ("Logits", "predictions"),
            *_KERAS,
        ),
        Layout(
            "keras",
            r"Conv1/kernel",
            False,
            _keras,
            r"block_(\d+)_",
            ("predictions", "Logits"),
            *_KERAS,
        ),
        Layout(
            "keras_mnv2",
            r"stem/kernel",
            False,
            _own,
            r"block_(\d+)/",
            ("predictions",),
            "same",
            1e-3,
            0.9,
            HALF,
            HALF,
        ),
    )
}

# From a file's axes to Keras's: OIHW to HWIO, C1HW to HWC1, (out, in) to (in, out).
_AXES = {"conv": (2, 3, 1, 0), "depthwise": (2, 3, 0, 1), "dense": (1, 0)}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def find_networks(keys: Collection[str]) -> dict[str, Layout]:
    """The MobileNetV2s in a file with these keys: the layout of each by what stands before its names.

    That is empty in most files. Otherwise it names the dictionary, module or model around the network, such as
    `state_dict/module.` in a training script's file or `mobilenetv2_1.00_224/` in a transfer model's.
    """
    found: dict[str, Layout] = {}
    for layout in LAYOUTS.values():
        for key in keys:
            if match := re.fullmatch(rf"(?P<prefix>|.*?[./])(?:{layout.mark})", key):
                found.setdefault(match["prefix"], layout)
    return found


def file_names(
    layout: Layout, blocks: Sequence[Block], head: bool, top: bool, keys: Collection[str] = ()
) -> dict[str, Array]:
    """The arrays of a network in a library's layout.

    Args:
        layout: of `LAYOUTS`.
        blocks: of the network, in order.
        head: whether the last 1x1 convolution is part of it.
        top: whether the classifier is.
        keys: of the file to be read, which decide where a layout has more than one name for a thing.

    Returns:
        The array of each variable by the variable's name in this package, such as `block_1/expand/kernel` or
        `stem/norm/gamma`. Counters have the name of their batch norm and `/counter`.
    """
    prefix = next((p for p in layout.prefixes if any(key.startswith(p) for key in keys)), layout.prefixes[0])
    units = [("stem", "stem", 0, 0, "conv")]
    for number, block in enumerate(blocks):
        for part, inner in enumerate(block.parts):
            role = "depthwise" if inner == "depthwise" else "conv"
            units.append((f"block_{number}/{inner}", "block", number, part, role))
    if head:
        units.append(("head", "head", 0, 0, "conv"))

    separator = "." if layout.torch else "/"
    names = {}
    for name, kind, number, part, role in units:
        conv, norm = (prefix + base for base in layout.conv(kind, blocks, number, part))
        # What is no batch norm is called so where this package's model was saved as Keras does.
        norm = f"{conv}_norm" if f"{conv}_norm/gamma" in keys else norm
        conv, norm = conv + separator, norm + separator
        names[f"{name}/kernel"] = Array(conv + ("weight" if layout.torch else "kernel"), role)
        for ours, theirs in _NORM.items():
            names[f"{name}/norm/{ours}"] = Array(norm + (theirs if layout.torch else ours), "vector")
        if layout.torch:
            names[f"{name}/norm/counter"] = Array(norm + "num_batches_tracked", "counter")
    if top:
        base = next((c for c in layout.classifier if any(_belongs(key, c) for key in keys)), layout.classifier[0])
        names["predictions/kernel"] = Array(base + separator + ("weight" if layout.torch else "kernel"), "dense")
        names["predictions/bias"] = Array(base + separator + "bias", "vector")
    return names


# The layers of `DeepLabV3`'s head, and transformers' names of those that it has (`MobileNetV2DeepLabV3Plus`).
_HEAD = {
    "image_pooling": "segmentation_head.conv_pool",
    "aspp0": "segmentation_head.conv_aspp",
    "aspp1": None,
    "aspp2": None,
    "aspp3": None,
    "projection": "segmentation_head.conv_projection",
    "logits": "segmentation_head.classifier",
}
# What only files with such a head have, by the layout; our files have Keras's names.
_HEAD_MARKS = {
    "transformers": ("segmentation_head.classifier.convolution.weight",),
    "keras": ("image_pooling/kernel", "projection/kernel", "logits/kernel"),
}


def head_names(layout: Layout, keys: Collection[str] | None = None) -> dict[str, Array]:
    """The arrays of a segmentation head in a layout, by this package's names of the variables.

    Args:
        layout: of `LAYOUTS`.
        keys: of the file to be read; where it has no such head there are none. None to write one.
    """
    marks = _HEAD_MARKS.get(layout.name)
    if marks is None or (keys is not None and not all(mark in keys for mark in marks)):
        return {}
    names = {}
    for ours, theirs in _HEAD.items():
        if layout.torch and theirs is None:
            continue
        conv = f"{theirs}.convolution." if layout.torch else f"{ours}/"
        norm = f"{theirs}.normalization." if layout.torch else f"{ours}_BN/"
        names[f"{ours}/kernel"] = Array(conv + ("weight" if layout.torch else "kernel"), "conv")
        if ours == "logits":
            names["logits/bias"] = Array(conv + "bias", "vector")
            continue
        for variable, key in _NORM.items():
            names[f"{ours}/norm/{variable}"] = Array(norm + (key if layout.torch else variable), "vector")
        if layout.torch:
            names[f"{ours}/norm/counter"] = Array(norm + "num_batches_tracked", "counter")
    return names


# What only files with `SSDLite`'s predictions have.
_DETECTOR_MARK = "box_1_project/kernel"
_DETECTOR_PARTS = {
    "extra": (4, {"reduce": "conv", "depthwise": "depthwise", "project": "conv"}),
    "box": (6, {"depthwise": "depthwise", "project": "conv"}),
    "class": (6, {"depthwise": "depthwise", "project": "conv"}),
}


def detector_names(layout: Layout, keys: Collection[str]) -> dict[str, Array]:
    """The arrays of `SSDLite` behind its backbone, by this package's names of the variables; none where there are none.

    Args:
        layout: of `LAYOUTS`; only Keras's has a place for them.
        keys: of the file to be read.
    """
    names: dict[str, Array] = {}
    if layout.name != "keras" or _DETECTOR_MARK not in keys:
        return names
    for kind, (count, parts) in _DETECTOR_PARTS.items():
        for number in range(1, count + 1):
            for part, role in parts.items():
                name = f"{kind}_{number}"
                names[f"{name}/{part}/kernel"] = Array(f"{name}_{part}/kernel", role)
                if kind != "extra" and part == "project":
                    names[f"{name}/{part}/bias"] = Array(f"{name}_{part}/bias", "vector")
                    continue
                for variable in _NORM:
                    names[f"{name}/{part}/norm/{variable}"] = Array(f"{name}_{part}_BN/{variable}", "vector")
    return names


def later_blocks(layout: Layout, keys: Collection[str], first: int) -> list[Block]:
    """The blocks of a file from number `first` on, for a network that ends before them."""
    found = {tuple(map(int, match.groups())) for key in keys if (match := re.match(layout.block, key))}
    positions = [(0, 0), *(p for p in sorted(found))] if layout.name in ("keras", "transformers") else sorted(found)
    return [Block(position[0], position[-1], True) for position in positions[first:]]


def to_keras(array: np.ndarray, role: str, layout: Layout) -> np.ndarray:
    """An array of a file with Keras's order of axes."""
    return array.transpose(_AXES[role]) if layout.torch and role in _AXES else array


def from_keras(array: np.ndarray, role: str, layout: Layout) -> np.ndarray:
    """An array of Keras with the file's order of axes, contiguous."""
    if layout.torch and role in _AXES:
        array = array.transpose(np.argsort(_AXES[role]))
    return np.ascontiguousarray(array)


def _belongs(key: str, base: str) -> bool:
    return re.fullmatch(rf"{re.escape(base)}[./](weight|kernel)", key) is not None
