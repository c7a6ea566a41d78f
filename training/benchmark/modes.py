"""`python -m training.benchmark`: images per second beside other implementations, in one run.

Each contender has a process of its own; they are measured in interleaved rounds (A B A B), so that a machine that
slows down slows all of them. The table shows medians, the spread of the rounds, ratios to the peers (above 1:
faster than the peer), the fraction of the machine's peak, measured as a product of matrices, and peak memory.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from .. import files
from ..process import PACKAGE, fail
from ..ranges import Amount, Count, MaybeCount, MaybePositive, checked, parsed
from ..report.versions import versions
from . import charts
from .contenders import ACCELERATED, BY_HAND, FLOAT32_ONLY, IN_FIT, KERAS, PEERS
from .peers import Spec, product_side
from .rounds import QUIET, Bench, Contender

BACKENDS = ("tensorflow", "jax", "torch")
# So small that a step is what the host does for it.
HOST = {"size": 32, "batch": 2, "threads": 1}
SIZE = 224
BATCH = {"inference": 32, "latency": 1, "training": 16, "fit": 16, "host": HOST["batch"], "build": 1}
GROWTH_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
GROWTH_SIZES = (96, 128, 160, 192, 224, 288, 352, 448)
GROWTH_BATCH = 8
PEAK = "matrix product"
# Packages that take part besides those of `versions`.
OTHERS = ("torchvision", "onnxruntime", "openvino", "ai-edge-litert")

Peer = Literal["keras.applications", "torchvision", "torchvision-folded", "onnxruntime", "openvino", "litert"]
Mode = Literal["inference", "latency", "training", "fit", "host", "build", "growth", "exports", "accelerate"]
# Takes the rows of a mode that were measured so far.
Keep = Callable[[list[dict]], None]


def forget(rows: list[dict]) -> None:
    """Keeps no rows."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    backend: Literal["all", "tensorflow", "jax", "torch"] = "all"
    """Backend of the Keras models."""
    against: tuple[Peer, ...] = get_args(Peer)
    """What to measure beside keras_mnv2. The runtimes take part in inference and latency, in float32."""
    mode: tuple[Mode, ...] = ("inference", "latency", "training")
    """Forward passes; of one image; training steps; steps inside `model.fit`; what a training step costs the host:
    tiny ones on one thread, and PyTorch's operators in each; import and build of the model; how time and memory of
    forward passes grow with batch and pixels; every exported format in its own runtime, beside the model that it comes
    from, not folded; or `keras_mnv2.accelerate` beside the same runtime called by hand and the Keras model."""
    alpha: float = 1.0
    """Width multiplier."""
    size: MaybeCount = None
    """Side of the images, in pixels; by default 224, and 32 for host."""
    batch: MaybeCount = None
    """Images a call, but for latency; by default 32 for inference, 16 for training and fit, 2 for host."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the calls, and of the matrix product: bfloat16 is Keras's policy mixed_bfloat16 and PyTorch's autocast."""
    on_device: bool = False
    """Put images and labels on the device once, and leave the outputs there. The runtimes take NumPy arrays, and a
    training step of Keras gives its loss, in any case."""
    threads: MaybeCount = None
    """Threads of PyTorch, TensorFlow and the runtimes; JAX has no such setting. By default 1 for host, else the
    framework's own choice, and all cores for the runtimes."""
    fold: bool = True
    """Fold the batch norms of keras_mnv2 for inference."""
    model: Path | None = None
    """A whole model as .keras for `exports`, instead of random weights."""
    images: Path | None = None
    """Images for `exports` as .npy, as that model takes them, to calibrate and compare on."""
    rounds: Count = 3
    """How often each contender is measured."""
    seconds: Amount = 3.0
    """Of each measurement; at least three calls are made."""
    limit: MaybePositive = None
    """Seconds that a contender's start (import, build, compilation, first calls), and each measurement, may take.
    One that takes longer is ended and said to; it does not count as failed, so the status stays 0."""
    out: Path = field(default_factory=lambda: Path("runs") / f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}")
    """Folder for results.json, which is written after each measurement, chart.png and growth.png."""

    def __post_init__(self):
        kinds = {"size": MaybeCount, "batch": MaybeCount, "threads": MaybeCount, "rounds": Count, "seconds": Amount}
        for name, kind in {**kinds, "limit": MaybePositive}.items():
            checked(name, kind, getattr(self, name))
        if "exports" in self.mode and (self.precision != "float32" or self.on_device or self.threads):
            raise ValueError(
                "mode must be without 'exports' where precision, on_device or threads are set: exported files are run "
                "as they are."
            )

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of the Keras models."""
        return BACKENDS if self.backend == "all" else (self.backend,)

    @property
    def left_out(self) -> list[str]:
        """Peers that were asked for, but do not know the precision."""
        modes = {name: modes for name, (_, modes) in PEERS.items() if name in FLOAT32_ONLY and name in self.against}
        wanted = self.precision != "float32"
        return [name for name, known in modes.items() if wanted and set(known) & set(self.mode)]

    def side(self, mode: str) -> int:
        """Of the images in a mode."""
        return self.size or (HOST["size"] if mode == "host" else SIZE)

    def spec(self, contender: str, backend: str, mode: str, folder: str) -> Spec:
        """A contender in a mode."""
        batch = 1 if mode == "latency" else self.batch or BATCH.get(mode, 1)
        spec = Spec(contender, backend, mode, self.alpha, self.side(mode), batch, self.fold, folder)
        threads = self.threads or (HOST["threads"] if mode == "host" else None)
        return replace(spec, precision=self.precision, on_device=self.on_device, threads=threads, limit=self.limit)

    def specs(self, mode: str, folder: str) -> list[Spec]:
        """What takes part in a mode."""
        if mode == "accelerate":
            accelerated = [name + how for name in ACCELERATED if name in self.against for how in ("", BY_HAND)]
            return [self.spec(name, b, mode, folder) for b in self.backends for name in ("keras_mnv2", *accelerated)]
        keras_models = [name for name in KERAS if name in ("keras_mnv2", *self.against)]
        if mode == "host":
            keras_models.append(IN_FIT)
        wanted = [(name, backend) for backend in self.backends for name in keras_models]
        named = set(self.against) - set(self.left_out) | {PEAK}
        wanted += [(name, "") for name, (_, modes) in PEERS.items() if name in named and mode in modes]
        return [self.spec(*names, mode, folder) for names in wanted]

    def title(self, mode: str) -> str:
        """Of a table."""
        side, threads = self.side(mode), self.spec("", "", mode, "").threads
        words = [mode, f"alpha {self.alpha}", f"{side}x{side}", self.precision]
        words += ["on the device"] if self.on_device else []
        if threads:
            words += [f"{threads} thread{'s' if threads > 1 else ''}{' but for JAX' if 'jax' in self.backends else ''}"]
        return ", ".join(words)


class Results:
    """What was measured so far, in `results.json`."""

    def __init__(self, options: Options, bench: Bench):
        self.bench, self.path = bench, options.out / "results.json"
        common = {"options": asdict(options), "versions": versions(OTHERS), "left_out": options.left_out}
        self.content: dict = {**common, "peak_flops": {}, "rows": [], "growth": []}

    def keep(self, mode: str, rows: list[dict]) -> None:
        """Writes the file, with these rows of a mode, or points of `growth`, in the place of those before."""
        if mode == "growth":
            self.content["growth"] = rows
        else:
            self.content["rows"] = [row for row in self.content["rows"] if row["mode"] != mode] + rows
            charts.compare(self.content["rows"])
        self.content["missing"] = self.bench.missing
        self.content["failed"] = [asdict(spec) | {"error": error} for spec, error in self.bench.failed.items()]
        self.content["exceeded"] = [asdict(spec) | {"during": what} for spec, what in self.bench.exceeded.items()]
        files.write_json(self.path, self.content)


def measure(
    mode: str, options: Options, bench: Bench, folder: str, keep: Keep = forget
) -> tuple[list[dict], Contender | None]:
    """Measures all contenders in one mode, in interleaved rounds; also gives the peak, a contender."""
    multiply_adds = cost(options, mode)

    def rows_of(contenders: list[Contender]) -> list[dict]:
        peak = peak_of(contenders)
        rows = [row(c) for c in contenders if c.spec.contender != PEAK and c.medians]
        for found in rows:
            speed = found["images_per_second"]
            found["fraction_of_peak"] = charts.fraction_of_peak(
                multiply_adds, mode, speed, flops(peak) if peak else None
            )
        return rows

    found = bench.run_rounds(
        options.specs(mode, folder), options.rounds, options.seconds, lambda running: keep(rows_of(running))
    )
    return rows_of(found), peak_of(found)


def peak_of(contenders: list[Contender]) -> Contender | None:
    """The product of matrices, if it was measured."""
    return next((c for c in contenders if c.spec.contender == PEAK and c.medians), None)


def flops(peak: Contender) -> float:
    """FLOP/s of the product of matrices."""
    return 2 * product_side(peak.facts["gpu"]) ** 3 / peak.seconds


def row(contender: Contender) -> dict:
    """What was measured of a contender."""
    spec, facts = contender.spec, contender.facts
    return {
        "mode": spec.mode,
        "contender": spec.label,
        "batch": spec.batch,
        "rounds": len(contender.medians),
        "seconds": contender.seconds,
        "milliseconds": 1000 * contender.seconds,
        "images_per_second": spec.batch / contender.seconds,
        "spread": spread(contender.medians),
        "start_seconds": facts["start_seconds"],
        "first_step_seconds": facts["first_step_seconds"],
        "aten_calls": facts.get("aten_calls"),
        "peak_memory_mib": facts["peak_memory"] / 2**20,
        "device_memory_mib": facts["device_memory"] / 2**20 or None,
        "gpu": facts["gpu"],
        "tf32": facts["tf32"],
    }


def spread(values: list[float]) -> float:
    """Range over the median."""
    return (max(values) - min(values)) / statistics.median(values)


def measure_build(options: Options, bench: Bench, folder: str, keep: Keep = forget) -> list[dict]:
    """Measures import and build, each time in a new process; in interleaved rounds."""
    taken: dict[str, list[dict]] = {}
    rows: list[dict] = []
    for _ in range(options.rounds):
        for spec in options.specs("build", folder):
            for contender in bench.run_rounds([spec], 0, 0):
                taken.setdefault(spec.label, []).append(contender.facts)
            rows = [build_row(label, rounds) for label, rounds in taken.items()]
            keep(rows)
    return rows


def build_row(label: str, rounds: list[dict]) -> dict:
    """What was measured of a contender's import and build."""
    totals = [each["import_seconds"] + each["build_seconds"] for each in rounds]
    return {
        "mode": "build",
        "contender": label,
        "rounds": len(rounds),
        "seconds": statistics.median(totals),
        "import_seconds": statistics.median(each["import_seconds"] for each in rounds),
        "build_seconds": statistics.median(each["build_seconds"] for each in rounds),
        "spread": spread(totals),
    }


def measure_growth(options: Options, bench: Bench, folder: str, keep: Keep = forget) -> list[dict]:
    """Measures forward passes at growing batches and sizes, each in a new process, whose peak memory is its own."""
    points = []
    for backend in options.backends:
        spec = replace(options.spec("keras_mnv2", backend, "growth", folder), batch=1)
        specs = [("batch", replace(spec, batch=batch)) for batch in GROWTH_BATCHES]
        specs += [("pixels", replace(spec, size=size, batch=GROWTH_BATCH)) for size in GROWTH_SIZES]
        for axis, point in specs:
            for contender in bench.run_rounds([point], 1, options.seconds):
                facts = contender.facts
                memory = facts["device_memory"] or facts["peak_memory"] - facts["resident_memory"]
                points.append(
                    {
                        "backend": backend,
                        "axis": axis,
                        "batch": point.batch,
                        "pixels": point.size**2,
                        "seconds": contender.seconds,
                        "first_step_seconds": facts["first_step_seconds"],
                        "memory_mib": memory / 2**20,
                    }
                )
            keep(points)
    return points


def measure_exports(options: Options, bench: Bench, folder: str, keep: Keep = forget) -> list[dict]:
    """Exports a model to every format on each backend, and measures each file in rounds with the model."""
    rows: list[dict] = []
    for backend in options.backends:
        asked = {"alpha": options.alpha, "size": options.side("exports"), "folder": f"{folder}/{backend}"}
        asked |= {name: str(path) for name in ("model", "images") if (path := getattr(options, name))}
        command = [sys.executable, "-m", f"{__package__}.exports", json.dumps(asked)]
        done = subprocess.run(command, env={**os.environ, **QUIET, "KERAS_BACKEND": backend}, stdout=subprocess.PIPE)
        if done.returncode:
            raise ValueError(f"The exports on {backend} ended with status {done.returncode}; what it said is above.")
        files = json.loads(done.stdout)
        specs = {}
        for name, facts in files.items():
            specs[replace(options.spec(name, backend, "exports", folder), path=facts.pop("path"))] = facts

        def rows_of(contenders, before=tuple(rows), specs=specs):
            return [*before, *(row(c) | specs[c.spec] for c in contenders if c.medians)]

        def keep_rows(running, of=rows_of):
            keep(of(running))

        found = bench.run_rounds(list(specs), options.rounds, options.seconds, keep_rows)
        rows = rows_of(found)
    return rows


def cost(options: Options, mode: str) -> int:
    """Multiply-adds for one image in a mode."""
    import keras_mnv2

    shape = (options.side(mode), options.side(mode), 3)
    return keras_mnv2.cost_profile(alpha=options.alpha, input_shape=shape, print_fn=None).multiply_adds


def run(options: Options) -> bool:
    """Measures one mode after the other, and keeps the results as they come; False where a contender failed."""
    bench = Bench()
    results = Results(options, bench)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.left_out:
        print(f"not measured in {options.precision}, which they do not have: {', '.join(options.left_out)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for mode in options.mode:
            results.keep(mode, [])
            asked = (options, bench, folder, functools.partial(results.keep, mode))
            own = {"growth": measure_growth, "build": measure_build, "exports": measure_exports}.get(mode)
            rows, peak = measure(mode, *asked) if own is None else (own(*asked), None)
            if peak:
                results.content["peak_flops"][mode] = flops(peak)
            results.keep(mode, rows)
            shown = charts.growth_table(rows) if mode == "growth" else charts.table(rows)
            print(f"\n{options.title(mode)}\n{shown}", flush=True)
            if peak:
                print(charts.peak_line(flops(peak), options.precision, peak.facts), flush=True)
            if mode == "growth":
                charts.draw_growth(rows, options.out / "growth.png")
            else:
                charts.draw_bars(results.content["rows"], options.out / "chart.png")
    return not bench.failed


def main() -> None:
    """Measures what the command line asks for."""
    try:
        command = f"python -m {PACKAGE}.benchmark"
        options = parsed(Options, prog=command, description=__doc__.replace("python -m training.benchmark", command))
        # This process computes nothing, but what it imports from here on asks for a backend.
        os.environ.setdefault("KERAS_BACKEND", options.backends[0])
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        for mode in options.mode:
            cost(options, mode)  # Says what is wrong with alpha or size before anything runs.
        fine = run(options)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("Interrupted: results.json has what was measured before.")
    print(f"\nresults.json and the charts are in {options.out}")
    sys.exit(0 if fine else 1)
