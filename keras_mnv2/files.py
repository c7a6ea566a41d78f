"""Files and folders that are written beside their place, and moved there when they are whole."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder of its own beside `path`, from where a move is one step; it vanishes with what is left in it.

    Raises:
        OSError: where it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)
