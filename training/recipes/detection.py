"""Boxes around the objects of your own images, by SSDLite; by default handwritten digits on photographs.

The crops, the canvas and the colours that training images may be changed by are SSD's (Liu et al. 2016, arXiv
1512.02325, sections 2.2 and 3.6). Half of a digit may be another, and so may one in a mirror: they are neither cropped
nor mirrored. For your own objects add `--iou-crop --zoom-out 4 --flip`, and the size and default boxes that fit them.

Command: `python -m training detection`, or `python -m training detection --dataset FOLDER` with a folder of COCO's or
Pascal VOC's layout.
Expected for the digits: mAP 93 to 96 % at IoU 0.5, in 12 minutes on two x86 cores (`docs/detection.md`).
"""

from ..config import Config

CONFIG = Config(
    recipe="detection",
    task="detection",
    dataset="scenes",
    image_size=96,
    alpha=0.35,
    # The digits are 0.4 to 0.7 of an image.
    box_scales=(0.4, 0.55, 0.7, 0.8, 0.9, 0.95, 1.0),
    reduce_lowest=False,
    epochs=12,
    batch_size=16,
    learning_rate=6e-3,
    weight_decay=0.01,
    zoom_out=1.5,
    photometric=True,
)
