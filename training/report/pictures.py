"""Charts and sheets of pictures, as PNG files that are moved into place whole."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from .. import files

# Above this many classes the counts would not fit into the cells, and the names not beside them.
MOST_COUNTS, MOST_NAMES = 20, 40
LONGEST_NAME = 24


def draw_curves(history: dict[str, list[float]], path: Path, phases: dict[str, int] | None = None) -> None:
    """Draws loss and accuracy of training and validation over the epochs; those that `history` lacks are left out.

    Args:
        history: of `fit`: `loss`, `accuracy`, `val_loss`, `val_accuracy`, a number an epoch.
        path: of the PNG.
        phases: the first epoch, from 1, of each phase by name; a dashed line stands before it.
    """
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((metric, "training"), (f"val_{metric}", "validation")):
            if values := history.get(key):
                # One epoch makes no line.
                axes.plot(range(1, len(values) + 1), values, label=label, marker="o" if len(values) == 1 else None)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        for name, first in (phases or {}).items():
            axes.axvline(first - 0.5, linestyle="--", color="tab:gray", linewidth=1)
            axes.annotate(
                name,
                (first - 0.5, 1),
                (2, 3),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                rotation=20,
                fontsize="small",
                color="dimgray",
            )
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    _save(figure, path)


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix as shares of each row; with at most 20 classes the counts stand in the cells.

    Args:
        matrix: (classes, classes), rows true and columns predicted.
        class_names: in the order of the rows; above 40 classes they are left out.
        path: of the PNG.
    """
    classes = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cell = 0.45 if classes <= MOST_COUNTS else 0.25
    side = min(max(3.2, cell * classes), 10)
    names = [_shortened(name) for name in class_names]
    longest = max(map(len, names))
    margin = 1.2 + (0.08 * longest if classes <= MOST_NAMES else 0)
    figure = matplotlib.figure.Figure(figsize=(side + margin + 0.8, side + margin), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class's images", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= MOST_NAMES:
        # A letter is about 0.1 inches wide.
        short = 0.1 * longest < side / classes
        size = "medium" if classes <= MOST_COUNTS else "small"
        axes.set_yticks(range(classes), names, fontsize=size)
        axes.set_xticks(range(classes), names, fontsize=size, rotation=0 if short else 90)
    else:
        axes.set(xticks=[], yticks=[])
    if classes <= MOST_COUNTS:
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[i, j] > 0.5 else "black"
                size = "medium" if classes < 8 else "x-small"
                axes.text(j, i, f"{count}", ha="center", va="center", color=colour, fontsize=size)
    _save(figure, path)


def draw_mistakes(images: Sequence[np.ndarray], titles: Sequence[str], path: Path, columns: int = 6) -> bool:
    """Draws a sheet of pictures with their titles, such as "shirt, not t-shirt" and the probability below it.

    Args:
        images: bytes (height, width, channels), of 1 or 3 channels.
        titles: of each; long ones are wrapped.
        path: of the PNG.
        columns: pictures beside one another.

    Returns:
        Whether there was a picture; without any no file is written.
    """
    if not len(images):
        return False
    columns = min(columns, len(images))
    titles = ["\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, 22)) for title in titles]
    rows = math.ceil(len(images) / columns)
    height = 1.9 + 0.15 * max(title.count("\n") + 1 for title in titles)
    figure = matplotlib.figure.Figure(figsize=(max(2.2, 1.8 * columns), height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
        axes.set_anchor("S")
    for axes, image, title in zip(panels, images, titles, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
        axes.set_title(title, fontsize=8)
    _save(figure, path)
    return True


def _shortened(name):
    """Without its middle, where it is long: names often differ in their ends."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def _save(figure, path):
    with files.beside(Path(path)) as part:
        figure.savefig(part, format="png", dpi=120)
