"""A U-Net on MobileNetV2's named layers, as with `keras.applications`: it marks digits on photographs.

    python examples/unet.py

Handwritten digits of scikit-learn lie on photographs of scikit-image; the test has other digits and photographs. It
prints the test's mean IoU, and writes `unet.png`, with images, masks and predictions, and the model `unet.keras`.
"""

import argparse

import keras
import numpy as np
from PIL import Image
from skimage import data, transform
from sklearn.datasets import load_digits

import keras_mnv2

SKIPS = ("block_13_expand_relu", "block_6_expand_relu", "block_3_expand_relu", "block_1_expand_relu")


def scenes(photographs, digits, count, size, rng):
    """Images (count, size, size, 3) of 0..255 with three digits each, and masks (count, size, size), 1 for a digit."""
    images, masks = np.empty((count, size, size, 3), "float32"), np.zeros((count, size, size), "int32")
    for image, mask in zip(images, masks, strict=True):
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(side - size + 1) for side in photograph.shape[:2])
        image[:] = photograph[top : top + size, left : left + size, :3]
        for _ in range(3):
            side = rng.integers(size // 4, size // 2)
            ink = transform.resize(digits[rng.integers(len(digits))] / 16, (side, side))
            top, left = rng.integers(size - side, size=2)
            patch = np.s_[top : top + side, left : left + side]
            image[patch] += ink[..., None] * (rng.uniform(0, 255, 3) - image[patch])
            mask[patch] |= ink > 0.5
    return images, masks


def unet(size, weights):
    """Logits (batch, size, size, 2); the encoder is frozen."""
    backbone = keras_mnv2.MobileNetV2((size, size, 3), weights=weights, include_top=False, include_preprocessing=True)
    keras_mnv2.freeze(backbone)
    x = backbone.get_layer("block_16_project").output
    for name, filters in zip(SKIPS, (128, 64, 32, 16), strict=True):
        x = keras.layers.Conv2DTranspose(filters, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
        x = keras.layers.Concatenate()([x, backbone.get_layer(name).output])
    return keras.Model(backbone.input, keras.layers.Conv2DTranspose(2, 3, strides=2, padding="same")(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="imagenet", help="a name of keras_mnv2.list_weights(), or a file")
    parser.add_argument("--size", type=int, default=96, help="pixels of each side, a multiple of 32")
    parser.add_argument("--images", type=int, default=400, help="for training; a quarter as many are the test")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    rng, digits = np.random.default_rng(0), load_digits().images
    train = scenes([data.astronaut(), data.rocket(), data.retina()], digits[:1400], options.images, options.size, rng)
    images, masks = scenes([data.coffee(), data.chelsea()], digits[1400:], options.images // 4, options.size, rng)

    model = unet(options.size, options.weights)
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*train, batch_size=8, epochs=options.epochs, validation_data=(images, masks))

    predicted = model.predict(images).argmax(-1)
    iou = keras.metrics.MeanIoU(num_classes=2)
    iou.update_state(masks, predicted)
    print(f"mean IoU on {len(images)} test images: {float(iou.result()):.3f}")
    model.save("unet.keras")
    # A row for each image: image, mask, prediction.
    columns = images, *(np.repeat(255 * marked[..., None], 3, -1) for marked in (masks, predicted))
    sheet = np.concatenate([np.concatenate(column[:6]) for column in columns], axis=1)
    Image.fromarray(sheet.astype("uint8")).save("unet.png")


if __name__ == "__main__":
    main()
