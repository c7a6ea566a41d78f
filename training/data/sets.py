"""Data sets: TFDS, class folders and arrays, as three splits of images with labels."""

import abc
import functools
import hashlib
import io
import itertools
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mnv2

SPLIT_SEED = 0  # Of the split alone: it stays the same whatever the run's seed.
HELD_OUT = 0.1  # Fraction of the training images that stands in for a validation or test split that is not there.
# More classes are a mistake, such as the numbers of the images in the place of labels.
MOST_CLASSES = 2**20
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}
# Records up to this many bytes of pixels are decoded once and kept.
IN_MEMORY = 2**30
# Name, configuration and version.
TFDS_NAME = re.compile(r"\w+(/[\w-]+)?(:\d+\.\d+\.\d+)?")


class Split(abc.ABC):
    """Images and their labels, by number. `split[i]` is (image, label): a Pillow image or an array, and an integer."""

    least_classes = 2
    """How many a data set of such splits has at least."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, i: int) -> tuple[Any, int]: ...

    def name(self, i: int) -> str:
        """What messages call image `i`."""
        return f"image {i}"

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the images or labels do, as far as can be told without reading image files."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The labels of all images, (number,)."""
        return np.array([self[i][1] for i in range(len(self))])

    @property
    def strata(self) -> np.ndarray:
        """What a part that is held out shall have the same fraction of, (number,): the labels."""
        return self.labels


class ArraySplit(Split):
    """Arrays: images (number, height, width, channels) of values 0..255, labels (number,) of whole numbers."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], int(self.labels[i])

    def fingerprint(self):
        return fingerprint_of(self.images, self.labels)


class FileSplit(Split):
    """Image files, read when they are asked for; one that cannot be read is a ValueError that names it."""

    def __init__(self, paths: Sequence[Path], labels: np.ndarray):
        self.paths = paths
        self.labels = labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return keras_mnv2.load_image(self.paths[i]), int(self.labels[i])

    def name(self, i):
        return str(self.paths[i])

    def fingerprint(self):
        """Of the files' names, with that of the folder that each lies in, sizes and labels; the data set may move."""
        return fingerprint_of(self.labels, *(f"{path.parent.name}/{path.name} {size_of(path)}" for path in self.paths))


def size_of(path):
    """Bytes of a file; None of a link that leads nowhere, which is told when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return None


@dataclass(eq=False)
class RecordSplit(Split):
    """Records of a TFDS data source, whose images are still encoded."""

    source: Any
    image: str
    label: str

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        record = self.source[i]
        return keras_mnv2.load_image(io.BytesIO(record[self.image])), int(record[self.label])

    def name(self, i):
        return f"record {i}"

    def fingerprint(self):
        """Of TFDS's name and version and the number of records, whose files TFDS does not change."""
        return fingerprint_of(self.source.dataset_info.full_name, str(len(self)))

    @functools.cached_property
    def labels(self):
        return np.array([int(self.source[i][self.label]) for i in range(len(self))])


@dataclass(eq=False)
class Subset(Split):
    """Some images of another split."""

    split: Split
    indices: np.ndarray

    def __post_init__(self):
        self.least_classes = self.split.least_classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.split[int(self.indices[i])]

    def name(self, i):
        return self.split.name(int(self.indices[i]))

    @functools.cached_property
    def labels(self):
        return self.split.labels[self.indices]

    @property
    def strata(self):
        return self.split.strata[self.indices]

    def fingerprint(self):
        return fingerprint_of(self.split.fingerprint(), self.indices)


@dataclass(frozen=True)
class Dataset:
    """A data set's three splits and its class names."""

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]

    def __post_init__(self):
        if len(self.class_names) < self.train.least_classes:
            raise ValueError(f"dataset must have at least two classes, got one, {self.class_names[0]!r}.")

    def fingerprint(self) -> dict[str, str]:
        """The number of images and the hash of each split, and the class names' hash."""
        splits = {"training": self.train, "validation": self.validation, "test": self.test}
        found = {name: f"{len(split)} images, {split.fingerprint()}" for name, split in splits.items()}
        return found | {"class": f"{len(self.class_names)} names, {fingerprint_of(*self.class_names)}"}


def fingerprint_of(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() + b"\0" if isinstance(part, str) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


def load(name: str, image_size: int, data_dir: str | os.PathLike | None = None, held_out: bool = True) -> Dataset:
    """Loads a data set with its three splits: `read`, then `complete`."""
    return complete(*read(name, image_size, data_dir), held_out)


def read(
    name: str, image_size: int, data_dir: str | os.PathLike | None = None
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Reads the splits that a data set has, by the names `train`, `validation` and `test`, and its class names.

    Args:
        name: `"digits"`, a folder of class folders, a `.npz` file, or a data set of TFDS such as `"tf_flowers"` or
            `"cifar10:3.0.2"`. A folder may have `train`, `validation` and `test` folders of class folders. A `.npz`
            file has `x_train`, `y_train` and may have `x_validation`, `y_validation`, `x_test`, `y_test`.
        image_size: what the digits are scaled to; other images keep their size here.
        data_dir: where TFDS keeps its data sets; by default `~/tensorflow_datasets`.

    Raises:
        ValueError: where the name is not known, or what it names is no data set of at least two classes.
        ImportError: where TFDS is needed and missing.
    """
    path = Path(name)
    if name == "digits":
        return _digits(image_size)
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _arrays(path)
    if not TFDS_NAME.fullmatch(name):
        raise ValueError(f"dataset must be a folder of class folders or a .npz file that exists, got {name!r}.")
    return _tfds(name, data_dir)


def from_arrays(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The splits and class names of arrays: images NHWC (or NHW, grey) of values 0..255, and labels (number,).

    Raises:
        ValueError: on arrays of another shape, images without labels, or labels out of range.
    """
    given = {"train": train, "validation": validation, "test": test}
    most = len(class_names) if class_names else MOST_CLASSES
    found = {part: _array_split(part, *pair, most) for part, pair in given.items() if pair is not None}
    largest = max(int(split.labels.max()) for split in found.values())
    return dict(found), tuple(class_names or map(str, range(largest + 1)))


def _array_split(part, x, y, most):
    """Checked arrays with labels below `most`."""
    x, y = np.asarray(x), np.asarray(y)
    x = x[..., None] if x.ndim == 3 else x
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if x.ndim != 4 or y.ndim != 1 or len(x) != len(y) or not x.size:
        raise ValueError(f"{part} must have images (number, height, width, channels) and as many labels, "
                         f"got {x.shape} and {y.shape}.")  # fmt: skip
    if x.dtype.kind not in "iuf":
        raise ValueError(f"{part} must have images with values 0..255, got values of type {x.dtype}.")
    least, largest = x.min(), x.max()
    # NaN compares as false.
    if not (least >= 0 and largest <= 255):
        raise ValueError(f"{part} must have images with values 0..255, got values from {least} to {largest}.")
    if x.dtype.kind == "f" and largest <= 1:
        raise ValueError(f"{part} must have images with values 0..255, got none above {largest:g}.")
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= most:
        wrong = y if y.dtype.kind not in "iu" else y[(y < 0) | (y >= most)]
        raise ValueError(f"labels of {part} must be whole numbers from 0 to {most - 1}, got {wrong[0]}.")
    # Bytes, which are resized as photographs are.
    return ArraySplit(x if x.dtype == np.uint8 else np.round(x).astype("uint8"), y.astype("int64"))


def digit_scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's handwritten digits, by part: scans (number, 8, 8) of 0..16, black to white ink, and labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.images))
    rest, test = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=SPLIT_SEED)
    train, validation = train_test_split(rest, test_size=0.125, stratify=digits.target[rest], random_state=SPLIT_SEED)
    parts = zip(SPLIT_NAMES, (train, validation, test), strict=True)
    return {name: (digits.images[part], digits.target[part]) for name, part in parts}


def _digits(image_size):
    def enlarged(scans):
        images = np.asarray(scans, "float32")[..., None] * (255 / 16)
        return keras.ops.convert_to_numpy(keras.ops.image.resize(images, (image_size, image_size)))

    parts = {name: ArraySplit(enlarged(scans), labels) for name, (scans, labels) in digit_scans().items()}
    return dict(parts), tuple(map(str, range(10)))


def _arrays(path):
    pairs = {part: (f"x_{part}", f"y_{part}") for part in SPLIT_NAMES}
    if not zipfile.is_zipfile(path):
        raise ValueError(f"dataset must be a .npz file, which {str(path)!r} is not: it is no whole zip archive.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file)
            arrays = {name: file[name] for name in itertools.chain(*pairs.values()) if name in names}
    # Whatever zipfile, zlib and NumPy say of what is damaged.
    except Exception as error:
        told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"dataset must be a .npz file of numbers, which {str(path)!r} is not: {told}.") from error
    if not {"x_train", "y_train"} <= set(names):
        raise ValueError(f"dataset must hold the arrays x_train and y_train, got {names} in {str(path)!r}.")
    return from_arrays(
        **{part: (arrays[x], arrays[y]) for part, (x, y) in pairs.items() if x in arrays and y in arrays},
    )


def _folder(path):
    folders = {entry.name: entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    parts = {part: folders[name] for part, names in SPLIT_NAMES.items() for name in names if name in folders}
    if len(parts) < len(folders):
        # Classes, some of which may have such names by chance.
        parts = {"train": path}
    found: dict[str, Split] = {}
    class_names = None
    for part, folder in (parts or {"train": path}).items():
        try:
            # The first split has all classes.
            paths, labels, class_names = keras_mnv2.class_folders(folder, class_names)
        except ValueError as error:
            raise ValueError(str(error).replace("folder must", "dataset must", 1)) from None
        found[part] = FileSplit(paths, np.array(labels))
    return found, class_names


def _tfds(name, data_dir):
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_datasets":
            raise
        raise ImportError(
            f"dataset must be 'digits', a folder of class folders or a .npz file, got {name!r}; names of TFDS need "
            "pip install tensorflow-datasets."
        ) from None
    full_name = _prepared_version(name, Path(data_dir or tfds.core.constants.DATA_DIR))
    try:
        # Images stay encoded, so that threads decode them when they are wanted.
        sources = tfds.data_source(full_name, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()})
    except tfds.core.registered.DatasetNotFoundError:
        raise ValueError(
            f"dataset must be 'digits', a folder of class folders, a .npz file or a data set of TFDS, got {name!r}."
        ) from None
    except Exception as error:
        # TFDS raises what its downloads and builders raise.
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"dataset {name!r} could not be prepared by TFDS: {told}") from error
    features = next(iter(sources.values())).dataset_info.features
    image = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    label = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if len(image) != 1 or not label:
        raise ValueError(f"dataset {name!r} must have one image and a class label a record, got {sorted(features)}.")
    found = {
        part: RecordSplit(sources[split], image[0], label[0])
        for part, names in SPLIT_NAMES.items()
        for split in names
        if split in sources
    }
    shape = features[image[0]].shape
    if None not in shape and sum(map(len, found.values())) * int(np.prod(shape)) <= IN_MEMORY:
        found = {part: _decoded(split) for part, split in found.items()}
    return found, tuple(features[label[0]].names)


def _prepared_version(name, data_dir):
    """The name with the newest version that lies prepared: TFDS would look for its own newest, in another format."""
    if ":" in name or not (data_dir / name).is_dir():
        return name
    versions = [folder.name for folder in (data_dir / name).iterdir() if (folder / "features.json").is_file()]
    numbers = [v for v in versions if all(part.isdigit() for part in v.split("."))]
    return f"{name}:{max(numbers, key=lambda v: [int(part) for part in v.split('.')])}" if numbers else name


def _decoded(split):
    # Many records a call: one a call takes four times as long.
    images, labels = [], []
    for start in range(0, len(split), 1000):
        for record in split.source.__getitems__(list(range(start, min(start + 1000, len(split))))):
            images.append(np.asarray(keras_mnv2.load_image(io.BytesIO(record[split.image]))))
            labels.append(int(record[split.label]))
    return ArraySplit(np.stack(images), np.array(labels))


def complete(found: dict[str, Split], class_names: tuple[str, ...], held_out: bool = True) -> Dataset:
    """All three splits; what is missing is held out of the training images, class by class, or is the nearest other.

    Args:
        found: the splits that there are.
        class_names: of the labels.
        held_out: whether a tenth of the training images stands in for validation images that are missing. Otherwise
            the test images do. Missing test images are the validation images where these are given, or held out too.

    Raises:
        ValueError: where there are no training images, or fewer than two classes.
    """
    if "train" not in found:
        raise ValueError(f"dataset must have training images, got only {', '.join(found)}.")
    splits = dict(found)
    if "validation" not in splits and held_out:
        splits["train"], splits["validation"] = _divided(splits["train"])
    if "test" not in splits:
        if "validation" in found:
            splits["test"] = splits["validation"]
        else:
            splits["train"], splits["test"] = _divided(splits["train"], HELD_OUT / (1 - HELD_OUT))
    splits.setdefault("validation", splits["test"])
    return Dataset(splits["train"], splits["validation"], splits["test"], class_names)


def _divided(split, fraction=HELD_OUT):
    """Two splits; the second has `fraction` of each class, at least one image of those that have two."""
    rng = np.random.default_rng(SPLIT_SEED)
    second: list[int] = []
    for stratum in np.unique(split.strata):
        own = rng.permutation(np.flatnonzero(split.strata == stratum))
        second += own[: max(1, round(fraction * len(own))) if len(own) > 1 else 0].tolist()
    if not second:
        raise ValueError("dataset must have two images of some class, so that one can be held out for validation.")
    first = np.setdiff1d(np.arange(len(split)), second)
    return Subset(split, first), Subset(split, np.sort(second))
