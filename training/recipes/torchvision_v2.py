"""ImageNet from scratch as torchvision trained its second checkpoint (its "new recipe with reg tuning").

SGD with momentum 0.9, 0.5 after five epochs of warm-up and then a cosine, 600 epochs of 1024 images a step at 176
pixels, TrivialAugment, erased rectangles (0.1), mixup (0.2) or cutmix (1.0), label smoothing 0.1, weight decay 2e-5
without norms, and an average of the weights; validated at 224 of 232 pixels. torchvision averages every 32 steps, with
the fraction (1 - 0.99998) * 8 workers * 128 images * 32 / 600 epochs; a step has then 3.4e-5, hence 0.999966. Its
repeated augmentation is left out, and the statistics of the batch norms are not averaged beyond their own momentum.

Command: `python -m training torchvision_v2 --dataset imagenet2012 --data-dir DIR`.
Expected: 72.154 % top-1 (torchvision's IMAGENET1K_V2). Not measured here: ImageNet needs days on several GPUs.
"""

from ..config import Config

CONFIG = Config(
    recipe="torchvision_v2",
    dataset="imagenet2012",
    image_size=176,
    evaluation_size=224,
    resize=232,
    epochs=600,
    batch_size=1024,
    optimizer="sgd",
    learning_rate=0.5,
    schedule="cosine",
    warmup_epochs=5,
    weight_decay=2e-5,
    label_smoothing=0.1,
    ema=0.999966,
    crop_area=0.08,
    flip=True,
    trivial_augment=True,
    mixup=0.2,
    cutmix=1.0,
    erase=0.1,
    held_out=False,
)
