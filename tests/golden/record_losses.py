"""The losses of 20 steps of each recipe: `KERAS_BACKEND=tensorflow python -m tests.golden.record_losses`.

The network has three stages, and learns at a hundredth of the recipe's rate, at most 0.001. At full depth and the
recipe's own rate the training is chaotic: rounding grows by a factor of 10 to 100 a step, in float64 too, and 20 steps
compare nothing.
"""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np

from training.config import Config
from training.data.batches import training_batches
from training.data.sets import ArraySplit
from training.recipes import cifar10, digits, paper, torchvision, torchvision_v2
from training.recipes import transfer as transfer_recipe
from training.run import optimizers, train, transfer

PATH = Path(__file__).parent / "losses.json"
STEPS = 20
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2))
RECIPES = {
    module.CONFIG.recipe: module.CONFIG
    for module in (digits, cifar10, paper, torchvision, torchvision_v2, transfer_recipe)
}


def losses(config: Config, trained: bool = True) -> list[float]:
    """The loss of each step, from weights and an order that depend on the seed alone.

    Images are not changed at random and there is no dropout: their random numbers are each backend's own.
    """
    keras.utils.set_random_seed(config.seed)
    # Frozen batch norms are not chaotic.
    rate = config.learning_rate if config.unfreeze_from else min(config.learning_rate / 100, 1e-3)
    config = dataclasses.replace(
        config,
        learning_rate=rate if trained else 0.0,
        warmup_epochs=min(config.warmup_epochs, 0.5),
        image_size=32,
        alpha=0.35,
        stages=STAGES,
        weights=None,
        batch_size=32,
        dropout=0.0,
        shift=0.0,
        pad=0,
        crop_area=None,
        flip=False,
        trivial_augment=False,
        mixup=0.0,
        cutmix=0.0,
        erase=0.0,
        unfreeze_from=config.unfreeze_from and "block_1",
    )
    model = train.build_model(config, 10, 3, 32)
    batches = training_batches(blocks(), 10, config)
    if config.unfreeze_from:
        for _ in range(30):
            model(batches[0][0], training=True)  # Gives the batch norms statistics to keep.
        transfer.freeze(model, config.unfreeze_from)
    optimizers.compile_model(model, config, len(batches))
    stream = batches.stream()
    found = []
    for _ in range(STEPS):
        model.reset_metrics()  # Otherwise the loss is the mean of all steps.
        found.append(model.train_on_batch(*next(stream), return_dict=True)["loss"])
    stream.close()
    return found


def blocks() -> ArraySplit:
    """Ten patterns of coarse blocks under noise."""
    rng = np.random.default_rng(0)
    patterns, labels = rng.uniform(0, 128, (10, 8, 8, 3)), rng.integers(0, 10, 640)
    images = np.kron(patterns[labels], np.ones((1, 4, 4, 1))) + rng.uniform(0, 128, (640, 32, 32, 3))
    return ArraySplit(images.astype("float32"), labels)


if __name__ == "__main__":
    found = {
        name: {key: [round(loss, 6) for loss in losses(config, key == "trained")] for key in ("trained", "untrained")}
        for name, config in RECIPES.items()
    }
    PATH.write_text(json.dumps(found) + "\n")
