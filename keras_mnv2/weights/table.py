"""The published checkpoints as data."""

import difflib
import fnmatch
import math
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal, overload

from keras_mnv2.checks import check_choice, check_flag, check_positive, check_whole

LIBRARIES = ("keras", "torchvision", "timm", "transformers")
RESOLUTIONS = (96, 128, 160, 192, 224)

# torchvision's and timm's statistics of the ImageNet training set, and the -1..1 of the TensorFlow authors.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """What a library does to a photograph before its model sees it, in evaluation.

    Attributes:
        resize: pixels of the shorter side after resizing (Pillow, with antialiasing).
        crop: pixels of each side of the centre crop.
        interpolation: `"bilinear"` or `"bicubic"`.
        mean: of each channel (RGB), subtracted from pixels of 0..1.
        std: standard deviation of each channel, which they are divided by then.
        crop_rounding: `"round"`, the crop's corner at `round((side - crop) / 2)` as in torchvision, or
            `"floor"`, as in Keras and transformers.
    """

    resize: int
    crop: int
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    crop_rounding: str = "floor"

    @classmethod
    def for_evaluation(cls, size: int, weights: str | None = None, resize: int | None = None) -> "Preprocessing":
        """How photographs are resized and cropped for a model, where no more is known of it.

        Args:
            size: side of its images, in pixels.
            weights: what it started with; a published checkpoint's way is its own. Otherwise the shorter side is
                resized to 256 for each 224 pixels, as in torchvision.
            resize: pixels of the shorter side after resizing, instead.

        Raises:
            ValueError: on sides that are no whole numbers.

        Examples:
            >>> Preprocessing.for_evaluation(112).resize
            128
        """
        known: dict[str | None, Preprocessing] = {each.name: each.preprocessing for each in CHECKPOINTS}
        how = known[weights] if weights in known else cls(256, 224, crop_rounding="round")
        return how.at(check_whole("size", size), resize and check_whole("resize", resize))

    def at(self, size: int, resize: int | None = None) -> "Preprocessing":
        """The same for images of `size` pixels a side. The resizing scales with it, unless `resize` is given."""
        return replace(self, resize=resize or self.resize * size // self.crop, crop=size)


@dataclass(frozen=True)
class Checkpoint:
    """A published file of weights: `MobileNetV2(weights=checkpoint.name)` loads it.

    Attributes:
        name: what `weights` takes.
        url: where the file is published.
        sha256: of the file, in hexadecimal digits; None where none is published, and the file is checked
            by its structure alone.
        layout: how the arrays are named; of `keras_mnv2.weights.rename`.
        licence: SPDX identifier, or None where the publisher states none of its own.
        alpha: width multiplier.
        resolution: pixels of each side of the images that it was trained on.
        depth_multiplier: as in `MobileNetV2`.
        fix_stem_head: as in `MobileNetV2`.
        padding: as in `MobileNetV2`.
        norm_epsilon: as in `MobileNetV2`.
        classes: width of the classifier, or 0 for a file without one.
        class_offset: index of ImageNet's class 0: 1 where the first class is the background.
        preprocessing: of the evaluation.
        top1: published top-1 accuracy in percent, on ImageNet's validation images.
        top5: published top-5 accuracy in percent.
    """

    name: str
    url: str
    sha256: str | None
    layout: str
    licence: str | None
    alpha: float
    resolution: int
    padding: str
    norm_epsilon: float
    preprocessing: Preprocessing
    top1: float
    top5: float
    depth_multiplier: float = 1.0
    fix_stem_head: bool = False
    classes: int = 1000
    class_offset: int = 0

    @property
    def library(self) -> str:
        """The library that published it, one of `LIBRARIES`."""
        return self.name.partition("/")[0]

    @property
    def file_name(self) -> str:
        """The file's name in Keras's cache; Keras's own files have the name that Keras gives them."""
        last = PurePosixPath(self.url).name
        return last if self.library in ("keras", "torchvision") else f"{self.name.replace('/', '--')}--{last}"


@dataclass(frozen=True)
class SegmentationCheckpoint:
    """A published file of a segmentation network: `DeepLabV3(weights=checkpoint.name)` loads it.

    Padding, epsilon and the names of its arrays are those of its layout, its width what the shapes say.

    Attributes:
        name: what `weights` takes.
        url: where the file is published.
        sha256: of the file, or None where none is published.
        alpha: width multiplier.
        resolution: pixels of each side of the images that it was trained on.
        output_stride: as in `DeepLabV3`.
        labels: of the classes, in order.
        preprocessing: of the evaluation.
    """

    name: str
    url: str
    sha256: str | None
    alpha: float
    resolution: int
    output_stride: int
    labels: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def classes(self) -> int:
        """Of a pixel."""
        return len(self.labels)

    @property
    def file_name(self) -> str:
        """The file's name in Keras's cache."""
        return f"{self.name.replace('/', '--')}--{PurePosixPath(self.url).name}"


# Top-1 and top-5 accuracy by width and resolution, from the table of the checkpoints in tensorflow/models
# (research/slim/nets/mobilenet), which keras.applications' module quotes. The files of keras.applications and of
# transformers are conversions of these. There they were measured with the central 87.5 % of each side.
_TENSORFLOW = {
    (1.4, 224): (75.0, 92.5),
    (1.3, 224): (74.4, 92.1),
    (1.0, 224): (71.8, 91.0),
    (1.0, 192): (70.7, 90.1),
    (1.0, 160): (68.8, 89.0),
    (1.0, 128): (65.3, 86.9),
    (1.0, 96): (60.3, 83.2),
    (0.75, 224): (69.8, 89.6),
    (0.75, 192): (68.7, 88.9),
    (0.75, 160): (66.4, 87.3),
    (0.75, 128): (63.2, 85.3),
    (0.75, 96): (58.8, 81.6),
    (0.5, 224): (65.4, 86.4),
    (0.5, 192): (63.9, 85.4),
    (0.5, 160): (61.0, 83.2),
    (0.5, 128): (57.7, 80.8),
    (0.5, 96): (51.2, 75.8),
    (0.35, 224): (60.3, 82.9),
    (0.35, 192): (58.2, 81.2),
    (0.35, 160): (55.7, 79.1),
    (0.35, 128): (50.8, 75.0),
    (0.35, 96): (45.5, 70.4),
}


def _keras(alpha: float, size: int, top: bool) -> Checkpoint:
    suffix = "" if top else "_no_top"
    top1, top5 = _TENSORFLOW[alpha, size]
    return Checkpoint(
        name=f"keras/mobilenet_v2_{alpha}_{size}{suffix}",
        url="https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
        f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{size}{suffix}.h5",
        sha256=None,
        layout="keras",
        licence="Apache-2.0",
        alpha=alpha,
        resolution=size,
        padding="same",
        norm_epsilon=1e-3,
        classes=1000 if top else 0,
        preprocessing=Preprocessing(math.floor(size / 0.875), size),
        top1=top1,
        top5=top5,
    )


def _torchvision(version: str, sha256: str, resize: int, top1: float, top5: float) -> Checkpoint:
    return Checkpoint(
        name=f"torchvision/IMAGENET1K_{version}",
        url=f"https://download.pytorch.org/models/mobilenet_v2-{sha256[:8]}.pth",
        sha256=sha256,
        layout="torchvision",
        licence="BSD-3-Clause",
        alpha=1.0,
        resolution=224,
        padding="symmetric",
        norm_epsilon=1e-5,
        preprocessing=Preprocessing(resize, 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD, "round"),
        top1=top1,
        top5=top5,
    )


def _timm(name: str, sha256: str | None, alpha: float, top1: float, top5: float, **depth: Any) -> Checkpoint:
    return Checkpoint(
        name=f"timm/{name}",
        url=f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors",
        sha256=sha256,
        layout="timm",
        licence="Apache-2.0",
        alpha=alpha,
        resolution=224,
        padding="symmetric",
        norm_epsilon=1e-5,
        preprocessing=Preprocessing(256, 224, "bicubic", IMAGENET_MEAN, IMAGENET_STD, "round"),
        top1=top1,
        top5=top5,
        **depth,
    )


def _transformers(alpha: float, size: int, url: str, sha256: str | None) -> Checkpoint:
    top1, top5 = _TENSORFLOW[alpha, size]
    return Checkpoint(
        name=f"transformers/google/mobilenet_v2_{alpha}_{size}",
        url=f"https://huggingface.co/google/mobilenet_v2_{alpha}_{size}/resolve/{url}",
        sha256=sha256,
        layout="transformers",
        licence=None,
        alpha=alpha,
        resolution=size,
        padding="same",
        norm_epsilon=1e-3,
        classes=1001,
        class_offset=1,
        preprocessing=Preprocessing(size + 32, size),
        top1=top1,
        top5=top5,
    )


CHECKPOINTS = (
    *(_keras(alpha, size, top) for alpha, size in _TENSORFLOW for top in (True, False)),
    # torchvision/models/mobilenetv2.py (0.29), which publishes the first eight digits in the file's name; the others
    # are those that builds which pin the file agree on.
    _torchvision("V1", "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889", 256, 71.878, 90.286),
    _torchvision("V2", "7ebf99e03e254b273379b23edca7ec0da9f48273b23a332b93c1c99d49e86e8f", 232, 72.154, 90.822),
    # timm/models/efficientnet.py (1.0.31), results/results-imagenet.csv, and the file pages of its repositories.
    _timm("mobilenetv2_050.lamb_in1k", None, 0.5, 65.950, 86.088),
    _timm(
        "mobilenetv2_100.ra_in1k",
        "55ea4fb3a96010b933710ebf44fc965b070d5cd054d3f35e44f2d1320b4a714e",
        1.0,
        72.976,
        91.010,
    ),
    _timm(
        "mobilenetv2_110d.ra_in1k",
        "feaa9d38a81f31493434916f700d1f752ec5bb70d5903fd08d3278ec0ca7cc0b",
        1.1,
        75.056,
        92.186,
        depth_multiplier=1.2,
        fix_stem_head=True,
    ),
    _timm("mobilenetv2_120d.ra_in1k", None, 1.2, 77.302, 93.504, depth_multiplier=1.4, fix_stem_head=True),
    _timm("mobilenetv2_140.ra_in1k", None, 1.4, 76.520, 92.986),
    # The repositories' file pages and preprocessor_config.json; the crop is the resolution, the resize 32 pixels more,
    # as in transformers' conversion script.
    _transformers(0.35, 96, "main/pytorch_model.bin", None),
    _transformers(
        0.75, 160, "main/pytorch_model.bin", "963ae7c2b05f7ead5130bcc8d28e67bb5bafaf44bc51312f94e62c2d9e20cc66"
    ),
    _transformers(
        1.0, 224, "main/model.safetensors", "94f61c6902b411e6b730cfe2443c8b2d983a2d50d289c4bd7083e0583ccdfe76"
    ),
    _transformers(
        1.4, 224, "main/pytorch_model.bin", "a5c7f052fbbaf60880d9f9dbc12550e5ddb4375f9b8a96cc1d488103689b6ec6"
    ),
)


# The classes of Pascal VOC 2012, in the order of its masks.
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_VOC_513 = "google/deeplabv3_mobilenet_v2_1.0_513"
# The repository's config.json and preprocessor_config.json: output stride 8, shorter side 545, crop 513.
SEGMENTATION_CHECKPOINTS = (
    SegmentationCheckpoint(
        name=f"transformers/{_VOC_513}",
        url=f"https://huggingface.co/{_VOC_513}/resolve/main/pytorch_model.bin",
        sha256=None,
        alpha=1.0,
        resolution=513,
        output_stride=8,
        labels=VOC,
        preprocessing=Preprocessing(545, 513),
    ),
)


def segmentation_checkpoint(weights: object) -> SegmentationCheckpoint | None:
    """The published segmentation network of that name or `hf://` address, or None."""
    for checkpoint in SEGMENTATION_CHECKPOINTS:
        repository = checkpoint.url.partition("/resolve/")[0].removeprefix("https://huggingface.co/")
        if isinstance(weights, str) and weights in (checkpoint.name, f"hf://{repository}"):
            return checkpoint
    return None


@overload
def list_weights(
    pattern: str = "*",
    library: str | None = None,
    alpha: float | None = None,
    resolution: int | None = None,
    include_top: bool | None = None,
    task: Literal["classification"] = "classification",
) -> list[Checkpoint]: ...


@overload
def list_weights(
    pattern: str = "*",
    library: str | None = None,
    alpha: float | None = None,
    resolution: int | None = None,
    include_top: bool | None = None,
    *,
    task: Literal["segmentation"],
) -> list[SegmentationCheckpoint]: ...


def list_weights(
    pattern: str = "*",
    library: str | None = None,
    alpha: float | None = None,
    resolution: int | None = None,
    include_top: bool | None = None,
    task: str = "classification",
) -> list[Checkpoint] | list[SegmentationCheckpoint]:
    """The published checkpoints that `MobileNetV2(weights=...)` and `DeepLabV3(weights=...)` know.

    Args:
        pattern: of the name, with `*` and `?` as in file names.
        library: `"keras"`, `"torchvision"`, `"timm"` or `"transformers"`.
        alpha: width multiplier.
        resolution: pixels of each side.
        include_top: whether the file has a classifier.
        task: `"classification"`, or `"segmentation"` for those of `DeepLabV3`, which all have their top.

    Returns:
        A list of frozen records; `name` is what `weights` takes.

    Raises:
        ValueError: on an unknown library, a pattern that is no text, or another value that is none of its kind.

    Examples:
        >>> [checkpoint.name for checkpoint in list_weights(library="torchvision")]
        ['torchvision/IMAGENET1K_V1', 'torchvision/IMAGENET1K_V2']
    """
    if library is not None:
        check_choice("library", library, LIBRARIES)
    if not isinstance(pattern, str):
        raise ValueError(f"pattern must be a name, with * and ? for what may differ, got {pattern!r}.")
    alpha = None if alpha is None else check_positive("alpha", alpha)
    resolution = None if resolution is None else check_whole("resolution", resolution)
    include_top = None if include_top is None else check_flag("include_top", include_top)
    if check_choice("task", task, ("classification", "segmentation")) == "segmentation":
        return [
            checkpoint
            for checkpoint in SEGMENTATION_CHECKPOINTS
            if fnmatch.fnmatchcase(checkpoint.name, pattern)
            and library in (None, "transformers")
            and alpha in (None, checkpoint.alpha)
            and resolution in (None, checkpoint.resolution)
            and include_top is not False
        ]
    return [
        checkpoint
        for checkpoint in CHECKPOINTS
        if fnmatch.fnmatchcase(checkpoint.name, pattern)
        and library in (None, checkpoint.library)
        and alpha in (None, checkpoint.alpha)
        and resolution in (None, checkpoint.resolution)
        and include_top in (None, checkpoint.classes > 0)
    ]


def find_checkpoint(name: object) -> Checkpoint:
    """The checkpoint of that name, or a `ValueError` that lists the nearest names."""
    names = [checkpoint.name for checkpoint in CHECKPOINTS]
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(str(name), names, 3, 0.3) or names[:3]
        raise ValueError(
            f"weights must be None, 'imagenet', the name of a published checkpoint, an hf:// address or the path of "
            f"an existing file, got {name!r}; the nearest names are {', '.join(near)} "
            "(keras_mnv2.list_weights() has all)."
        )
    return CHECKPOINTS[names.index(name)]


def imagenet_checkpoint(alpha: float, sides: tuple[int | None, ...], include_top: bool) -> Checkpoint:
    """Keras's own meaning of `weights="imagenet"`: its checkpoint for this width and resolution.

    For sides that differ, are free, or have no file of their own it is that of 224 pixels, as in Keras.

    Raises:
        ValueError: where Keras publishes none of this width.
    """
    widths = sorted({a for a, _ in _TENSORFLOW})
    if alpha not in widths:
        raise ValueError(f'alpha must be one of {", ".join(map(str, widths))} with weights="imagenet", got {alpha!r}.')
    size = sides[0] if len(set(sides)) == 1 and (alpha, sides[0]) in _TENSORFLOW else 224
    return find_checkpoint(f"keras/mobilenet_v2_{float(alpha)}_{size}{'' if include_top else '_no_top'}")
