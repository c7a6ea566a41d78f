"""The report of a training: its page and its summary."""

import dataclasses
from typing import Any

import keras
import numpy as np

from ..data.inputs import Inputs
from ..state.run_folder import Run
from . import metrics, mistakes, page, summary
from .activation_map import activation_maps


def write_report(
    run: Run,
    model: keras.Model,
    found: dict[str, Any],
    inputs: Inputs,
    scores: np.ndarray,
    labels: np.ndarray,
    command: str,
) -> None:
    """Writes `report.html` and `report.md` of a run whose metrics are `found` and whose test gave these scores."""
    config, names = run.config, inputs.class_names
    worst = mistakes.worst(scores, labels, inputs.test, names)
    with run.engine.alone():
        worst = mistakes.explained(worst, lambda images, classes: activation_maps(model, images, classes))
    tuned = "fine-tuning" if config.head_epochs else "training"
    phases = {"head_history": "head alone", "history": tuned, "quantize_history": "quantisation-aware"}
    images = " + ".join(f"{len(split):,}" for split in (inputs.train.split, inputs.validation.split, inputs.test.split))
    report = page.Report(
        title=f"{config.recipe} on {found['backend']}",
        subtitle=f"MobileNetV2 on {config.dataset}, {images} images of {len(names)} classes for training, validation "
        "and test.",
        results=summary.results(found, run.done.get("history", {}), len(names)),
        matrix=metrics.confusion_matrix(scores, labels),
        class_names=names,
        mistakes=worst,
        unreadable=found["unreadable_images"],
        command=command,
        settings=dataclasses.asdict(config),
        versions=found["versions"],
        phases={phases[name]: run.done[name] for name in phases if run.done.get(name)},
    )
    page.write(run.folder / "report.html", report)
    summary.write(run.folder / "report.md", report.title, report.results, "report.html")
