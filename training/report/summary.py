"""The report of a run, in Markdown."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..config import Config
from ..run.progress import duration
from . import metrics


def write(
    path: Path,
    config: Config,
    found: dict[str, Any],
    history: dict[str, list[float]],
    matrix: np.ndarray,
    class_names: tuple[str, ...],
    command: str,
) -> None:
    """Writes `report.md`: results, curves, classes, mistakes, settings, and how to repeat the run.

    Args:
        path: of the report; the pictures that it shows lie beside it.
        config: the run's settings.
        found: its metrics.
        history: of the training, empty where only a head was trained.
        matrix: confusion matrix of the test images (classes, classes).
        class_names: of the rows and columns.
        command: what to run to repeat it.
    """
    lines = [f"# {config.recipe} on {found['backend']}", ""]
    results = [("test accuracy", f"{found['test_accuracy']:.2%} of {found['test_images']} images")]
    if "head_test_accuracy" in found:
        head = f"{found['head_test_accuracy']:.2%}, {duration(found['head_seconds'])}"
        results.append(("test accuracy after the head alone", head))
    if len(class_names) > 5:
        results.append(("test accuracy, top 5", f"{found['test_top5_accuracy']:.2%}"))
    results.append(("expected calibration error", f"{found['calibration_error']:.3f}"))
    for name, value in found.items():
        if name.endswith("_tflite_test_accuracy"):
            results.append((f"LiteRT, {name.removesuffix('_tflite_test_accuracy')}", f"{value:.2%}"))
    if history:
        results += [
            ("best validation accuracy", f"{max(history['val_accuracy']):.2%}"),
            ("epochs", str(len(history["loss"]))),
            ("seconds an epoch", f"{found['seconds_per_epoch']:.1f}"),
            ("waiting for input", f"{found['waiting_for_input']:.1%} of the training's time"),
        ]
    results += [("time in all", duration(found["seconds"])), ("parameters", f"{found['parameters']:,}")]
    lines += [metrics.table(("", ""), results), ""]
    if history:
        lines += ["![curves](curves.png)", ""]
    rows = [
        (row["name"], row["images"], _percent(row["accuracy"]), _percent(row["precision"]))
        for row in metrics.per_class(matrix, class_names)
    ]
    lines += ["## Classes", "", metrics.table(("class", "images", "accuracy", "precision"), rows), ""]
    lines += ["![confusion matrix](confusion.png)", ""]
    if (path.parent / "mistakes.png").is_file():
        lines += ["## Most confident mistakes", "", "![mistakes](mistakes.png)", ""]
    if unreadable := found["unreadable_images"]:
        lines += [f"## {len(unreadable)} images could not be read", ""]
        lines += [f"- {name}: {why}" for name, why in sorted(unreadable.items())] + [""]
    if command:
        lines += ["## Repeat it", "", f"```sh\n{command}\n```", ""]
    settings = [(name, f"`{value}`") for name, value in dataclasses.asdict(config).items()]
    lines += ["## Settings", "", metrics.table(("field", "value"), settings), ""]
    lines += [", ".join(f"{package} {version}" for package, version in found["versions"].items())]
    files.write(path, ("\n".join(lines) + "\n").encode())


def _percent(share):
    return "" if share is None else f"{share:.1%}"
