"""What an evaluation says of scores on images: mistakes, pictures and text."""

from pathlib import Path
from typing import Any

import numpy as np

import keras_mnv2

from ..data.batches import Batches
from . import metrics, pictures
from .tables import table

# Mistakes that are shown, and rows of the table of classes above which only the worst are printed.
MISTAKES, MOST_ROWS, WORST_ROWS = 24, 40, 10


def mistakes(
    scores: np.ndarray, labels: np.ndarray, test: Batches, class_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The most confident mistakes with the name of the image, its label, the prediction and the probability of that.

    Args:
        scores: (images, classes).
        labels: (images,).
        test: the images, in their order, that the scores are of.
        class_names: of the labels.
    """
    readable = test.readable()
    found = keras_mnv2.probabilities(scores)
    return [
        {
            "image": test.split.name(readable[i]),
            "label": class_names[labels[i]],
            "prediction": class_names[found[i].argmax()],
            "probability": float(found[i].max()),
        }
        for i in metrics.worst_mistakes(scores, labels, MISTAKES)
    ]


def draw(scores: np.ndarray, labels: np.ndarray, test: Batches, class_names: tuple[str, ...], run_dir: Path) -> None:
    """Draws the confusion matrix, and the test images that were most surely taken for another class."""
    pictures.draw_confusion(metrics.confusion_matrix(scores, labels), class_names, run_dir / "confusion.png")
    probabilities = keras_mnv2.probabilities(scores)
    readable = test.readable()
    images, titles = [], []
    for i in metrics.worst_mistakes(probabilities, labels, MISTAKES):
        image = test.prepare(test.split[readable[i]][0], np.random.default_rng(0))
        images.append(np.clip(image, 0, 255).astype("uint8"))
        found = probabilities[i].argmax()
        titles.append(f"{class_names[found]}, not {class_names[labels[i]]}\n{probabilities[i, found]:.0%}")
    pictures.draw_mistakes(images, titles, run_dir / "mistakes.png")


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
        f"{head}{table(['class', 'images', 'accuracy', 'precision'], cells)}",
    ]
    return "\n\n".join(lines)


def _percent(share):
    return None if share is None else f"{share:.1%}"
