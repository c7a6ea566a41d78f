"""Which of your photographs look alike: embeddings of a pretrained MobileNetV2, and their nearest neighbours.

    python examples/neighbours.py photos

All photographs anywhere below `photos` are taken. `neighbours.png` shows some of them, each with the most similar
others and the cosine similarity; `neighbours.npz` has all embeddings and paths. 120 photographs took 21 seconds of
processor time on PyTorch, the start included.
"""

import argparse
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_mnv2

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--query", type=Path, nargs="*", help="photographs to find neighbours of; by default some")
    parser.add_argument("--neighbours", type=int, default=5)
    parser.add_argument("--weights", default="imagenet", help="a name of keras_mnv2.list_weights(), or a file")
    parser.add_argument("--size", type=int, default=224, help="pixels of each side")
    options = parser.parse_args()

    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        parser.error(f"folder must have at least two photographs, got {len(paths)} in '{options.folder}'")
    queries = options.query or paths[:: -(-len(paths) // 8)]

    # The mean over the image of the last feature map: 1280 numbers say what is on a photograph.
    backbone = keras_mnv2.MobileNetV2(
        (options.size, options.size, 3),
        weights=options.weights,
        include_top=False,
        pooling="avg",
        include_preprocessing=True,
    )
    model = keras_mnv2.fold_batch_norm(backbone)

    def embed(images):
        # Of length 1, so that a product of two is the cosine of their angle.
        data = keras_mnv2.evaluation_data(images, size=options.size, normalize=False)
        return keras.utils.normalize(model.predict(data))

    embeddings = embed(paths)
    np.savez("neighbours.npz", embeddings=embeddings, paths=[str(path) for path in paths])
    similarities = embed(queries) @ embeddings.T

    shape = (len(queries), options.neighbours + 1)
    _, axes = plt.subplots(*shape, figsize=(2 * shape[1], 2.2 * shape[0]), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for query, row, pictures in zip(queries, similarities, axes, strict=True):
        pictures[0].imshow(keras_mnv2.resize_and_crop(query))
        pictures[0].set_title(query.stem[:16], fontsize=8)
        # The photograph itself is the most similar.
        best = [i for i in row.argsort()[::-1] if not paths[i].samefile(query)][: options.neighbours]
        print(f"{query}: {', '.join(f'{paths[i]} {row[i]:.2f}' for i in best)}")
        for axis, i in zip(pictures[1:], best, strict=False):
            axis.imshow(keras_mnv2.resize_and_crop(paths[i]))
            axis.set_title(f"{row[i]:.2f}", fontsize=8)
    plt.savefig("neighbours.png", dpi=100)


if __name__ == "__main__":
    main()
