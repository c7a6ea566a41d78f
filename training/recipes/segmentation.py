"""A class for each pixel of your own images and masks, by DeepLabV3; by default handwritten digits on photographs.

The schedule is the authors' (DeepLab, Chen et al. 2017, arXiv 1606.00915: the rate falls by the power 0.9 of what is
left), and so are the random scales and windows; `--weights` and `--weights-backbone` start from published ones.

Command: `python -m training segmentation`, or `python -m training segmentation --dataset FOLDER` with folders of images
and masks.
Expected for the digits: a mean IoU of 86 to 87 % in 14 to 15 minutes on two x86 cores (`docs/segmentation.md`).
"""

from ..config import Config

CONFIG = Config(
    recipe="segmentation",
    task="segmentation",
    dataset="scenes",
    image_size=64,
    alpha=0.35,
    output_stride=8,
    dropout=0.0,
    epochs=18,
    batch_size=16,
    learning_rate=6e-3,
    weight_decay=0.01,
    schedule="poly",
    rescale=1.1,
)
