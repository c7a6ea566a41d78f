"""The benchmark's tables and charts."""

from pathlib import Path

import matplotlib.figure
import numpy as np

from .. import files
from ..report.tables import aligned
from .peers import product_side

OURS = "keras_mnv2"
PEERS = ("torchvision", "torchvision-folded", "onnxruntime", "openvino", "litert")
# Heading: key of a row, format. A column that has no cell is left out.
COLUMNS = {
    "contender": ("contender", "{}"),
    "batch": ("batch", "{}"),
    "ms": ("milliseconds", "{:.1f}"),
    "images/s": ("images_per_second", "{:.1f}"),
    "import, s": ("import_seconds", "{:.2f}"),
    "build, s": ("build_seconds", "{:.2f}"),
    "first step, s": ("first_step_seconds", "{:.2f}"),
    "spread": ("spread", "{:.0%}"),
    "aten calls": ("aten_calls", "{}"),
    "MB": ("megabytes", "{:.2f}"),
    "largest difference": ("largest_difference", "{:.1e}"),
    "mean error": ("mean_absolute_error", "{:.1e}"),
    "same top-1": ("top1_agreement", "{:.1%}"),
    **{f"x {name}": (f"x {name}", "{:.2f}") for name in ("unfolded", "keras", *PEERS, "train_on_batch")},
    "of peak": ("fraction_of_peak", "{:.1%}"),
    "MiB": ("peak_memory_mib", "{:.0f}"),
    "GPU MiB": ("device_memory_mib", "{:.0f}"),
    "GPU": ("gpu", "{}"),
    "TF32": ("tf32", "{}"),
}


def compare(rows: list[dict]) -> None:
    """Gives each row its ratios: how many times as fast it is as each reference that was measured.

    The references are keras.applications on the same backend, each other peer in the same mode, for a step inside
    `fit` the same model's `train_on_batch`, and for exported files the model that they come from.
    """
    seconds = {(row["mode"], row["contender"]): row["seconds"] for row in rows}
    for row in rows:
        backend = row["contender"].partition(", ")[2]
        references = {name: (row["mode"], name) for name in PEERS}
        references["keras"] = (row["mode"], f"keras.applications, {backend}")
        if row["mode"] == "fit":
            references["train_on_batch"] = ("training", row["contender"])
        if row["contender"].startswith(f"{OURS} fit"):
            references["train_on_batch"] = (row["mode"], f"{OURS}, {backend}")
        if row["mode"] == "exports":
            references = {"unfolded": (row["mode"], f"{OURS}, {backend}")}
        row["ratios"] = {
            name: seconds[key] / row["seconds"] for name, key in references.items() if seconds.get(key) is not None
        }


def fraction_of_peak(multiply_adds: int, mode: str, images_per_second: float, peak: float | None) -> float | None:
    """Part of the peak (FLOP/s) that the network's multiply-adds reach.

    A multiply-add is two operations, and training computes three times as many as inference: the forward pass and
    the gradients of the inputs and of the weights.
    """
    passes = 3 if mode in ("training", "fit") else 1
    return 2 * passes * multiply_adds * images_per_second / peak if peak else None


def peak_line(flops: float, precision: str, facts: dict) -> str:
    """The peak in words, with the GPU that computed it, and where it computes in TF32."""
    side = product_side(facts["gpu"])
    words = [precision, f"{side}x{side} matrices", *([facts["gpu"]] if facts["gpu"] else [])]
    words += [f"TF32: {facts['tf32']}"] if facts["tf32"] else []
    return f"peak: {flops / 1e9:.0f} GFLOP/s ({', '.join(words)})"


def table(rows: list[dict]) -> str:
    """The rows of one mode as text."""
    if not rows:
        return "nothing was measured"
    flat = [row | {f"x {name}": ratio for name, ratio in row["ratios"].items()} for row in rows]
    columns = []
    for head, (key, form) in COLUMNS.items():
        cells = ["" if row.get(key) is None else form.format(row[key]) for row in flat]
        if any(cells):
            columns.append([head, *cells])
    return aligned([list(line) for line in zip(*columns, strict=True)])


def slope(x: list[float], y: list[float]) -> float | None:
    """Log-log slope over the upper half of the range: 1 where `y` grows linearly; None for fewer than two points."""
    half = len(x) // 2 if len(x) > 3 else 0
    if len(x) < 2:
        return None
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def curves(points: list[dict]) -> list[dict]:
    """The points of each backend and axis ("batch" or "pixels") as one curve, with its slopes."""
    found = []
    for backend, axis in dict.fromkeys((point["backend"], point["axis"]) for point in points):
        chosen = [point for point in points if (point["backend"], point["axis"]) == (backend, axis)]
        curve = {key: [point[key] for point in chosen] for key in (axis, "seconds", "memory_mib")}
        slopes = {f"{key}_slope": slope(curve[axis], curve[key]) for key in ("seconds", "memory_mib")}
        found.append({"backend": backend, "axis": axis, **curve, **slopes})
    return found


def growth_table(points: list[dict]) -> str:
    """Ends and slopes of each curve as text."""
    if not points:
        return "nothing was measured"
    head = ["backend", "against", "from", "to", "ms", "to", "slope", "MiB", "to", "slope"]
    lines = []
    for curve in curves(points):
        line = [curve["backend"], curve["axis"], str(curve[curve["axis"]][0]), str(curve[curve["axis"]][-1])]
        for key, scale in (("seconds", 1000), ("memory_mib", 1)):
            found = curve[f"{key}_slope"]
            line += [f"{scale * curve[key][0]:.1f}", f"{scale * curve[key][-1]:.1f}"]
            line += ["" if found is None else f"{found:.2f}"]
        lines.append(line)
    return aligned([head, *lines])


def draw_bars(rows: list[dict], path: Path) -> None:
    """Draws images per second as bars, seconds for `build`, one panel a mode; nothing where there are no rows."""
    if not rows:
        return
    panels = {
        mode: [row for row in rows if row["mode"] == mode][::-1] for mode in dict.fromkeys(r["mode"] for r in rows)
    }
    heights = [0.9 + 0.3 * len(shown) for shown in panels.values()]
    figure = matplotlib.figure.Figure(figsize=(9, sum(heights)), layout="constrained")
    axes_of = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (mode, shown) in zip(axes_of, panels.items(), strict=True):
        key, unit = ("seconds", "seconds") if mode == "build" else ("images_per_second", "images/s")
        title = "build: import and build of the model" if mode == "build" else f"{mode}, batch {shown[0]['batch']}"
        colours = ["tab:blue" if row["contender"].startswith(OURS) else "tab:gray" for row in shown]
        bars = axes.barh([row["contender"] for row in shown], [row[key] for row in shown], color=colours)
        axes.bar_label(bars, fmt="%.2f" if mode == "build" else "%.0f", padding=3)
        axes.set(title=title, xlabel=unit)
        axes.margins(x=0.1)
    save(figure, path)


def draw_growth(points: list[dict], path: Path) -> None:
    """Draws time and memory against batch and pixels, with logarithmic axes and a line of slope 1."""
    figure = matplotlib.figure.Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    titles = {"seconds": "seconds a call", "memory_mib": "MiB above the memory before the build"}
    for column, axis in zip(panels.T, ("batch", "pixels"), strict=True):
        chosen = [curve for curve in curves(points) if curve["axis"] == axis]
        for axes, key in zip(column, ("seconds", "memory_mib"), strict=True):
            for curve in chosen:
                axes.plot(curve[axis], curve[key], marker="o", label=curve["backend"])
            if chosen:
                x = np.array(chosen[0][axis])
                top = max(curve[key][-1] for curve in chosen)
                axes.plot(x, top * x / x[-1], "--", color="tab:gray", label="slope 1")
                axes.legend()
            axes.set(xlabel=axis if axis == "batch" else "pixels of an image", ylabel=titles[key])
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3, which="both")
    save(figure, path)


def save(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Writes a chart."""
    with files.beside(path) as part:
        figure.savefig(part, format="png", dpi=120)
