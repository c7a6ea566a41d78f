"""Handwritten digits from scratch, in about a minute: scikit-learn's 1,797 real 8x8 scans, scaled to 32x32.

Source: the test set of Alpaydin and Kaynak's optical digits (UCI, 1998), carried by scikit-learn. The stem
has stride 1, so that the last blocks still see 2x2 pixels.

Command: `python -m training` (or `python -m training digits`).
"""

from ..config import Config

CONFIG = Config(
    recipe="digits",
    dataset="digits",
    image_size=32,
    alpha=0.35,
    stem_stride=1,
    epochs=25,
    batch_size=64,
    learning_rate=4e-3,
    weight_decay=0.01,
    label_smoothing=0.1,
    shift=0.1,
)
