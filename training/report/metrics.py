"""Numbers from scores: what an evaluation tells of a classifier."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import keras_mnv2

from ..data.masks import IGNORED


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Fraction of images whose label is among the `k` largest scores; of equal scores the first class is the larger.

    Args:
        scores: (images, classes).
        labels: (images,).
        k: at least 1; all classes where there are fewer.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def confusion_matrix(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts of images, (classes, classes): rows are the labels, columns the largest score.

    Args:
        scores: (images, classes).
        labels: (images,).
    """
    classes = scores.shape[1]
    return np.bincount(labels * classes + scores.argmax(1), minlength=classes**2).reshape(classes, classes)


def per_class(matrix: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Each class's images, accuracy, precision and F1.

    Args:
        matrix: of `confusion_matrix`, (classes, classes).
        class_names: in the order of the rows.

    Returns:
        Dicts with `name`, `images`, `accuracy` (recall: the fraction of its images that is found; None without images),
        `precision` (the fraction of its predictions that is right; None without predictions) and `f1` (their harmonic
        mean; None without both).
    """
    right, images, predictions = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    return [
        {
            "name": name,
            "images": int(images[i]),
            "accuracy": float(right[i] / images[i]) if images[i] else None,
            "precision": float(right[i] / predictions[i]) if predictions[i] else None,
            "f1": float(2 * right[i] / (images[i] + predictions[i])) if images[i] or predictions[i] else None,
        }
        for i, name in enumerate(class_names)
    ]


def most_confused(matrix: np.ndarray, class_names: Sequence[str], number: int) -> list[dict[str, Any]]:
    """The pairs of classes with the most images of the one taken for the other, at most `number`.

    Args:
        matrix: of `confusion_matrix`, (classes, classes).
        class_names: in the order of the rows.
        number: of pairs.

    Returns:
        Dicts with the names `label` and `prediction`, the number of `images`, and `of`, all images of the label.
    """
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    pairs = [divmod(int(i), len(matrix)) for i in np.argsort(-wrong, axis=None, kind="stable")[:number]]
    return [
        {
            "label": class_names[i],
            "prediction": class_names[j],
            "images": int(wrong[i, j]),
            "of": int(matrix[i].sum()),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3), 0 to 1.

    The sum over the bins of their fraction of the images times |accuracy - mean confidence|. Confidence is the largest
    of `keras_mnv2.probabilities`; bin m of M holds those in ((m - 1) / M, m / M].

    Args:
        scores: (images, classes).
        labels: (images,).
        bins: of equal width.
    """
    found = keras_mnv2.probabilities(scores)
    confidence, right = found.max(axis=1), found.argmax(axis=1) == labels
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # Fraction of the images times the difference of the means is the difference of the sums over all images.
    differences = np.bincount(index, right - confidence, bins)
    return float(np.abs(differences).sum() / len(labels))


def worst_mistakes(scores: np.ndarray, labels: np.ndarray, number: int) -> np.ndarray:
    """Indices of at most `number` images that are classified wrongly, those with the largest probability first.

    Args:
        scores: (images, classes).
        labels: (images,).
        number: of images.
    """
    found = keras_mnv2.probabilities(scores)
    wrong = np.flatnonzero(found.argmax(axis=1) != labels)
    return wrong[np.argsort(-found[wrong].max(axis=1), kind="stable")][:number]


def measures(scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """`images`, `top1`, `top5`, `calibration_error` and `per_class` of scores (images, classes), as JSON takes them."""
    return {
        "images": len(labels),
        "top1": top_k(scores, labels, 1),
        "top5": top_k(scores, labels, 5),
        "calibration_error": calibration_error(scores, labels),
        "per_class": per_class(confusion_matrix(scores, labels), class_names),
    }


def pixel_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int, ignored: int = IGNORED) -> np.ndarray:
    """Counts of pixels, (classes, classes): rows are the labels, columns the predictions.

    Args:
        labels: of pixels, of any shape; those that are `ignored` are left out.
        predictions: of the same shape.
        classes: how many there are.
        ignored: the label of pixels that do not count.
    """
    counted = labels != ignored
    pairs = labels[counted].astype("int64") * classes + predictions[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(matrix: np.ndarray) -> np.ndarray:
    """Of each class, the pixels that are rightly its own over those of its label, of its prediction, or of both.

    The Pascal VOC challenge's measure of segmentation (Everingham et al. 2015), over all pixels.

    Args:
        matrix: of `pixel_matrix`, (classes, classes), or several, (..., classes, classes).

    Returns:
        Fractions (..., classes); NaN for a class that is neither a label nor a prediction.
    """
    right = np.diagonal(matrix, axis1=-2, axis2=-1).astype("float64")
    union = matrix.sum(axis=-1) + matrix.sum(axis=-2) - right
    return np.divide(right, union, out=np.full_like(right, np.nan), where=union > 0)


def mean_iou(matrix: np.ndarray) -> float:
    """The mean over the classes that are a label or a prediction, as Keras's `MeanIoU`; 0 where no pixel counts."""
    found = intersection_over_union(matrix)
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def per_class_of_pixels(matrix: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Each class's pixels, intersection over union, accuracy and precision.

    Args:
        matrix: of `pixel_matrix`, (classes, classes).
        class_names: in the order of the rows.

    Returns:
        Dicts with `name`, `pixels`, `iou`, `accuracy` and `precision`, the last three None where they have no pixels.
    """
    found = intersection_over_union(matrix)
    return [
        {
            "name": row["name"],
            "pixels": row["images"],
            "iou": None if np.isnan(iou) else float(iou),
            "accuracy": row["accuracy"],
            "precision": row["precision"],
        }
        for row, iou in zip(per_class(matrix, class_names), found, strict=True)
    ]
