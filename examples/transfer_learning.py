"""Transfer learning on your photographs: a new classifier on a pretrained MobileNetV2, then fine-tuning.

    python examples/transfer_learning.py photos

`photos` has a folder of photographs for each class; a fifth of them is held out for validation. `photos.keras` is the
model, which takes pixels of 0..255, and `photos.txt` has a class a line.
"""

import argparse
from pathlib import Path

import keras
from sklearn.model_selection import train_test_split

import keras_mnv2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with a folder for each class")
    parser.add_argument("--weights", default="imagenet", help="a name of keras_mnv2.list_weights(), or a file")
    parser.add_argument("--size", type=int, default=224, help="pixels of each side")
    parser.add_argument("--head-epochs", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3, help="of the fine-tuning")
    parser.add_argument("--out", type=Path, default="photos.keras")
    options = parser.parse_args()

    # `train_test_split` shuffles too: a folder is read class by class.
    paths, labels, names = keras_mnv2.class_folders(options.folder)
    paths, held_out, labels, held_out_labels = train_test_split(
        paths, labels, test_size=0.2, stratify=labels, random_state=0
    )
    # The model scales the pixels itself, as its weights need it: `include_preprocessing`.
    train = keras_mnv2.evaluation_data(paths, labels, size=options.size, normalize=False)
    validation = keras_mnv2.evaluation_data(held_out, held_out_labels, size=options.size, normalize=False)

    # Phase one: the network is frozen, so its features are computed once, and a classifier is trained on them.
    backbone = keras_mnv2.MobileNetV2(
        (options.size, options.size, 3),
        weights=options.weights,
        include_top=False,
        pooling="avg",
        include_preprocessing=True,
    )
    fast = keras_mnv2.fold_batch_norm(backbone)
    head = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(len(names), activation="softmax")])
    head.compile(
        keras.optimizers.AdamW(1e-3, weight_decay=0.5), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    head.fit(
        fast.predict(train),
        train.labels,
        epochs=options.head_epochs,
        validation_data=(fast.predict(validation), validation.labels),
    )

    # Phase two: the last blocks at a low rate. The batch norms stay frozen and keep ImageNet's statistics.
    model = keras.Model(backbone.input, head(backbone.output))
    keras_mnv2.freeze(model, before="block_12")
    model.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train, epochs=options.epochs, validation_data=validation)

    model.save(options.out)
    options.out.with_suffix(".txt").write_text("\n".join(names) + "\n")
    print(f"{options.out} is the model; load it after `import keras_mnv2`.")


if __name__ == "__main__":
    main()
