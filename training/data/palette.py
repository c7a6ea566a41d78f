"""Colours of labels, for masks and for pictures of them."""

import numpy as np

# Labels that a byte holds.
LABELS = 256


def palette() -> np.ndarray:
    """A colour for each label of a byte, bytes (256, 3), as the Pascal VOC development kit gives them: 0 is black.

    Three bits of a label, from the lowest on, are the highest bits of red, green and blue, the next three the next.
    """
    labels = np.arange(LABELS)
    channels = [sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(channels, axis=1).astype("uint8")
