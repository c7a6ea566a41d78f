"""The report of a training: its page and its summary."""

from typing import Any

import keras
import numpy as np

from ..data.inputs import Inputs
from ..state.run_folder import Run
from . import metrics, mistakes, page
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
    names = inputs.class_names
    worst = mistakes.worst(scores, labels, inputs.test, names)
    with run.engine.alone():
        worst = mistakes.explained(worst, lambda images, classes: activation_maps(model, images, classes))
    tuned = "fine-tuning" if run.config.head_epochs else "training"
    phases = {"head_history": "head alone", "history": tuned, "quantize_history": "quantisation-aware"}
    page.write_run(
        run,
        found,
        inputs,
        command,
        "MobileNetV2",
        f"of {len(names)} classes",
        matrix=metrics.confusion_matrix(scores, labels),
        mistakes=worst,
        phases={phases[name]: run.done[name] for name in phases if run.done.get(name)},
    )
