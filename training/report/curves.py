"""Where the lines, ticks and labels of a chart over the epochs lie, in percent of its area."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Of a history: the title of a chart, its lines by their keys, and how a value is said.
CHARTS: tuple[tuple[str, dict[str, str], Callable[[float], str]], ...] = (
    ("Loss", {"loss": "training", "val_loss": "validation"}, lambda value: f"{value:.4f}"),
    ("Accuracy", {"accuracy": "training", "val_accuracy": "validation"}, lambda value: f"{value:.2%}"),
    ("Mean IoU", {"mean_iou": "training", "val_mean_iou": "validation"}, lambda value: f"{value:.2%}"),
    ("mAP", {"val_map": "validation", "val_map_50": "validation, IoU 0.5"}, lambda value: f"{value:.2%}"),
    ("Learning rate", {"learning_rate": "at the end of the epoch"}, lambda value: f"{value:.3g}"),
)
# Ticks of a whole axis, about.
TICKS = 5

History = Mapping[str, Sequence[float]]


def charts(phases: Mapping[str, History]) -> list[dict[str, Any]]:
    """The charts of all phases, those of which there are numbers.

    The phases of a training stand side by side, each as wide as the others, however many epochs it has.

    Args:
        phases: by their names, the history of each: `loss`, `accuracy`, `mean_iou`, these with `val_` before them,
            `val_map`, `val_map_50` and `learning_rate`, a number an epoch; what is missing is left out.

    Returns:
        Of each chart `title`, `phases` (`name`, `left`, `width` and `ticks` of the epochs), `ticks` of the values,
        `lines` (`name`, and `paths`: a list of points (x, y) for each unbroken piece), and `points`, what the page's
        script reads: `x`, `epochs` (what each is called), and `lines` with `name`, `y` and `values` (what each is
        called). Positions are in percent, from the left and from the top.
    """
    return [
        _chart(title, names, say, phases)
        for title, names, say in CHARTS
        if any(map(math.isfinite, _values(names, phases)))
    ]


def epochs_of(history: History) -> int:
    """How many epochs a history has."""
    return max(map(len, history.values()), default=0)


def nice_ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Round numbers at even distances, the first at or below `low` and the last at or above `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        # One value alone: between round numbers beside it.
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    rough = (high - low) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _values(names, phases):
    return [value for history in phases.values() for name in names for value in history.get(name, ())]


def _chart(title, names, say, phases):
    finite = list(filter(math.isfinite, _values(names, phases)))
    ticks = nice_ticks(min(finite), max(finite))
    bottom, height = ticks[0], ticks[-1] - ticks[0]
    percent = title in ("Accuracy", "Mean IoU", "mAP")
    lines = {key: {"name": name, "paths": [], "y": [], "values": []} for key, name in names.items()}
    shown, x, epochs = [], [], []
    width = 100 / len(phases)
    for number, (phase, history) in enumerate(phases.items()):
        count, left = epochs_of(history), number * width
        positions = [round(left + width * (i + 0.5) / count, 3) for i in range(count)]
        every = max(1, round(nice_ticks(0, count, 1 + math.ceil(TICKS / len(phases)))[1]))
        marked = [i for i in range(count) if (i + 1) % every == 0]
        shown.append(
            {
                "name": phase,
                "left": left,
                "width": width,
                "ticks": [{"at": positions[i], "label": str(i + 1)} for i in marked],
            }
        )
        x += positions
        epochs += [f"{f'{phase}, ' if len(phases) > 1 else ''}epoch {i + 1}" for i in range(count)]
        for key, line in lines.items():
            values = [*history.get(key, ())]
            values += [math.nan] * (count - len(values))
            heights = [
                round(100 - 100 * (value - bottom) / height, 3) if math.isfinite(value) else None for value in values
            ]
            line["y"] += heights
            line["values"] += [None if y is None else say(value) for y, value in zip(heights, values, strict=True)]
            line["paths"] += _pieces(positions, heights)
    kept = [line for line in lines.values() if line["paths"]]
    return {
        "title": title,
        "phases": shown,
        "ticks": [
            {"at": 100 - 100 * (tick - bottom) / height, "label": f"{100 * tick:g}%" if percent else f"{tick:g}"}
            for tick in ticks
        ],
        "lines": [{"name": line["name"], "paths": line["paths"]} for line in kept],
        "points": {
            "x": x,
            "epochs": epochs,
            "lines": [{name: line[name] for name in ("name", "y", "values")} for line in kept],
        },
    }


def _pieces(positions, heights):
    """The points of a line, in pieces where values are missing between."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(positions, heights, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]
