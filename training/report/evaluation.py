"""What an evaluation says of scores on images: maps of the mistakes, results and text."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras_mnv2

from . import mistakes
from .activation_map import activation_maps
from .mistakes import Mistake
from .tables import table

# Rows of the table of classes above which only the worst are printed.
MOST_ROWS, WORST_ROWS = 40, 10


def explained(worst: Sequence[Mistake], network: keras_mnv2.Classifier, first: int) -> tuple[list[Mistake], str]:
    """The mistakes with their activation maps, and why they have none.

    Args:
        worst: of `mistakes.worst`.
        network: what gave the scores.
        first: of the network's classes, the one that is the data set's first.
    """
    model = network.model
    if model is None:
        return list(worst), f"{network.runtime} gives the scores alone."

    def maps(images, classes):
        return activation_maps(model, network.prepare(images), classes + first)

    try:
        return mistakes.explained(worst, maps), ""
    except ValueError as error:
        return list(worst), str(error)


def rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for the head of the page."""
    return [
        ("accuracy", f"{results['top1']:.2%} of {results['images']:,} images"),
        *([("accuracy, top 5", f"{results['top5']:.2%}")] if len(results["per_class"]) > 5 else []),
        ("expected calibration error", f"{results['calibration_error']:.4f}"),
        ("images a second, reading included", f"{results['images_per_second']:,.1f}"),
        ("waiting for images", f"{results['waiting']:.0%} of the time"),
    ]


def text(results: Mapping[str, Any]) -> str:
    """The results as people read them; of many classes the least accurate ones."""
    found = results["per_class"]
    shown = found
    head = ""
    if len(found) > MOST_ROWS:
        shown = sorted((row for row in found if row["images"]), key=lambda row: row["accuracy"])[:WORST_ROWS]
        head = f"The {len(shown)} least accurate of {len(found)} classes:\n\n"
    cells = [[row["name"], row["images"], _percent(row["accuracy"]), _percent(row["precision"])] for row in shown]
    lines = [
        f"{results['model']} ({results['runtime']}) on {results['images']:,} {results['split']} images of "
        f"{results['dataset']}, {results['image_size']} pixels a side",
        f"top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}, expected calibration error "
        f"{results['calibration_error']:.4f}",
        f"{results['images_per_second']:,.1f} images/s, reading included; {results['waiting']:.0%} of the time was "
        "waiting for images",
        f"{head}{table(['class', 'images', 'accuracy', 'precision'], cells)}",
    ]
    return "\n\n".join(lines)


def _percent(fraction):
    return None if fraction is None else f"{fraction:.1%}"
