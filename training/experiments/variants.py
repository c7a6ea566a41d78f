"""Networks that differ in their blocks, trained alike with several seeds; their table and learning curves.

A variant is `keras_mnv2.MobileNetV2` whose blocks are `keras_mnv2.layers.InvertedResidual` with other arguments. With
the paper's choice it computes what `MobileNetV2` does by default.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import keras_mnv2

from ..config import Config
from ..data import sets
from ..data.batches import read_scores
from ..data.inputs import inputs_of
from ..data.sets import Dataset, Subset
from ..recipes import cifar10
from ..report import metrics
from ..report.tables import table
from ..run.optimizers import compile_model
from .options import Trained
from .results import Results

SIDE = 32


@dataclass(frozen=True)
class Variant:
    """What a network has in the place of the paper's choice; the defaults are that.

    Attributes:
        name: in tables and charts.
        expansion: hidden over input channels of each block but the first.
        linear_bottleneck: whether nothing follows the projection, as in `InvertedResidual`.
        shortcut: what the addition connects, as in `InvertedResidual`.
    """

    name: str
    expansion: int = 6
    linear_bottleneck: bool = True
    shortcut: str | None = "bottleneck"

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `MobileNetV2` and `cost_profile`: Table 2 of the paper, for images of 32 pixels."""
        stages = [
            # The recipe has stride 1 in the second stage, which costs four times as much.
            (1 if i == 0 else self.expansion, channels, repeats, 2 if i == 1 else stride)
            for i, (_, channels, repeats, stride) in enumerate(cifar10.CONFIG.stages or ())
        ]
        return {"inverted_residual_setting": stages, "stem_stride": 1}

    def build(self, alpha: float, classes: int, channels: int = 3, dropout: float = 0.2) -> keras.Model:
        """The network with random weights, for images (SIDE, SIDE, channels) of 0..255."""
        block = functools.partial(
            keras_mnv2.layers.InvertedResidual, linear_bottleneck=self.linear_bottleneck, shortcut=self.shortcut
        )
        return keras_mnv2.MobileNetV2(
            (SIDE, SIDE, channels),
            alpha,
            weights=None,
            classes=classes,
            block=block,
            dropout=dropout,
            include_preprocessing=True,
            **self.architecture,
        )

    def cost(self, alpha: float, classes: int, channels: int = 3) -> dict[str, int]:
        """Parameters and multiply-adds of the network."""
        found = keras_mnv2.cost_profile(
            (SIDE, SIDE, channels), classes, alpha=alpha, print_fn=None, **self.architecture
        )
        return {"parameters": found.parameters, "multiply_adds": found.multiply_adds}


def compare(results: Results, variants: Sequence[Variant], options: Trained) -> dict[str, list[dict[str, Any]]]:
    """Trains each variant with each seed, seed by seed, and gives the rows of each, in the order of the seeds."""
    data = functools.cache(lambda: read(options))
    found: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for seed, variant in itertools.product(range(options.seeds), variants):
        row = results.row(f"{variant.name}, seed {seed}", train, variant, data, options, seed)
        print(f"{variant.name}, seed {seed}: {row['accuracy'][-1]:.2%} in {row['seconds']:.0f} s", flush=True)
        found[variant.name].append(row)
    return found


def read(options: Trained) -> Dataset:
    """The data set, with so many of its training images.

    Raises:
        ValueError: where it has fewer.
    """
    found = sets.load(options.dataset, SIDE, options.data_dir, held_out=False)
    count = len(found.train)
    if options.images > count:
        raise ValueError(f"images must be at most the {count} training images of the data set, got {options.images}.")
    if options.batch_size > options.images:
        raise ValueError(f"batch_size must be at most the {options.images} images, got {options.batch_size}.")
    chosen = np.random.default_rng(sets.SPLIT_SEED).permutation(count)[: options.images]
    return dataclasses.replace(found, train=Subset(found.train, np.sort(chosen)))


def settings(options: Trained, seed: int) -> Config:
    """The recipe cifar10 with the options' budget."""
    return dataclasses.replace(
        cifar10.CONFIG,
        dataset=options.dataset,
        data_dir=options.data_dir,
        alpha=options.alpha,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_epochs=min(1.0, options.epochs / 2),
        seed=seed,
    )


def train(variant: Variant, read_data: Callable[[], Dataset], options: Trained, seed: int) -> dict[str, Any]:
    """Trains a network, and tests it after each epoch, which decides nothing.

    Returns:
        `accuracy` and `loss`, a number an epoch, of the test images and of the training; `steps` of an epoch;
        `parameters`, `multiply_adds` and `seconds`.

    Raises:
        ValueError: where the loss is no number any more.
    """
    data, start = read_data(), time.perf_counter()
    config = settings(options, seed)
    keras.utils.set_random_seed(seed)
    inputs = inputs_of(data, config)
    classes, channels = len(data.class_names), inputs.train.image_shape[-1]
    model = variant.build(options.alpha, classes, channels, config.dropout)
    steps = len(inputs.train)
    compile_model(model, config, steps)
    row: dict[str, Any] = {"accuracy": [], "loss": [], "steps": steps, **variant.cost(options.alpha, classes, channels)}
    stream = inputs.train.stream()
    try:
        for epoch in range(options.epochs):
            history = model.fit(
                inputs.train.for_fit(itertools.islice(stream, steps)),
                initial_epoch=epoch,
                epochs=epoch + 1,
                steps_per_epoch=steps,
                shuffle=False,  # Keras warns of a generator that it cannot shuffle.
                verbose=0,
            ).history
            row["loss"] += history["loss"]
            if not np.isfinite(row["loss"][-1]):
                raise ValueError(f"learning_rate must be lower: the loss of {variant.name} is {row['loss'][-1]}.")
            scores, labels = read_scores(lambda images: np.asarray(model.predict_on_batch(images)), inputs.test)
            row["accuracy"].append(metrics.top_k(scores, labels, 1))
    finally:
        stream.close()
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def final(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The accuracy after the last epoch, of each seed."""
    return [row["accuracy"][-1] for row in rows]


def overview(found: dict[str, list[dict[str, Any]]], reference: str) -> str:
    """The table in Markdown: cost and accuracy of each variant, and how it differs from the reference.

    Two variants differ by more than their seeds where all seeds of the one are above all of the other. The difference
    is the mean over networks of the same seed: they see the same images in the same order.
    """
    lines = []
    base = final(found[reference])
    for name, rows in found.items():
        own = final(rows)
        differences = [a - b for a, b in zip(own, base, strict=True)]
        apart = min(own) > max(base) or max(own) < min(base)
        # One seed says nothing of others.
        verdict = "" if name == reference or len(own) == 1 else "yes" if apart else "no"
        lines.append(
            [
                name,
                f"{rows[0]['parameters']:,}",
                f"{rows[0]['multiply_adds'] / 1e6:.2f} M",
                f"{statistics.mean(own):.2%}",
                f"{min(own):.2%} to {max(own):.2%}",
                "" if name == reference else f"{100 * statistics.mean(differences):+.2f}",
                verdict,
            ]
        )
    head = ["", "parameters", "multiply-adds", "accuracy", "over the seeds", "difference", "more than the seeds'"]
    return table(head, lines)


def draw_curves(axes: Any, found: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Accuracy over the steps of the training: a line through the means, a band from the worst to the best seed."""
    for name, rows in found.items():
        values = 100 * np.array([row["accuracy"] for row in rows])
        steps = rows[0]["steps"] * (1 + np.arange(values.shape[1]))
        (line,) = axes.plot(steps, values.mean(axis=0), marker=".", label=name)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel="training steps", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
