"""`python -m training.benchmark`: images per second beside other implementations, in one run.

Each contender has a process of its own; they take turns, several rounds (A B A B), so that a machine that
slows down slows all of them. The table shows medians, the spread of the rounds, ratios and peak memory.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib.figure
import tyro

from training.contenders import MODES
from training.train import versions, write_json

BACKENDS = ("tensorflow", "jax", "torch")
BATCH = {"inference": 32, "latency": 1, "training": 16}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    backend: Literal["all", "tensorflow", "jax", "torch"] = "all"
    """Backend of the Keras models."""
    against: tuple[Literal["keras.applications", "torchvision"], ...] = ("keras.applications", "torchvision")
    """What to measure beside keras_mnv2."""
    mode: tuple[Literal["inference", "latency", "training"], ...] = MODES
    """Forward passes, forward passes of one image, or training steps."""
    alpha: float = 1.0
    """Width multiplier."""
    size: int = 224
    """Side of the images, in pixels."""
    batch: int | None = None
    """Images a call; by default 32 for inference, 1 for latency, 16 for training."""
    rounds: int = 3
    """Turns that each contender gets."""
    seconds: float = 3.0
    """Length of a turn."""
    out: Path = field(default_factory=lambda: Path("runs") / f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}")
    """Folder for results.json and chart.png."""


class Contender:
    """A process that runs one implementation when it is told to."""

    def __init__(self, name: str, backend: str, mode: str, options: Options):
        self.name = name if name == "torchvision" else f"{name}, {backend}"
        self.batch = options.batch or BATCH[mode]
        spec = {"contender": name, "mode": mode, "alpha": options.alpha, "size": options.size, "batch": self.batch}
        # A file and not a pipe: nobody reads it while the process runs.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.contenders", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self.medians: list[float] = []
        self.peak_memory = 0
        self.state = self._read()

    def turn(self, seconds: float) -> None:
        """Runs for so many seconds and keeps the median of a call."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        found = self._read()
        self.medians.append(statistics.median(found["times"]))
        self.peak_memory = found["peak_memory"]

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            errors = self.errors.read().strip().splitlines()
            raise RuntimeError(f"{self.name} failed: {errors[-1] if errors else 'no message'}")
        return json.loads(line)


def measure(mode: str, options: Options) -> list[dict]:
    """Measures all contenders in one mode, in turns."""
    backends = BACKENDS if options.backend == "all" else (options.backend,)
    wanted = [(name, b) for b in backends for name in ("keras_mnv2", *options.against) if name != "torchvision"]
    wanted += [("torchvision", "torch")] if "torchvision" in options.against else []
    contenders = []
    for name, backend in wanted:
        contender = Contender(name, backend, mode, options)
        if "missing" in contender.state:
            print(f"{contender.name} is missing: {contender.state['missing']}")
        else:
            contenders.append(contender)
    for _ in range(options.rounds):
        for contender in contenders:
            contender.turn(options.seconds)
    rows = []
    for contender in contenders:
        contender.stop()
        seconds = statistics.median(contender.medians)
        rows.append(
            {
                "mode": mode,
                "contender": contender.name,
                "batch": contender.batch,
                "milliseconds": 1000 * seconds,
                "images_per_second": contender.batch / seconds,
                "spread": (max(contender.medians) - min(contender.medians)) / seconds,
                "build_seconds": contender.state["build_seconds"],
                "peak_memory_mib": contender.peak_memory / 2**20,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text, with the ratio to `keras.applications` on the same backend and to torchvision."""
    speed = {(row["mode"], row["contender"]): row["images_per_second"] for row in rows}
    head = ("contender", "batch", "ms", "images/s", "spread", "x keras", "x torchvision", "build, s", "MiB")
    lines = []
    for row in rows:
        backend = row["contender"].partition(", ")[2]
        peers = (speed.get((row["mode"], f"keras.applications, {backend}")), speed.get((row["mode"], "torchvision")))
        ratios = [f"{row['images_per_second'] / peer:.2f}" if peer else "" for peer in peers]
        lines.append(
            (
                row["contender"],
                str(row["batch"]),
                f"{row['milliseconds']:.1f}",
                f"{row['images_per_second']:.1f}",
                f"{row['spread']:.0%}",
                *ratios,
                f"{row['build_seconds']:.2f}",
                f"{row['peak_memory_mib']:.0f}",
            )
        )
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    cells = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in (head, *lines)
    ]
    return "\n".join("  ".join(line) for line in cells)


def draw(rows: list[dict], path: Path) -> None:
    """Draws images per second as bars, one panel a mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(9, 2.6 * len(modes)), layout="constrained")
    for axes, mode in zip(figure.subplots(len(modes), 1, squeeze=False)[:, 0], modes, strict=True):
        shown = [row for row in rows if row["mode"] == mode][::-1]
        colours = ["tab:blue" if row["contender"].startswith("keras_mnv2") else "tab:gray" for row in shown]
        bars = axes.barh([r["contender"] for r in shown], [r["images_per_second"] for r in shown], color=colours)
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set(title=f"{mode}, batch {shown[0]['batch']}", xlabel="images/s")
        axes.margins(x=0.1)
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    """Measures what the command line asks for."""
    options = tyro.cli(Options, description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for mode in options.mode:
        found = measure(mode, options)
        print(f"\n{mode}, alpha {options.alpha}, {options.size}x{options.size}\n{table(found)}", flush=True)
        rows += found
        write_json(options.out / "results.json", {"options": asdict(options), "versions": versions(), "rows": rows})
    draw(rows, options.out / "chart.png")
    print(f"\nresults.json and chart.png are in {options.out}")


if __name__ == "__main__":
    main()
