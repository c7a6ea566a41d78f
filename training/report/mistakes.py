"""The images that were most surely taken for another class, and what in them spoke for it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import keras_mnv2

from ..data.batches import Batches
from . import metrics

MOST = 24


@dataclasses.dataclass(frozen=True)
class Mistake:
    """An image that is classified wrongly.

    Attributes:
        name: of the image.
        image: bytes (height, width, 1 or 3), as the network sees it.
        label: name of its class.
        label_probability: what the network gives that class.
        prediction: name of the class that it is taken for.
        probability: what the network gives that one.
        index: of the class that it is taken for.
        heat: which parts speak for that class, (height, width) of 0 to 1, or None where it is not known.
    """

    name: str
    image: np.ndarray
    label: str
    label_probability: float
    prediction: str
    probability: float
    index: int
    heat: np.ndarray | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON takes it, without the picture."""
        return {
            "image": self.name,
            "label": self.label,
            "prediction": self.prediction,
            "probability": self.probability,
        }


def worst(scores: np.ndarray, labels: np.ndarray, batches: Batches, class_names: Sequence[str]) -> list[Mistake]:
    """The mistakes with the largest probability, at most 24.

    Args:
        scores: (images, classes), of all images that can be read.
        labels: (images,).
        batches: ordered; what was scored.
        class_names: in the order of the scores.
    """
    probabilities = keras_mnv2.probabilities(scores)
    readable = batches.readable()
    found = []
    for i in metrics.worst_mistakes(probabilities, labels, MOST):
        image = batches.prepare(batches.split[readable[i]][0], np.random.default_rng(0))
        index = int(probabilities[i].argmax())
        found.append(
            Mistake(
                name=batches.split.name(readable[i]),
                image=np.clip(np.round(image), 0, 255).astype("uint8"),
                label=class_names[labels[i]],
                label_probability=float(probabilities[i, labels[i]]),
                prediction=class_names[index],
                probability=float(probabilities[i, index]),
                index=index,
            )
        )
    return found


def explained(mistakes: Sequence[Mistake], maps: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[Mistake]:
    """The same mistakes with what speaks for the class that each is taken for.

    Args:
        mistakes: of `worst`.
        maps: from images (images, height, width, channels) with values 0..255 and classes (images,) to
            `activation_map.activation_maps`.
    """
    if not mistakes:
        return []
    images = np.stack([mistake.image for mistake in mistakes]).astype("float32")
    heat = maps(images, np.array([mistake.index for mistake in mistakes]))
    return [dataclasses.replace(mistake, heat=one) for mistake, one in zip(mistakes, heat, strict=True)]
