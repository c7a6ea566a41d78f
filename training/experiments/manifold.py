"""Figure 1 and appendix A of the paper: what ReLU loses of a spiral in 2, 3, 5, 15 and 30 dimensions, and in blocks.

A spiral in the plane is embedded by a random matrix T, goes through ReLU, and comes back by the pseudo-inverse of T.
By lemma 2 a point is lost where fewer units are active than the input has dimensions, here two: others have the same
image. Theorem 1 gives the share of it that is to be expected over random matrices.
"""

import math
from typing import Any

import matplotlib.figure
import numpy as np

from ..benchmark.charts import save
from ..report.tables import table
from .options import Manifold
from .results import Results, picture

# Figure 1's.
DIMENSIONS = (2, 3, 5, 15, 30)
# Whole turns, so that all directions occur as often.
TURNS = 2
# Channels of the input of some of the network's blocks, and expansion factors around the paper's 6.
CHANNELS = (2, 16, 64)
FACTORS = (1, 2, 3, 6)
# Matrices a time, so that thousands of matrices need no more memory than these.
CHUNK = 50


def spiral(points: int) -> np.ndarray:
    """Points of a spiral around the origin, (points, 2), evenly spaced in angle."""
    angle = 2 * np.pi * TURNS * (np.arange(points) + 1) / points
    return angle[:, None] / angle[-1] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def collapsed_share(inputs: int, units: int) -> float:
    """The share of the inputs of `ReLU(Bx)` that is lost, on average over random matrices B (paper, theorem 1).

    That is the chance that of `units`, each active half of the time, fewer than `inputs` are.
    """
    return sum(math.comb(units, active) for active in range(min(inputs, units + 1))) / 2**units


def project(x: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What comes back of points (points, 2) through ReLU by the pseudo-inverse, and how many units each activates."""
    hidden = x @ matrix.T
    return np.maximum(hidden, 0) @ np.linalg.pinv(matrix).T, (hidden > 0).sum(axis=1)


def curved_share(x: np.ndarray, y: np.ndarray) -> float:
    """The share of the energy of `y` that the best linear map of `x` leaves."""
    fit = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(((y - x @ fit) ** 2).sum() / max((y**2).sum(), np.finfo(float).tiny))


def measure_spiral(n: int, options: Manifold) -> dict[str, Any]:
    """What is lost in `n` dimensions over all matrices, and the number of the matrix that is drawn."""
    x, lost, origin, curved = spiral(options.points), [], [], []
    for i in range(options.matrices):
        y, active = project(x, matrix_of(n, i, options))
        lost.append(float((active < 2).mean()))
        origin.append(float((active == 0).mean()))
        # Where nothing is active anywhere there is no image.
        curved += [curved_share(x, y)] if active.any() else []
    return {
        "lost": float(np.mean(lost)),
        "lost_spread": float(np.std(lost)),
        "origin": float(np.mean(origin)),
        "origin_spread": float(np.std(origin)),
        "curved": float(np.mean(curved)),
        "curved_spread": float(np.std(curved)),
        # A typical one: that whose share is nearest to the mean.
        "drawn": int(np.argmin(np.abs(np.array(lost) - np.mean(lost)))),
    }


def matrix_of(n: int, i: int, options: Manifold) -> np.ndarray:
    """Random matrix number `i` into `n` dimensions, (n, 2)."""
    return np.random.default_rng((options.seed, n, i)).standard_normal((n, 2))


def measure_block(inputs: int, factor: int, options: Manifold) -> dict[str, Any]:
    """The share of random inputs that ReLU loses behind a random expansion of a block."""
    rng, lost = np.random.default_rng((options.seed, inputs, factor, 1)), []
    for start in range(0, options.matrices, CHUNK):
        count = min(CHUNK, options.matrices - start)
        matrices = rng.standard_normal((count, inputs * factor, inputs)).astype("float32")
        x = rng.standard_normal((count, inputs, min(options.points, 100))).astype("float32")
        lost += (((matrices @ x) > 0).sum(axis=1) < inputs).mean(axis=1).tolist()
    return {"lost": float(np.mean(lost)), "lost_spread": float(np.std(lost))}


def run(options: Manifold) -> None:
    """Measures, prints the tables and draws the picture."""
    results = Results("manifold", options)
    spirals = {n: results.row(f"spiral {n}", measure_spiral, n, options) for n in DIMENSIONS}
    blocks = {
        (inputs, factor): results.row(f"block {inputs} {factor}", measure_block, inputs, factor, options)
        for inputs in CHANNELS
        for factor in FACTORS
    }
    results.write_tables(tables(spirals, blocks))
    draw(spirals, options)


def tables(spirals: dict[int, dict], blocks: dict[tuple[int, int], dict]) -> str:
    """The two tables in Markdown."""
    rows = [
        [
            n,
            spread(row, "lost"),
            percent(collapsed_share(2, n)),
            spread(row, "origin"),
            percent(0.5**n),
            spread(row, "curved"),
        ]
        for n, row in spirals.items()
    ]
    head = ["dimensions", "lost points", "theorem 1", "of these at 0", "expected", "not linear"]
    more = [
        [inputs, factor, inputs * factor, spread(row, "lost"), percent(collapsed_share(inputs, inputs * factor))]
        for (inputs, factor), row in blocks.items()
    ]
    return f"{table(head, rows)}\n\n{table(['channels', 'factor', 'units', 'lost inputs', 'theorem 1'], more)}"


def spread(row: dict, key: str) -> str:
    """Mean and standard deviation over the matrices."""
    return f"{percent(row[key])} ± {percent(row[f'{key}_spread'])}" if row[key] else "none"


def percent(share: float) -> str:
    """A share in percent, with two digits where it is small."""
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def draw(spirals: dict[int, dict], options: Manifold) -> None:
    """The row of pictures: the spiral, and what comes back; lost points are black."""
    figure = matplotlib.figure.Figure(figsize=(12, 2.5), layout="constrained")
    panels = figure.subplots(1, 1 + len(spirals))
    x = spiral(options.points)
    shown = [("input", x, np.full(len(x), 2))]
    shown += [(f"n = {n}", *project(x, matrix_of(n, row["drawn"], options))) for n, row in spirals.items()]
    for axes, (title, y, active) in zip(panels, shown, strict=True):
        kept = active >= 2
        axes.scatter(*y[kept].T, s=5, c=np.arange(len(y))[kept], cmap="rainbow", vmin=0, vmax=len(y), linewidths=0)
        axes.scatter(*y[~kept].T, s=5, c="black", linewidths=0)
        axes.set(title=title, xticks=[], yticks=[], box_aspect=1)
        axes.margins(0.1)
        axes.set_aspect("equal", adjustable="datalim")
    save(figure, picture(options.out, "manifold"))
