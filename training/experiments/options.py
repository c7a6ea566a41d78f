"""The settings of each experiment. Neither Keras nor a chart is needed to read and check them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ranges import Amount, Batch, Count, Positive, Seed, check_all


@dataclass(frozen=True)
class Options:
    """What every experiment is told.

    Raises:
        ValueError: on a setting that is not allowed; it names the setting, its value and what is allowed.
    """

    out: Path
    """Folder for results.json, which is written after each measurement, the tables as table.md, and the picture. A run
    that was interrupted goes on in its folder."""

    def __post_init__(self):
        check_all(self)

    def fixed(self) -> dict[str, Any]:
        """What a run that goes on must have as before: all that a measurement depends on.

        A training depends on its own seed, so a run may go on with more seeds.
        """
        free = ("out", "data_dir", "seeds")
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name not in free}


@dataclass(frozen=True)
class Manifold(Options):
    """Figure 1 and theorem 1: what ReLU loses of a spiral that a random matrix puts into more dimensions."""

    matrices: Count = 1000
    """Random matrices."""
    points: Count = 1000
    """Points of the spiral, and random inputs of a block."""
    seed: Seed = 0
    """Of the matrices."""


@dataclass(frozen=True)
class Cost(Options):
    """Tables 1 to 4, figure 5 and section 5.1: what networks and blocks cost, beside what is published."""

    batch: Batch = 1
    """Images a call of a block; by default one, as in table 4."""
    rounds: Count = 7
    """How often each block is measured, in turn with the others."""
    seconds: Amount = 0.3
    """Of each measurement; at least three calls are made."""
    threads: Count = 1
    """Threads of PyTorch and TensorFlow: by default one, as table 4 is of one core. JAX has no such setting."""


@dataclass(frozen=True)
class Trained(Options):
    """What the experiments that train networks are told.

    The defaults take two quiet cores about 20 minutes.
    """

    dataset: str = "cifar10"
    """As for `python -m training`: `digits`, a folder of class folders, a `.npz` file, or a data set of TFDS."""
    data_dir: Path | None = None
    """Where TFDS keeps its data sets; by default ~/tensorflow_datasets."""
    epochs: Count = 10
    """Passes over the training images."""
    images: Count = 10000
    """Training images, the same for each network. All test images are tested on."""
    seeds: Count = 3
    """Trainings of each network, with the seeds 0, 1, ... of its weights, the order and the changes of the images."""
    alpha: Positive = 0.35
    """Width multiplier."""
    batch_size: Batch = 64
    """Images a step."""
    learning_rate: Positive = 0.05
    """Peak of the learning rate, after one epoch of warm-up; it falls to 0 as a cosine."""


@dataclass(frozen=True)
class Expansion(Trained):
    """Section 4: networks with the expansion factors 1, 3, 6 and 9."""


@dataclass(frozen=True)
class Ablation(Trained):
    """Figure 6: a ReLU6 in the bottleneck, and shortcuts elsewhere or nowhere."""


EXPERIMENTS: dict[str, type[Options]] = {
    "manifold": Manifold,
    "cost": Cost,
    "expansion": Expansion,
    "ablation": Ablation,
}
