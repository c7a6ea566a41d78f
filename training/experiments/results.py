"""The rows of an experiment, kept as they are measured; the tables that are made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from .. import files
from ..report.versions import versions
from .options import Options

# A file of the longest experiment has 20 kB.
MOST_BYTES = 2**24


class Results:
    """The rows of one experiment by their names, in `results.json`.

    Args:
        name: of the experiment.
        options: its settings.

    Raises:
        ValueError: where the folder has results of another experiment, other settings or another backend.
        OSError: where the folder cannot be made.
    """

    def __init__(self, name: str, options: Options):
        self.folder = options.out
        self.path = self.folder / "results.json"
        self.head = {"experiment": name, "backend": keras.backend.backend(), **options.fixed()}
        self.rows: dict[str, dict[str, Any]] = self._before() if self.path.exists() else {}
        with files.told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def row(self, name: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """The row of that name: what an earlier start has measured, or what `measure` gives, which is written."""
        if name not in self.rows:
            self.rows[name] = measure(*arguments)
            content = {**self.head, "versions": versions(), "rows": self.rows}
            files.write_json(self.path, content)
        return self.rows[name]

    def write_tables(self, text: str) -> None:
        """Prints the tables and writes them as `table.md`."""
        print(text, flush=True)
        files.write(self.folder / "table.md", f"{text}\n".encode())

    def _before(self) -> dict[str, dict[str, Any]]:
        try:
            if self.path.stat().st_size > MOST_BYTES:
                raise ValueError
            content = json.loads(self.path.read_text())
            rows = content["rows"]
            if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"out must be a folder whose results.json an experiment wrote, got {self.path}.") from None
        for name, value in self.head.items():
            if content.get(name) != value:
                raise ValueError(
                    f"out must be a new folder, or one of a run with the same {name}, {value!r}, got {self.folder}, "
                    f"whose run has {content.get(name)!r}."
                )
        return rows


def picture(folder: Path, name: str) -> Path:
    """Where the picture of an experiment goes."""
    return folder / f"{name}.png"
