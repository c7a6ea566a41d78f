"""Boxes around the objects of your own images, by SSDLite; by default handwritten digits on photographs.

The crops, the canvas and the colours that training images are changed by are SSD's (Liu et al. 2016, arXiv 1512.02325,
section 2.2 and 3.6). Digits are never mirrored; add `--flip` for objects that may be.

Command: `python -m training detection`, or `python -m training detection --dataset FOLDER` with a folder of COCO's or
Pascal VOC's layout.
Expected: the aim for the digits is mAP 90 % at IoU 0.5 in 15 minutes on two x86 cores. Not measured yet.
"""

from ..config import Config

CONFIG = Config(
    recipe="detection",
    task="detection",
    dataset="scenes",
    image_size=128,
    alpha=0.35,
    # The digits are 0.3 to 0.7 of an image.
    box_scales=(0.4, 0.55, 0.7, 0.8, 0.9, 0.95, 1.0),
    reduce_lowest=False,
    epochs=30,
    batch_size=32,
    learning_rate=3e-3,
    weight_decay=0.01,
    zoom_out=1.5,
    photometric=True,
)
