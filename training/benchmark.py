"""`python -m training.benchmark`: images per second beside other implementations, in one run.

Each contender has a process of its own; they take turns, several rounds (A B A B), so that a machine that
slows down slows all of them. The table shows medians, the spread of the rounds, ratios to the peers (above 1:
faster than the peer), the share of the machine's peak, measured as a product of matrices, and peak memory.
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from training import report
from training.contenders import KERAS, PEERS
from training.peers import PRODUCT_SIDE, Spec
from training.ranges import Amount, Count, MaybeCount, checked, parsed
from training.stopping import fail
from training.turns import QUIET, Bench, Contender

BACKENDS = ("tensorflow", "jax", "torch")
BATCH = {"inference": 32, "latency": 1, "training": 16, "fit": 16, "build": 1, "exports": 1}
GROWTH_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
GROWTH_SIZES = (96, 128, 160, 192, 224, 288, 352, 448)
GROWTH_BATCH = 8
PEAK = "matrix product"

Peer = Literal["keras.applications", "torchvision", "torchvision-folded", "onnxruntime", "openvino", "litert"]
Mode = Literal["inference", "latency", "training", "fit", "build", "growth", "exports"]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    backend: Literal["all", "tensorflow", "jax", "torch"] = "all"
    """Backend of the Keras models."""
    against: tuple[Peer, ...] = ("keras.applications", *(name for name in PEERS if name != PEAK))
    """What to measure beside keras_mnv2. The runtimes take part in inference and latency."""
    mode: tuple[Mode, ...] = ("inference", "latency", "training")
    """Forward passes; of one image; training steps; steps inside `model.fit`; import and build of the model; how
    time and memory of forward passes grow with batch and pixels; or every exported format in its own runtime, beside
    the model that it comes from, not folded."""
    alpha: float = 1.0
    """Width multiplier."""
    size: int = 224
    """Side of the images, in pixels."""
    batch: MaybeCount = None
    """Images a call, but for latency; by default 32 for inference, 16 for training and fit."""
    fold: bool = True
    """Fold the batch norms of keras_mnv2 for inference."""
    model: Path | None = None
    """A whole model as .keras for `exports`, instead of random weights."""
    images: Path | None = None
    """Images for `exports` as .npy, as that model takes them, to calibrate and compare on."""
    rounds: Count = 3
    """Turns that each contender gets."""
    seconds: Amount = 3.0
    """Length of a turn; at least three calls are made."""
    out: Path = field(default_factory=lambda: Path("runs") / f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}")
    """Folder for results.json, chart.png and growth.png."""

    def __post_init__(self):
        for name, kind in (("batch", MaybeCount), ("rounds", Count), ("seconds", Amount)):
            checked(name, kind, getattr(self, name))

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of the Keras models."""
        return BACKENDS if self.backend == "all" else (self.backend,)

    def specs(self, mode: str, folder: str) -> list[Spec]:
        """What takes part in a mode."""
        batch = 1 if mode == "latency" else self.batch or BATCH[mode]
        keras_models = [name for name in KERAS if name in ("keras_mnv2", *self.against)]
        wanted = [(name, backend) for backend in self.backends for name in keras_models]
        wanted += [(name, "") for name, (_, modes) in PEERS.items() if name in (*self.against, PEAK) and mode in modes]
        return [Spec(*names, mode, self.alpha, self.size, batch, self.fold, folder) for names in wanted]


def measure(mode: str, options: Options, bench: Bench, folder: str) -> tuple[list[dict], float | None]:
    """Measures all contenders in one mode, in turns, and the peak in FLOP/s."""
    found = bench.take_turns(options.specs(mode, folder), options.rounds, options.seconds)
    peak = next((2 * PRODUCT_SIDE**3 / c.seconds for c in found if c.spec.contender == PEAK), None)
    multiply_adds = cost(options)
    rows = [row(c) for c in found if c.spec.contender != PEAK]
    for found_row in rows:
        speed = found_row["images_per_second"]
        found_row["share_of_peak"] = report.share_of_peak(multiply_adds, mode, speed, peak)
    return rows, peak


def row(contender: Contender) -> dict:
    """What was measured of a contender."""
    spec, facts = contender.spec, contender.facts
    return {
        "mode": spec.mode,
        "contender": spec.label,
        "batch": spec.batch,
        "seconds": contender.seconds,
        "milliseconds": 1000 * contender.seconds,
        "images_per_second": spec.batch / contender.seconds,
        "spread": spread(contender.medians),
        "start_seconds": facts["start_seconds"],
        "peak_memory_mib": facts["peak_memory"] / 2**20,
        "device_memory_mib": facts["device_memory"] / 2**20 or None,
    }


def spread(values: list[float]) -> float:
    """Range over the median."""
    return (max(values) - min(values)) / statistics.median(values)


def measure_build(options: Options, bench: Bench, folder: str) -> list[dict]:
    """Measures import and build, each time in a new process; the contenders take turns."""
    specs = options.specs("build", folder)
    taken: dict[str, list[dict]] = {}
    for _ in range(options.rounds):
        for spec in specs:
            for contender in bench.take_turns([spec], 0, 0):
                taken.setdefault(spec.label, []).append(contender.facts)
    rows = []
    for label, turns in taken.items():
        totals = [turn["import_seconds"] + turn["build_seconds"] for turn in turns]
        rows.append(
            {
                "mode": "build",
                "contender": label,
                "seconds": statistics.median(totals),
                "import_seconds": statistics.median(turn["import_seconds"] for turn in turns),
                "build_seconds": statistics.median(turn["build_seconds"] for turn in turns),
                "spread": spread(totals),
            }
        )
    return rows


def measure_growth(options: Options, bench: Bench, folder: str) -> list[dict]:
    """Measures forward passes at growing batches and sizes, each in a new process, whose peak memory is its own."""
    points = []
    for backend in options.backends:
        spec = Spec("keras_mnv2", backend, "growth", options.alpha, options.size, 1, options.fold, folder)
        specs = [("batch", replace(spec, batch=batch)) for batch in GROWTH_BATCHES]
        specs += [("pixels", replace(spec, size=size, batch=GROWTH_BATCH)) for size in GROWTH_SIZES]
        for axis, point in specs:
            for contender in bench.take_turns([point], 1, options.seconds):
                facts = contender.facts
                memory = facts["device_memory"] or facts["peak_memory"] - facts["resident_memory"]
                points.append(
                    {
                        "backend": backend,
                        "axis": axis,
                        "batch": point.batch,
                        "pixels": point.size**2,
                        "seconds": contender.seconds,
                        "memory_mib": memory / 2**20,
                    }
                )
    return points


def measure_exports(options: Options, bench: Bench, folder: str) -> list[dict]:
    """Exports a model to every format on each backend, and measures each file beside the model, in turns."""
    rows = []
    for backend in options.backends:
        asked = {"alpha": options.alpha, "size": options.size, "folder": f"{folder}/{backend}"}
        asked |= {name: str(path) for name in ("model", "images") if (path := getattr(options, name))}
        command = [sys.executable, "-m", "training.exports", json.dumps(asked)]
        done = subprocess.run(command, env={**os.environ, **QUIET, "KERAS_BACKEND": backend}, stdout=subprocess.PIPE)
        if done.returncode:
            raise ValueError(f"The exports on {backend} ended with status {done.returncode}; what it said is above.")
        files = json.loads(done.stdout)
        specs = {}
        for name, facts in files.items():
            common = ("exports", options.alpha, options.size, options.batch or BATCH["exports"], False, folder)
            specs[Spec(name, backend, *common, path=facts.pop("path"))] = facts
        for contender in bench.take_turns(list(specs), options.rounds, options.seconds):
            rows.append(row(contender) | specs[contender.spec])
    return rows


def cost(options: Options) -> int:
    """Multiply-adds for one image."""
    import keras_mnv2

    shape = (options.size, options.size, 3)
    return keras_mnv2.cost_profile(alpha=options.alpha, input_shape=shape, print_fn=None).multiply_adds


def all_versions() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    from training.train import versions

    found = versions()
    for package in ("torchvision", "onnxruntime", "openvino", "ai-edge-litert"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(options: Options) -> bool:
    """Measures one mode after the other, and keeps the results after each; False where a contender failed."""
    from training.train import write_json

    bench = Bench()
    results = {"options": asdict(options), "versions": all_versions(), "peak_flops": {}, "rows": [], "growth": []}
    title = f"alpha {options.alpha}, {options.size}x{options.size}"
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for mode in options.mode:
            if mode == "growth":
                results["growth"] = measure_growth(options, bench, folder)
                print(f"\ngrowth, {title}\n{report.growth_table(results['growth'])}", flush=True)
                report.draw_growth(results["growth"], options.out / "growth.png")
            else:
                if mode in ("build", "exports"):
                    measure_mode = measure_build if mode == "build" else measure_exports
                    rows, peak = measure_mode(options, bench, folder), None
                else:
                    rows, peak = measure(mode, options, bench, folder)
                results["rows"] += rows
                report.compare(results["rows"])
                print(f"\n{mode}, {title}\n{report.table(rows)}", flush=True)
                if peak:
                    results["peak_flops"][mode] = peak
                    print(
                        f"peak: {peak / 1e9:.0f} GFLOP/s (float32, {PRODUCT_SIDE}x{PRODUCT_SIDE} matrices)", flush=True
                    )
                report.draw_bars(results["rows"], options.out / "chart.png")
            results["missing"] = bench.missing
            results["failed"] = [asdict(spec) | {"error": error} for spec, error in bench.failed.items()]
            write_json(options.out / "results.json", results)
    return not bench.failed


def main() -> None:
    """Measures what the command line asks for."""
    try:
        options = parsed(Options, description=__doc__)
        # This process computes nothing, but what it imports from here on asks for a backend.
        os.environ.setdefault("KERAS_BACKEND", options.backends[0])
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        cost(options)  # Says what is wrong with alpha or size before anything runs.
        fine = run(options)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("Interrupted: results.json has the modes that were complete.")
    print(f"\nresults.json and the charts are in {options.out}")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
