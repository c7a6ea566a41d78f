"""Files that are written beside and moved into place."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path beside `path`, with its suffix; what is written there is flushed to the disk and moved into place.

    So no half file has the final name, not even after a power cut.

    Raises:
        OSError: where that fails, with a sentence that says where. After any error nothing is left behind.
    """
    part = path.with_name(f"part_{path.name}")
    with told(path):
        try:
            yield part
            _flush(part)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if os.name == "posix":
            # The folder too, or the new name may be lost.
            _flush(path.parent)


def write(path: Path, content: bytes) -> None:
    """Writes a whole file."""
    with beside(path) as part:
        part.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Writes a file of JSON, with text in the place of what JSON does not know."""
    write(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns an OSError into one that says in a sentence that `path` could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}.") from error


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
