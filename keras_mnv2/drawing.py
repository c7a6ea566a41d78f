"""Pictures of what a network found on a photograph: boxes with names, and masks in colours."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_mnv2.checks import check_number
from keras_mnv2.preprocessing import Photograph, load_image

# Labels that a byte holds.
LABELS = 256
# Of the colours over the photograph.
STRENGTH = 0.6
# Brightness from which on a colour has black letters.
BRIGHT = 128
# The golden ratio, whose multiples spread evenly over a circle.
GOLDEN = (5**0.5 - 1) / 2
# Of a picture's longer side: a line's width, and the height of letters, in pixels at least 2 and 12.
LINE, LETTERS = 1 / 300, 1 / 45


def palette() -> np.ndarray:
    """The colour of each label of a byte, as the Pascal VOC development kit gives them; 0 is black.

    Three bits of a label, from the lowest on, are the highest bits of red, green and blue, the next three the next.

    Returns:
        Bytes (256, 3).

    Examples:
        >>> palette()[:3].tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    labels = np.arange(LABELS)
    channels = [sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype("uint8")


def draw_detections(
    image: Photograph, found: Mapping[str, np.ndarray], labels: Sequence[str] | None = None
) -> Image.Image:
    """Draws boxes with the name and the score of each over a photograph, the best on top.

    Args:
        image: as `load_image` takes it.
        found: `"boxes"` (detections, 4), (left, top, right, bottom) in pixels of the photograph, `"scores"` and
            `"classes"` (detections,): what `Detector.detect` gives. Without scores, as of true boxes, only the names
            are written.
        labels: names of the classes, from 0 on; by default their numbers.

    Returns:
        A Pillow image in mode RGB, of the photograph's size.

    Raises:
        ValueError: on an image that `load_image` does not take, or a class without a name.

    Examples:
        >>> found = {"boxes": np.array([[5.0, 5, 30, 20]]), "scores": np.array([0.9]), "classes": np.array([0])}
        >>> draw_detections(np.full((40, 60, 3), 255, "uint8"), found, ["cat"]).size
        (60, 40)
    """
    picture = load_image(image)
    brush, font, width = _tools(picture)
    scores = found.get("scores")
    for i in range(len(found["boxes"])) if scores is None else np.argsort(scores, kind="stable"):
        label = int(found["classes"][i])
        # Bright ones, which a line shows on any photograph: neighbours are far apart.
        colour = _colour(255 * np.array(colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.85, 1)))
        left, top, right, bottom = (float(edge) for edge in found["boxes"][i])
        brush.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
        text = name_of(label, labels) + ("" if scores is None else f" {float(scores[i]):.2f}")
        _write(brush, font, text, colour, left, top, picture.size)
    return picture


def draw_mask(
    image: Photograph, mask: np.ndarray, labels: Sequence[str] | None = None, strength: float = STRENGTH
) -> Image.Image:
    """Lays the colours of a mask over a photograph, with the names of its classes in a corner.

    The colours are those of Pascal VOC (`palette`), again from 256 labels on. Label 0, there the background, has none.

    Args:
        image: as `load_image` takes it.
        mask: whole numbers (height, width), the label of each pixel of the photograph: what `Segmenter.segment` gives.
        labels: names of the classes, from 0 on; by default their numbers.
        strength: of the colours, from 0 to 1.

    Returns:
        A Pillow image in mode RGB, of the photograph's size.

    Raises:
        ValueError: on an image that `load_image` does not take, a mask of another size, a class without a name, or a
            strength out of range.

    Examples:
        >>> photograph, mask = np.full((40, 60, 3), 255, "uint8"), np.zeros((40, 60), "int32")
        >>> mask[:, 30:] = 1
        >>> draw_mask(photograph, mask, strength=1).getpixel((59, 39))
        (128, 0, 0)
    """
    strength = check_number("strength", strength, "a number from 0 to 1", lambda number: 0 <= number <= 1)
    photograph = load_image(image)
    mask = np.asarray(mask)
    if mask.shape != photograph.size[::-1] or mask.dtype.kind not in "iu":
        raise ValueError(
            f"mask must be whole numbers of the shape {photograph.size[::-1]}, as the image has, got {mask.dtype} of "
            f"shape {mask.shape}."
        )
    colours = palette()
    pixels = np.asarray(photograph, "float32")
    over = pixels * (1 - strength) + colours[mask % LABELS] * strength
    picture = Image.fromarray(np.where(mask[..., None] > 0, over, pixels).round().astype("uint8"))
    brush, font, _ = _tools(picture)
    top = 0.0
    for label in np.unique(mask[mask > 0]):
        top = _write(brush, font, name_of(int(label), labels), _colour(colours[label % LABELS]), 0, top, picture.size)
    return picture


def name_of(label: int, labels: Sequence[str] | None) -> str:
    """The name of a class; its number where classes have no names.

    Raises:
        ValueError: where there are names, but none of this class.
    """
    if labels is None:
        return f"class {label}"
    if not 0 <= label < len(labels):
        raise ValueError(f"labels must have a name for each class, got {len(labels)} and the class {label}.")
    return labels[label]


def _tools(picture: Image.Image) -> tuple[ImageDraw.ImageDraw, ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """What draws, Pillow's own letters, and the width of a line."""
    longer = max(picture.size)
    font = ImageFont.load_default(size=max(12, round(longer * LETTERS)))
    return ImageDraw.Draw(picture), font, max(2, round(longer * LINE))


def _colour(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in colour)
    return red, green, blue


def _write(
    brush: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    colour: tuple[int, int, int],
    left: float,
    top: float,
    size: tuple[int, int],
) -> float:
    """Writes on a ground of this colour with its upper left corner there, or as near as it is whole; the lower edge."""
    x0, y0, x1, y1 = brush.textbbox((0, 0), text, font=font)
    width, height = x1 + x0, y1 + y0
    left = max(0.0, min(left, size[0] - width - 1))
    top = max(0.0, min(top, size[1] - height - 1))
    brush.rectangle((left, top, left + width, top + height), fill=colour)
    # As the eye weighs them (ITU-R BT.601).
    is_bright = np.dot(colour, (0.299, 0.587, 0.114)) > BRIGHT
    brush.text((left, top), text, fill=(0, 0, 0) if is_bright else (255, 255, 255), font=font)
    return top + height + 1
