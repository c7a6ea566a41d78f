"""`python -m tests.eight_bits --images FOLDER --weights FILE --out FOLDER`: what eight bits cost on photographs.

A backbone gets a classifier and is fine-tuned in float once. From each backend the same model leaves as LiteRT and
ONNX: in float32, in integers after training, and in integers after quantisation-aware training. The files run in their
own runtimes. `FOLDER` has `train`, `validation` and `test`, each with a folder for each class. Finished steps stay in
`OUT/results.json`; another run goes on with the others.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.pages import replace_between

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
TRAINED_ON = "tensorflow"
SPLITS = ("validation", "test")
FILES = {"LiteRT": ("litert", ".tflite"), "ONNX": ("onnx", ".onnx")}
KINDS = {
    "float32": "float32",
    "int8": "int8, after training",
    "aware": "int8, quantisation-aware",
}
BEGIN, END = "<!-- eight bits: begin -->", "<!-- eight bits: end -->"
# Photographs that give the ranges of the activations.
CALIBRATION = 300


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.eight_bits", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of train, validation and test")
    parser.add_argument("--weights", required=True, help="of the backbone: a published name or a file")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, files and results")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table is replaced")
    parser.add_argument("--size", type=int, default=224, help="pixels of each side")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning in float, at 1e-4")
    parser.add_argument("--quantize-epochs", type=int, default=1, help="of quantisation-aware training, at 3e-5")
    parser.add_argument("--first", type=int, help="only so many photographs of each split, for a trial")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        print(json.dumps(_STEPS[options.step[0]](options, options.step[1])))
        return 0
    file = options.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("out", "page", "step")}
    if results.setdefault("settings", settings) != settings:
        parser.error(f"out must be new or of a run with the same settings, got one with {results['settings']}")
    steps = [("head", TRAINED_ON), ("train", TRAINED_ON)]
    steps += [(step, backend) for backend in BACKENDS for step in ("convert", "aware")]
    for step, backend in steps:
        if f"{step} {backend}" in results:
            continue
        print(f"== {step} {backend}", flush=True)
        command = [sys.executable, "-m", "tests.eight_bits", *sys.argv[1:], "--step", step, backend]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        results[f"{step} {backend}"] = json.loads(done.stdout.splitlines()[-1])
        file.write_text(json.dumps(results, indent=1))
    text = table(results)
    print(text)
    (options.out / "table.md").write_text(text)
    if options.page is not None:
        try:
            replace_between(options.page, BEGIN, END, text)
        except ValueError as error:
            parser.error(str(error))
    return 0


def photographs(options: Any, split: str) -> tuple[Any, Any]:
    """Pixels (number, height, width, 3) as bytes, decoded once, and labels; of training ones a margin to crop."""
    import numpy as np

    import keras_mnv2

    side = options.size * 8 // 7 if split == "train" else options.size
    paths, labels, _ = keras_mnv2.class_folders(options.images / split)
    chosen = np.random.default_rng(0).permutation(len(paths))[: options.first]
    file = options.out / f"{split}_{side}_{len(chosen)}.npy"
    if not file.exists():
        how = keras_mnv2.Preprocessing.for_evaluation(side, options.weights)
        pixels = [keras_mnv2.resize_and_crop(paths[i], how) for i in chosen]
        np.save(file.with_suffix(".part.npy"), np.stack(pixels))
        file.with_suffix(".part.npy").rename(file)
    return np.load(file, mmap_mode="r"), np.asarray(labels)[chosen]


def _centre(options: Any, pixels: Any) -> Any:
    """Training photographs without the margin."""
    edge = (pixels.shape[1] - options.size) // 2
    return pixels[:, edge : edge + options.size, edge : edge + options.size]


def _changed(options: Any, seed: int) -> Any:
    """The training photographs in random order, cropped and flipped at random: the same on each backend."""
    import keras
    import numpy as np

    class Changed(keras.utils.PyDataset):
        def __init__(self) -> None:
            super().__init__(workers=2)
            self.pixels, self.labels = photographs(options, "train")
            self.epoch = 0

        def __len__(self) -> int:
            return len(self.labels) // 32 or 1

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            order = np.random.default_rng((seed, self.epoch)).permutation(len(self.labels))
            rng = np.random.default_rng((seed, self.epoch, index))
            chosen = order[index * 32 : (index + 1) * 32]
            images = []
            for i in chosen:
                top, left = rng.integers(0, self.pixels.shape[1] - options.size + 1, 2)
                image = self.pixels[i, top : top + options.size, left : left + options.size]
                images.append(image[:, ::-1] if rng.random() < 0.5 else image)
            return np.stack(images).astype("float32"), self.labels[chosen]

        def on_epoch_end(self) -> None:
            self.epoch += 1

    return Changed()


def _fit(options: Any, model: Any, rate: float, epochs: int, seed: int) -> None:
    import keras

    data = _changed(options, seed)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(data))
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(data, epochs=epochs, shuffle=False, verbose=2)


def head(options: Any, backend: str) -> dict[str, Any]:
    """A classifier on the backbone's features."""
    import keras

    import keras_mnv2

    keras.utils.set_random_seed(0)
    shape = (options.size, options.size, 3)
    backbone = keras_mnv2.MobileNetV2(
        shape, weights=options.weights, include_top=False, pooling="avg", include_preprocessing=True
    )
    pixels, labels = photographs(options, "train")
    features = keras_mnv2.fold_batch_norm(backbone).predict(_centre(options, pixels), verbose=0)
    dropout = keras.layers.Dropout(0.5, seed=0)
    dense = keras.layers.Dense(int(labels.max()) + 1, activation="softmax", name="predictions")
    top = keras.Sequential([dropout, dense])
    top.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.5), "sparse_categorical_crossentropy")
    top.fit(features, labels, epochs=50, verbose=0)
    model = keras.Model(backbone.input, dense(dropout(backbone.output)))
    model.save(options.out / "head.keras")
    return {"head": _accuracies(options, lambda x: model.predict(x, verbose=0))}


def train(options: Any, backend: str) -> dict[str, Any]:
    """All layers in float; the batch norms keep their statistics."""
    import keras

    import keras_mnv2

    model = keras.models.load_model(options.out / "head.keras", compile=False)
    keras_mnv2.freeze(model, before="stem", verbose=False)
    _fit(options, model, 1e-4, options.epochs, seed=1)
    model.save(options.out / "float.keras")
    return {"float": _accuracies(options, lambda x: model.predict(x, verbose=0))}


def convert(options: Any, backend: str) -> dict[str, Any]:
    """The files in float32, and in integers after training."""
    import keras

    import keras_mnv2  # noqa: F401  # Keras finds the classes of the file by it.

    model = keras.models.load_model(options.out / "float.keras", compile=False)
    pixels, _ = photographs(options, "train")
    calibration = _centre(options, pixels[:CALIBRATION]).astype("float32")
    found = _exported(options, model, backend, "float32")
    return found | _exported(options, model, backend, "int8", calibration=calibration)


def aware(options: Any, backend: str) -> dict[str, Any]:
    """The files after quantisation-aware training on this backend."""
    import keras

    import keras_mnv2

    model = keras_mnv2.quantize_aware(keras.models.load_model(options.out / "float.keras", compile=False))
    _fit(options, model, 3e-5, options.quantize_epochs, seed=2)
    model.save(options.out / f"aware_{backend}.keras")
    return _exported(options, model, backend, "aware")


def _exported(options: Any, model: Any, backend: str, kind: str, **arguments: Any) -> dict[str, Any]:
    """The accuracies of the model's files."""
    import keras_mnv2

    found = {}
    for name, (format, suffix) in FILES.items():
        path = options.out / f"{backend}_{kind}{suffix}"
        precision = "float32" if kind == "float32" else "int8"
        sample = photographs(options, "validation")[0][:64].astype("float32")
        keras_mnv2.export(
            model, path, format, precision=precision, sample=sample, overwrite=True, verbose=False, **arguments
        )
        run = keras_mnv2.load_export(path)
        found[f"{name} {kind}"] = _accuracies(options, lambda x, run=run: next(iter(run(x).values())))
        print(path.name, found[f"{name} {kind}"], file=sys.stderr, flush=True)
    return found


def _accuracies(options: Any, run: Any) -> dict[str, float]:
    """The share of each split's photographs whose largest score is of the right class."""
    import numpy as np

    found = {}
    for split in SPLITS:
        pixels, labels = photographs(options, split)
        scores = np.concatenate([run(pixels[i : i + 32].astype("float32")) for i in range(0, len(pixels), 32)])
        found[split] = float((scores.argmax(1) == labels).mean())
    return found


_STEPS = {"head": head, "train": train, "convert": convert, "aware": aware}


def table(results: dict[str, Any]) -> str:
    """Accuracies on test and validation as Markdown: a row for each kind of file, a column for where it comes from."""

    def cell(found: dict[str, float] | None) -> str:
        return "" if found is None else f"{100 * found['test']:.2f} / {100 * found['validation']:.2f} %"

    lines = [f"| file from | {' | '.join(BACKENDS.values())} |", f"|---|{'---|' * len(BACKENDS)}"]
    base = cell(results[f"train {TRAINED_ON}"]["float"])
    lines.append(f"| (the model in float) | {' | '.join([base] * len(BACKENDS))} |")
    for kind, words in KINDS.items():
        steps = [f"{'aware' if kind == 'aware' else 'convert'} {backend}" for backend in BACKENDS]
        for name in FILES:
            cells = [cell(results.get(step, {}).get(f"{name} {kind}")) for step in steps]
            lines.append(f"| {name} {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
