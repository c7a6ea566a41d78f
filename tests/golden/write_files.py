"""Files of version 0.1.0 for `tests/library/test_earlier_files.py`: `python -m tests.golden.write_files` writes them.

Run on commit 9d36b24, where a block was one layer by default; later `block=InvertedResidual` gives those layers.
"""

import zipfile
from pathlib import Path

import keras
import numpy as np

import keras_mnv2

FOLDER = Path(__file__).parent / "files"
# Blocks with and without expansion, stride 2 and a shortcut.
SETTING = [(1, 8, 1, 1), (2, 8, 2, 2)]


def images():
    """A small batch (2, 32, 32, 3)."""
    return np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype("float32")


def build(**arguments):
    """A small model whose weights are multiples of 1/8, so that a file of them can be packed."""
    keras.utils.set_random_seed(0)
    common = {"weights": None, "inverted_residual_setting": SETTING, "alpha": 0.25}
    model = keras_mnv2.MobileNetV2((32, 32, 3), **{**common, **arguments})
    rng = np.random.default_rng(0)
    for weight in model.weights:
        low = 1 if "variance" in weight.name else -8
        weight.assign(rng.integers(low, 9, weight.shape) / 8)
    return model


def pack(path):
    """Compresses the parts of a `.keras` file, which Keras only stores."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def main():
    """Writes the files and what their models compute."""
    FOLDER.mkdir(exist_ok=True)
    whole = build(classes=3)
    backbone = build(include_top=False, features=["block_1", "block_2_expand"])
    models = {
        "whole.keras": whole,
        "folded.keras": keras_mnv2.fold_batch_norm(whole),
        "quantised.keras": keras_mnv2.quantize_aware(whole),
        "features.keras": backbone,
        # HDF5 takes 2 KB for each group of variables.
        "features.weights.h5": build(include_top=False, features=["block_0"]),
    }
    expected = {}
    for name, model in models.items():
        path = FOLDER / name
        model.save_weights(path) if name.endswith(".weights.h5") else model.save(path)
        if path.suffix == ".keras":
            pack(path)
        outputs = model.predict(images(), verbose=0)
        outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
        expected |= {f"{name}/{output}": value.astype("float32") for output, value in outputs.items()}
    np.savez_compressed(FOLDER / "expected.npz", **expected)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name} {path.stat().st_size / 1024:.1f} KB")


if __name__ == "__main__":
    main()
