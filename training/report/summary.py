"""What a training found, as names and values: for `report.md` and at the head of the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from .tables import table


def results(found: Mapping[str, Any], history: Mapping[str, Sequence[float]], classes: int) -> list[tuple[str, str]]:
    """Names and values, the most important first.

    Args:
        found: the metrics of a run.
        history: of the training, empty where only a head was trained.
        classes: how many there are.
    """
    if "test_mean_iou" in found:
        return [
            ("test mean IoU", f"{found['test_mean_iou']:.2%} of {found['test_images']} images"),
            ("test accuracy of pixels", f"{found['test_pixel_accuracy']:.2%}"),
            *([("best validation mean IoU", f"{max(history['val_mean_iou']):.2%}")] if history else []),
            *_cost(found, history),
        ]
    if "test_map" in found:
        best = [("best validation mAP at IoU 0.5", f"{max(history['val_map_50']):.2%}")] if history else []
        return [
            ("test mAP at IoU 0.5", f"{found['test_map_50']:.2%} of {found['test_images']} images"),
            ("test mAP at IoU 0.5 to 0.95", f"{found['test_map']:.2%}"),
            *best,
            *_cost(found, history),
        ]
    lines = [("test accuracy", f"{found['test_accuracy']:.2%} of {found['test_images']} images")]
    if "head_test_accuracy" in found:
        head = f"{found['head_test_accuracy']:.2%}, {duration(found['head_seconds'])}"
        lines.append(("test accuracy after the head alone", head))
    if classes > 5:
        lines.append(("test accuracy, top 5", f"{found['test_top5_accuracy']:.2%}"))
    lines.append(("expected calibration error", f"{found['calibration_error']:.3f}"))
    for name, value in found.items():
        if name.endswith("_tflite_test_accuracy"):
            lines.append((f"LiteRT, {name.removesuffix('_tflite_test_accuracy')}", f"{value:.2%}"))
    if history:
        lines.append(("best validation accuracy", f"{max(history['val_accuracy']):.2%}"))
    return [*lines, *_cost(found, history)]


def _cost(found, history):
    lines = []
    if history:
        lines += [
            ("epochs", str(len(history["loss"]))),
            ("seconds an epoch", f"{found['seconds_per_epoch']:.1f}"),
            ("waiting for input", f"{found['waiting_for_input']:.1%} of the training's time"),
        ]
    return [*lines, ("time in all", duration(found["seconds"])), ("parameters", f"{found['parameters']:,}")]


def write(path: Path, title: str, rows: Sequence[tuple[str, str]], page: str) -> None:
    """Writes the results as Markdown, with a link to the page.

    Args:
        path: of the file.
        title: its heading.
        rows: of `results`.
        page: the name of the page, which lies beside it.
    """
    shown = f"Curves, classes, mistakes, settings and the command that repeats it: [{page}]({page})."
    files.write(path, f"# {title}\n\n{table(('', ''), rows)}\n\n{shown}\n".encode())


def duration(seconds: float) -> str:
    """Seconds as people say them: `1 h 5 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
