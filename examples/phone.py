"""From photographs to a file for phones: a classifier of your classes as LiteRT, in float32 and in 8-bit integers.

    pip install "keras_mnv2[torch,litert]" scikit-learn
    python examples/phone.py photos

`photos` has a folder of photographs for each class; a fifth of them is held out for the test. `phone.tflite` takes and
gives bytes (Android's and iOS's image buffers), `phone_float.tflite` floats of 0..255; `labels.txt` has a class a line.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from sklearn.model_selection import train_test_split

import keras_mnv2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with a folder for each class")
    parser.add_argument("--weights", default="imagenet", help="a name of keras_mnv2.list_weights(), or a file")
    parser.add_argument("--size", type=int, default=224, help="pixels of each side")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--aware-epochs", type=int, default=1, help="with rounding; 0 rounds after the training")
    options = parser.parse_args()

    paths, labels, names = keras_mnv2.class_folders(options.folder)
    paths, test_paths, labels, test_labels = train_test_split(
        paths, labels, test_size=0.2, stratify=labels, random_state=0
    )
    train = keras_mnv2.evaluation_data(paths, labels, size=options.size, normalize=False)
    test = keras_mnv2.evaluation_data(test_paths, test_labels, size=options.size, normalize=False)

    # A new classifier and the last blocks are trained; the batch norms keep ImageNet's statistics.
    shape = (options.size, options.size, 3)
    model = keras_mnv2.MobileNetV2(shape, weights=options.weights, classes=len(names), include_preprocessing=True)
    keras_mnv2.freeze(model, before="block_12")
    model.compile(keras.optimizers.Adam(3e-4), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train, epochs=options.epochs, validation_data=test)
    # Both files are compared with the model on photographs before they get their names.
    sample = test[0][0]
    keras_mnv2.export(model, "phone_float.tflite", "litert", sample=sample, overwrite=True)

    calibration = None
    if options.aware_epochs:
        # The same weights; `fit` goes on with the rounding of 8-bit integers.
        model = keras_mnv2.quantize_aware(model)
        model.compile(keras.optimizers.Adam(3e-5), "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.fit(train, epochs=options.aware_epochs, validation_data=test)
    else:
        # Some photographs give the ranges of the activations.
        calibration = np.concatenate([train[i][0] for i in range(min(len(train), 6))])
    integers = {"precision": "int8", "calibration": calibration, "io_dtype": "uint8"}
    keras_mnv2.export(model, "phone.tflite", "litert", **integers, sample=sample, overwrite=True)
    Path("labels.txt").write_text("\n".join(names) + "\n")

    # What a phone will say: both files in LiteRT's own interpreter.
    for name in ("phone_float.tflite", "phone.tflite"):
        run = keras_mnv2.load_export(name)
        right = sum((run(images)["predictions"].argmax(1) == labels).sum() for images, labels in test)
        size = Path(name).stat().st_size / 1e6
        print(f"{name}: {size:.2f} MB, accuracy {right / len(test_paths):.2%} on {len(test_paths)} photographs")


if __name__ == "__main__":
    main()
