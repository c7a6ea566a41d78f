"""Tables 1 to 4, figure 5 and section 5.1 of the paper: what networks and blocks cost, beside what is published.

Parameters, multiply-adds and memory are those of `keras_mnv2.cost_profile`, accuracies those that the publishers of the
weights give: no network is trained here. Blocks are measured: MobileNetV2's, MobileNetV1's and ResNet's bottleneck,
with equally many channels between blocks.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import keras
import matplotlib.figure
import numpy as np

import keras_mnv2

from ..benchmark import frameworks
from ..benchmark.charts import save
from ..report.tables import table
from .options import Cost
from .results import Results, picture

# Million multiply-adds and parameters of the 22 checkpoints by width and resolution, as printed in
# tensorflow/models, research/slim/nets/mobilenet/README.md.
PRINTED = {
    (1.4, 224): (582, 6.06),
    (1.3, 224): (509, 5.34),
    (1.0, 224): (300, 3.47),
    (1.0, 192): (221, 3.47),
    (1.0, 160): (154, 3.47),
    (1.0, 128): (99, 3.47),
    (1.0, 96): (56, 3.47),
    (0.75, 224): (209, 2.61),
    (0.75, 192): (153, 2.61),
    (0.75, 160): (107, 2.61),
    (0.75, 128): (69, 2.61),
    (0.75, 96): (39, 2.61),
    (0.5, 224): (97, 1.95),
    (0.5, 192): (71, 1.95),
    (0.5, 160): (50, 1.95),
    (0.5, 128): (32, 1.95),
    (0.5, 96): (18, 1.95),
    (0.35, 224): (59, 1.66),
    (0.35, 192): (43, 1.66),
    (0.35, 160): (30, 1.66),
    (0.35, 128): (20, 1.66),
    (0.35, 96): (11, 1.66),
}
# Table 4 of the paper: top-1 accuracy in percent, million parameters, million multiply-adds.
TABLE_4 = {
    "MobileNetV1": (70.6, 4.2, 575),
    "ShuffleNet (1.5)": (71.5, 3.4, 292),
    "ShuffleNet (x2)": (73.7, 5.4, 524),
    "NasNet-A": (74.0, 5.3, 564),
    "MobileNetV2": (72.0, 3.4, 300),
    "MobileNetV2 (1.4)": (74.7, 6.9, 585),
}
OURS = {"MobileNetV2": 1.0, "MobileNetV2 (1.4)": 1.4}
# Table 3 of the paper: the most channels at a resolution, and their kilobytes in 16 bits: MobileNetV1, MobileNetV2,
# ShuffleNet (2x, g=3). Its first row is "1/O(1)" for all three in another version of the paper.
TABLE_3 = {
    112: ("64/1600", "16/400", "32/800"),
    56: ("128/800", "32/200", "48/300"),
    28: ("256/400", "64/100", "400/600"),
    14: ("512/200", "160/62", "800/310"),
    7: ("1024/199", "320/32", "1600/156"),
    1: ("1024/2", "1280/2", "1600/3"),
}
# Million multiply-adds and top-1 accuracy of MobileNetV1 (Howard et al. 2017, tables 6 and 7).
MOBILENET_V1 = ((569, 70.6), (418, 69.1), (325, 68.4), (290, 67.2), (186, 64.4), (149, 63.7), (41, 50.6))
# Parts into which the inner tensor of a block is split (section 5.1); the paper finds 2 to 5 the most helpful.
PARTS = (1, 2, 3, 5)
# As the paper counts activations.
BYTES = 2
SEPARABLE, BOTTLENECK, INVERTED = "MobileNetV1 (separable)", "ResNet (bottleneck)", "MobileNetV2 (inverted)"
# Of He et al. 2016: its inner convolution has a quarter of the channels.
REDUCTION = 4
EXPANSION = 6


def profile(alpha: float, size: int) -> keras_mnv2.CostProfile:
    """What a network of 1000 classes costs."""
    return keras_mnv2.cost_profile((size, size, 3), alpha=alpha, print_fn=None)


def split_memory(found: keras_mnv2.CostProfile, parts: int) -> int:
    """Peak bytes where each block is one operation, whose inner tensors exist in so many parts (paper, section 5.1)."""
    return max(
        row.memory + found.bytes_per_value * (row.activations - int(np.prod(row.output_shape))) // parts
        for row in found.rows
    )


def residual_shapes() -> list[tuple[int, int]]:
    """(side, channels) of the network's blocks with a shortcut, each once."""
    rows = [row for row in profile(1.0, 224).rows if row.name.startswith("block")]
    return list(
        dict.fromkeys((row.input_shape[0], row.input_shape[2]) for row in rows if row.input_shape == row.output_shape)
    )


def convolutions(kind: str, channels: int) -> list[tuple[int, int]]:
    """(weights, output channels) of each convolution of a block with equally many channels before and behind it."""
    if kind == SEPARABLE:
        return [(9 * channels, channels), (channels**2, channels)]
    if kind == BOTTLENECK:
        inner = channels // REDUCTION
        return [(channels * inner, inner), (9 * inner**2, inner), (inner * channels, channels)]
    inner = EXPANSION * channels
    return [(channels * inner, inner), (9 * inner, inner), (inner * channels, channels)]


def block_cost(kind: str, side: int, channels: int) -> dict[str, int]:
    """Parameters with batch norms, multiply-adds, and bytes: operation by operation, and as one operation.

    Operation by operation the input of a block with a shortcut stays until the end. As one operation an inverted
    residual needs its input and output alone, since each inner channel can be computed for itself (section 5.1). The
    inner convolution of ResNet's bottleneck reads all channels, so this does not hold for it.
    """
    convs = convolutions(kind, channels)
    outputs = [out for _, out in convs]
    kept = [0] + [0 if kind == SEPARABLE else channels] * (len(convs) - 1)
    inputs = [channels, *outputs[:-1]]
    widest = max(a + b + c for a, b, c in zip(inputs, outputs, kept, strict=True))
    return {
        "parameters": sum(weights + 2 * out for weights, out in convs),
        "multiply_adds": side**2 * sum(weights for weights, _ in convs),
        "memory": BYTES * side**2 * widest,
        "memory_as_one": BYTES * side**2 * (2 * channels if kind == INVERTED else widest),
    }


def build_block(kind: str, side: int, channels: int) -> keras.Model:
    """A block as a model, for inference: without batch norms of its own, which are folded."""
    layers = keras_mnv2.layers
    x = image = keras.Input((side, side, channels))
    if kind == INVERTED:
        x = layers.InvertedResidual(channels, expand_ratio=EXPANSION)(x)
    elif kind == SEPARABLE:
        x = layers.ConvNormActivation(channels, groups=channels)(x)
        x = layers.ConvNormActivation(channels, kernel_size=1)(x)
    else:
        inner = channels // REDUCTION
        x = layers.ConvNormActivation(inner, kernel_size=1, activation="relu")(x)
        x = layers.ConvNormActivation(inner, activation="relu")(x)
        x = layers.ConvNormActivation(channels, kernel_size=1, activation=None)(x)
        x = keras.layers.ReLU()(keras.layers.Add()([image, x]))
    return keras_mnv2.fold_batch_norm(keras.Model(image, x))


def measure(side: int, channels: int, options: Cost) -> dict[str, Any]:
    """Milliseconds of the fastest call of each block in each round; the blocks are measured in turn.

    Other work on the machine makes calls slower, and none faster.
    """
    backend = keras.backend.backend()
    images = np.random.default_rng(0).standard_normal((options.batch, side, side, channels)).astype("float32")
    x = frameworks.on_device(backend, images)
    calls = {
        kind: frameworks.forward(backend, build_block(kind, side, channels))
        for kind in (SEPARABLE, BOTTLENECK, INVERTED)
    }
    found: dict[str, Any] = {kind: [] for kind in calls}
    for call in calls.values():
        call(x)
    for _ in range(options.rounds):
        for kind, call in calls.items():
            found[kind].append(1000 * fastest(functools.partial(call, x), options.seconds))
    return {**found, "gpu": frameworks.gpu(backend)}


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into so many seconds, and of three at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


def run(options: Cost) -> None:
    """Counts and measures, prints the tables and draws the picture."""
    results = Results("cost", options)
    frameworks.set_threads(keras.backend.backend(), options.threads)
    blocks = {
        (side, channels): results.row(f"block {side} {channels}", measure, side, channels, options)
        for side, channels in residual_shapes()
    }
    backend = keras.backend.backend()
    gpus = sorted({row["gpu"] for row in blocks.values()} - {None})
    where = ", ".join(gpus) or ("CPU" if backend == "jax" else f"CPU, threads: {options.threads}")
    title = f"Milliseconds are those of the fastest call, images: {options.batch}, on {backend} ({where})."
    results.write_tables("\n\n".join([widths(), table_4(), table_3(), splits(), block_table(blocks), title]))
    draw(options)


def accuracies() -> dict[tuple[float, int], float]:
    """Top-1 accuracy in percent of the 22 checkpoints, as their publishers measured it."""
    rows = keras_mnv2.list_weights(library="keras", include_top=True)
    return {(row.alpha, row.resolution): row.top1 for row in rows}


def widths() -> str:
    """The 22 widths and resolutions, counted and printed."""
    lines, top1 = [], accuracies()
    for (alpha, size), (multiply_adds, parameters) in PRINTED.items():
        found = profile(alpha, size)
        lines.append(
            [
                f"{alpha} at {size}",
                f"{found.multiply_adds / 1e6:.1f}",
                multiply_adds,
                f"{found.parameters / 1e6:.2f}",
                # The norms have a scale and a shift for each mean and variance.
                f"{(found.parameters - found.statistics) / 1e6:.2f}",
                f"{parameters:.2f}",
                f"{found.peak_memory / 1000:.0f}",
                f"{top1[alpha, size]:.1f}",
            ]
        )
    head = ["alpha", "M multiply-adds", "printed", "M parameters", "without norms", "printed", "peak, kB", "top-1, %"]
    return table(head, lines)


def table_4() -> str:
    """Table 4, with our count of our networks."""
    lines = []
    for name, (top1, parameters, multiply_adds) in TABLE_4.items():
        found = profile(OURS[name], 224) if name in OURS else None
        counted = ["", ""] if found is None else [f"{found.parameters / 1e6:.2f}", f"{found.multiply_adds / 1e6:.1f}"]
        lines.append([name, f"{top1:.1f}", f"{parameters:.1f}", counted[0], multiply_adds, counted[1]])
    return table(["Table 4", "top-1, %", "M parameters", "counted", "M multiply-adds", "counted"], lines)


def table_3() -> str:
    """Table 3, with our count of MobileNetV2."""
    tensors = profile(1.0, 224).largest_tensors
    lines = []
    for side, (first, second, shuffle) in TABLE_3.items():
        channels, size = tensors[side, side]
        lines.append([f"{side}x{side}", first, shuffle, second, f"{channels}/{size / 1000:.1f}"])
    return table(["channels/kB", "MobileNetV1", "ShuffleNet", "MobileNetV2", "counted"], lines)


def splits() -> str:
    """Peak memory of the network with the inner tensors in parts."""
    found = profile(1.0, 224)
    lines = [[f"{parts}", f"{split_memory(found, parts) / 1000:.0f}"] for parts in PARTS]
    lines.append(["inputs and outputs alone", f"{found.peak_memory / 1000:.0f}"])
    return table(["parts of the inner tensors", "peak, kB"], lines)


def block_table(blocks: dict[tuple[int, int], dict]) -> str:
    """The three blocks at each shape."""
    lines = []
    for (side, channels), row in blocks.items():
        for kind in (SEPARABLE, BOTTLENECK, INVERTED):
            cost, times = block_cost(kind, side, channels), row[kind]
            lines.append(
                [
                    f"{side}x{side}x{channels}, {kind}",
                    f"{cost['parameters']:,}",
                    f"{cost['multiply_adds'] / 1e6:.2f}",
                    f"{cost['memory'] / 1000:.0f}",
                    f"{cost['memory_as_one'] / 1000:.0f}",
                    f"{min(times):.2f}",
                    f"{min(times):.2f} to {max(times):.2f}",
                ]
            )
    head = ["block", "parameters", "M multiply-adds", "kB", "kB as one", "ms", "over the rounds"]
    return table(head, lines)


def draw(options: Cost) -> None:
    """Accuracy against multiply-adds as in figure 5: a line for each width, and what the paper compares with."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    top1 = accuracies()
    for alpha in dict.fromkeys(alpha for alpha, _ in PRINTED):
        points = sorted((profile(alpha, size).multiply_adds / 1e6, top1[a, size]) for a, size in PRINTED if a == alpha)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"MobileNetV2, alpha {alpha}")
    axes.plot(*zip(*sorted(MOBILENET_V1), strict=True), "--s", color="tab:gray", label="MobileNetV1")
    others = {"MobileNetV1": "s", "ShuffleNet (1.5)": "^", "ShuffleNet (x2)": "^", "NasNet-A": "D"}
    for name, (accuracy, _, multiply_adds) in TABLE_4.items():
        if name in others:
            label = f"{name}, Table 4"
            axes.plot(multiply_adds, accuracy, others[name], color="black", fillstyle="none", label=label)
    title = "Accuracies are published: tensorflow/models, Howard et al. 2017, and Table 4 of the paper"
    axes.set(xscale="log", xlabel="million multiply-adds", ylabel="ImageNet top-1, %")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", loc="lower right")
    save(figure, picture(options.out, "cost"))
