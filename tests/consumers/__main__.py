"""`python -m tests.consumers --out FOLDER [NAME ...]`: exported files in the programs that read them.

Each consumer is installed at its pinned version in an environment of its own, which is removed afterwards; our files
run there, and their scores are compared with the model's. What cannot be installed, written or run has a row that says
so. Finished consumers stay in `FOLDER/results.json`; another run goes on with the others.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_mnv2
from tests.consumers.consumers import CONSUMERS, FILES, Consumer
from tests.helpers import randomise
from tests.pages import replace_between

HERE = Path(__file__).parent
INSTALL_SECONDS, RUN_SECONDS = 1200, 300
BEGIN, END = "<!-- consumers: begin -->", "<!-- consumers: end -->"
LAYOUTS = {"nchw.onnx": "NCHW"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.consumers", description=__doc__)
    parser.add_argument("names", nargs="*", help="consumers, such as 'tract' or 'OpenCV 5.0.0'; by default all")
    parser.add_argument("--out", type=Path, required=True, help="folder for files and results")
    parser.add_argument("--model", type=Path, help="a classifier of raw pixels, .keras; by default a small random one")
    parser.add_argument("--images", type=Path, help="its raw pixels, float32 (images, height, width, 3), .npy")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table of consumers is replaced")
    parser.add_argument("--small", action="store_true", help="leave out those that need gigabytes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results_file = options.out / "results.json"
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.is_file() else {}
    chosen = [c for c in CONSUMERS if not options.names or {c.name, f"{c.name} {c.version}"} & set(options.names)]
    if not chosen:
        parser.error(f"names must be of {', '.join(sorted({c.name for c in CONSUMERS}))}, got {options.names!r}")
    unwritten = write_files(options.out, options.model, options.images, {name for c in chosen for name in c.reads})
    for consumer in chosen:
        key = f"{consumer.name} {consumer.version}"
        if key in results or (options.small and consumer.large):
            continue
        print(f"== {key}", flush=True)
        results[key] = tried(consumer, options.out, unwritten)
        for row in results[key]:
            print("  ", *row, sep=" | ", flush=True)
        results_file.write_text(json.dumps(results, indent=1))
    text = table(results)
    print(text)
    if options.page is not None:
        try:
            replace_between(options.page, BEGIN, END, text)
        except ValueError as error:
            parser.error(str(error))
    return 0


def write_files(out: Path, model_file: Path | None, images_file: Path | None, wanted: set[str]) -> dict[str, str]:
    """Writes the files, the images and the model's scores; gives for each file that failed why."""
    if (model_file is None) != (images_file is None):
        raise SystemExit("--model and --images go together")
    if model_file is None or images_file is None:
        model, images = small()
    else:
        model, images = keras.models.load_model(model_file, compile=False), np.load(images_file).astype("float32")
    np.save(out / "images.npy", images)
    (out / "images.json").write_text(json.dumps({"shape": images.shape, "values": images.ravel().tolist()}))
    np.save(out / "expected.npy", model.predict(images, verbose=0))
    calibration = images
    unwritten = {}
    for name in sorted(wanted):
        file, arguments = FILES[name]
        if (out / file).exists():
            continue
        if arguments.get("precision") == "int8":
            arguments = {**arguments, "calibration": calibration}
        if arguments["format"] in ("coreml", "litert"):
            arguments = {**arguments, "labels": [f"class {i}" for i in range(model.output_shape[-1])]}
        try:
            keras_mnv2.export(model, out / file, **arguments)  # type: ignore[arg-type]
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            unwritten[name] = f"{type(error).__name__}: {error}"
            print(f"{name} was not written: {unwritten[name]}")
    return unwritten


def small() -> tuple[keras.Model, np.ndarray]:
    """A small classifier of raw pixels with random weights that decides between its classes, and images."""
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = keras_mnv2.MobileNetV2((96, 96, 3), alpha=0.35, weights=None, classes=10, include_preprocessing=True)
    images = np.round(rng.uniform(0, 255, (16, 6, 6, 3)).repeat(16, axis=1).repeat(16, axis=2)).astype("float32")
    randomise(model, rng, images)
    return model, images


def tried(consumer: Consumer, out: Path, unwritten: dict[str, str]) -> list[list[str]]:
    """The rows of one consumer: file, layout, largest difference, same top-1, remark."""
    with tempfile.TemporaryDirectory(prefix="consumer-") as scratch:
        folder = Path(scratch)
        try:
            install(consumer, folder)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            return [["", "", "", "", f"not installed: {cause(error)}"]]
        rows = []
        for name in consumer.reads:
            file = FILES[name][0]
            layout = LAYOUTS.get(file, "NHWC")
            if name in unwritten:
                rows.append([name, layout, "", "", f"not written: {unwritten[name]}"])
                continue
            try:
                difference, same, remark = run(consumer, out, file, folder)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                difference, same, remark = "", "", f"refused: {cause(error)}"
            rows.append([name, layout, difference, same, remark])
        return rows


def install(consumer: Consumer, folder: Path) -> None:
    if consumer.npm:
        command = [
            "npm",
            "install",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--prefix",
            str(folder),
            *consumer.npm,
        ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        shutil.copy(HERE / "runner.mjs", folder)
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True, capture_output=True, text=True)
    pip = [str(folder / "env" / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", *consumer.packages]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)


def run(consumer: Consumer, out: Path, file: str, folder: Path) -> tuple[str, str, str]:
    """The largest difference of a score, the share of equal top classes, and what the runner said."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    copy = work / file
    # A program may write beside the file that it reads.
    (shutil.copytree if (out / file).is_dir() else shutil.copy)(out / file, copy)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # MNN's converter (3.6.1) has the first pip of PATH install packages: into its own environment.
    environment["PATH"] = f"{folder / 'env' / 'bin'}{os.pathsep}{environment['PATH']}"
    if consumer.npm:
        package = consumer.npm[0].rpartition("@")[0]
        command = ["node", "runner.mjs", package, str(copy), str(out.resolve() / "images.json"), str(work / "y.json")]
    else:
        python, runner = folder / "env" / "bin" / "python", HERE / "runners.py"
        files = [copy, out.resolve() / "images.npy", work / "y.npy"]
        command = [str(python), str(runner), consumer.runner, *map(str, files)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=RUN_SECONDS, cwd=folder, env=environment
    )
    said = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith(("note: ", "also: "))]
    if (work / "y.json").is_file():
        scores = np.array(json.loads((work / "y.json").read_text()), "float32")
    elif (work / "y.npy").is_file():
        scores = np.load(work / "y.npy")
    else:
        return "", "", "; ".join(said)
    expected = np.load(out / "expected.npy")
    if scores.shape != expected.shape:
        return "", "", f"scores of the shape {scores.shape}, the model's {expected.shape}"
    same = float((scores.argmax(1) == expected.argmax(1)).mean())
    return f"{np.abs(scores - expected).max():.2g}", f"{same:.0%}", "; ".join(said)


def cause(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    """One line of what a process said when it failed."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {error.timeout:.0f} s"
    lines = [line.strip() for line in (error.stderr or "").splitlines() if line.strip()]
    named = [line for line in lines if "rror" in line.partition(":")[0] or line.startswith("ERROR")]
    if error.returncode < 0:
        return f"ended by signal {-error.returncode}"
    return (named or lines or [f"exit status {error.returncode}"])[-1].replace("|", "/")[:200]


def table(results: dict[str, Any]) -> str:
    """The rows of all consumers as Markdown."""
    lines = ["| consumer | file | layout | largest difference | same top-1 | remark |", "|---|---|---|---|---|---|"]
    order = [f"{c.name} {c.version}" for c in CONSUMERS]
    for key in sorted(results, key=order.index):
        lines += [f"| {' | '.join([key, *row])} |" for row in results[key]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
