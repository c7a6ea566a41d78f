"""`report.html`: what a run found, as one file that opens without a network."""

import base64
import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from .. import files
from ..data.inputs import Inputs
from ..state.run_folder import Run
from . import curves, metrics, summary
from .activation_map import overlay
from .mistakes import Mistake

# Above this many classes a matrix is too large to be read: the pairs that are confused most stand in its place.
MOST_CLASSES, PAIRS = 40, 30
# Side of a picture in pixels: smaller images are enlarged, larger ones reduced.
LEAST_SIDE, MOST_SIDE = 128, 256
# Of detections that are shown.
LEAST_SCORE = 0.5
# Columns of the table of the epochs: heading, and how a value is said.
COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "val_loss": ("validation loss", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "val_accuracy": ("validation accuracy", "{:.2%}"),
    "mean_iou": ("mean IoU", "{:.2%}"),
    "val_mean_iou": ("validation mean IoU", "{:.2%}"),
    "val_map": ("validation mAP", "{:.2%}"),
    "val_map_50": ("validation mAP at IoU 0.5", "{:.2%}"),
    "learning_rate": ("learning rate", "{:.3g}"),
    "seconds": ("seconds", "{:.1f}"),
}
# Columns of the table of the classes by what is counted: key and heading.
FRACTIONS = {
    "images": {"accuracy": "accuracy", "precision": "precision", "f1": "F1"},
    "pixels": {"iou": "IoU", "accuracy": "accuracy", "precision": "precision"},
    "objects": {"ap": "AP", "ap_50": "AP at IoU 0.5", "ap_75": "AP at IoU 0.75"},
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the page of a training or an evaluation shows.

    Attributes:
        title: of the page.
        subtitle: a line on the model and the data.
        results: names and values; the first is shown largest.
        matrix: confusion matrix (classes, classes), rows true and columns predicted; None for objects.
        class_names: in the order of the rows.
        mistakes: the worst, in their order.
        unreadable: names of images, and why they could not be read.
        command: what to run to repeat it; may be empty.
        settings: names and values.
        versions: of Python and packages.
        phases: the history of each phase of a training, by its name, as `curves.charts` takes it.
        no_maps: why the mistakes have no activation map; empty where they have.
        counted: what has a class: `images`, `pixels` or `objects`.
        worst: in the place of mistakes the images of `worst_images`, of `segmentation` or `detection`.
        classes: of objects, the rows of the table of the classes.
    """

    title: str
    subtitle: str
    results: Sequence[tuple[str, str]]
    matrix: np.ndarray | None
    class_names: Sequence[str]
    mistakes: Sequence[Mistake]
    unreadable: Mapping[str, str]
    command: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    phases: Mapping[str, curves.History] = dataclasses.field(default_factory=dict)
    no_maps: str = ""
    counted: str = "images"
    worst: Sequence[Any] = ()
    classes: Sequence[Mapping[str, Any]] = ()


def write_run(
    run: Run, found: Mapping[str, Any], inputs: Inputs, command: str, network: str, contents: str, **own: Any
) -> None:
    """Writes `report.html` and `report.md` of a run.

    Args:
        run: this run.
        found: its metrics.
        inputs: of the run.
        command: what to run to repeat it.
        network: its name.
        contents: what is on the images, such as "of 10 classes".
        **own: what a task's `Report` has besides.
    """
    config, names, history = run.config, inputs.class_names, run.done.get("history", {})
    images = " + ".join(f"{len(split):,}" for split in (inputs.train.split, inputs.validation.split, inputs.test.split))
    given = {"phases": {"training": history} if history else {}, "mistakes": (), **own}
    report = Report(
        title=f"{config.recipe} on {found['backend']}",
        subtitle=f"{network} on {config.dataset}, {images} images {contents} for training, validation and test.",
        results=summary.results(found, history, len(names)),
        class_names=names,
        unreadable=found["unreadable_images"],
        command=command,
        settings=dataclasses.asdict(config),
        versions=found["versions"],
        **given,
    )
    write(run.folder / "report.html", report)
    summary.write(run.folder / "report.md", report.title, report.results, "report.html")


def write(path: Path, report: Report) -> None:
    """Writes the page, with its pictures, styles and script inside. Names of files and classes are shown as text.

    Args:
        path: of the page.
        report: what it shows.

    Raises:
        OSError: where it cannot be written.
    """
    files.write(path, html(report).encode())


def html(report: Report) -> str:
    """The page as text."""
    folder = Path(__file__).parent
    # What a template does not mark as safe is escaped, whoever writes the next line of it.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda fraction: "" if fraction is None else f"{fraction:.1%}"
    environment.filters["picture"] = picture
    environment.filters["short"] = lambda name: "/".join(Path(name).parts[-2:])
    script = (folder / "page.js").read_text("utf-8")
    environment.filters["grouped"] = "{:,}".format
    environment.filters["extract"] = lambda key, row: row[key]
    matrix, names = report.matrix, report.class_names
    many = len(names) > MOST_CLASSES
    rows: Sequence[Mapping[str, Any]] = report.classes
    if matrix is not None:
        rows = (metrics.per_class_of_pixels if report.counted == "pixels" else metrics.per_class)(matrix, names)
    return environment.get_template("page.html").render(
        report=report,
        style=Markup((folder / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=curves.charts(report.phases),
        epochs=_epochs(report.phases),
        matrix=None if many or matrix is None else matrix.tolist(),
        pairs=metrics.most_confused(matrix, names, PAIRS) if many and matrix is not None else [],
        rows=rows,
        counted=report.counted,
        fractions=FRACTIONS[report.counted],
        overlay=overlay,
        least_score=LEAST_SCORE,
    )


def _epochs(phases):
    """Headings and rows of the table of all epochs."""
    keys = [key for key in COLUMNS if any(history.get(key) for history in phases.values())]
    rows = [
        (
            phase,
            i + 1,
            [COLUMNS[key][1].format(history[key][i]) if i < len(history.get(key, ())) else "" for key in keys],
        )
        for phase, history in phases.items()
        for i in range(curves.epochs_of(history))
    ]
    return {"headings": [COLUMNS[key][0] for key in keys], "rows": rows}


def picture(pixels: np.ndarray) -> str:
    """A data URI of bytes (height, width, 1 or 3), as a JPEG of 128 to 256 pixels a side."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    factor = -(-LEAST_SIDE // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((MOST_SIDE, MOST_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
