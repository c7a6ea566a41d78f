"""Checkpoints into Keras's cache, each checked before it gets its name there."""

import contextlib
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras

from keras_mnv2.weights.read import read_arrays

# A server that sends nothing for so long has stalled.
STALLED_SECONDS = 60


def cache_folder() -> Path:
    """Keras's folder of downloaded models, `~/.keras/models`, or that under `KERAS_HOME`."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"


def fetch(url: str, file_name: str, sha256: str | None = None) -> Path:
    """Gives the cached file, which is downloaded with a progress bar first where it is missing or another.

    The download goes to a folder beside, which vanishes with it on any failure. It gets its final name only
    after its hash was checked or, where none is published, after it was read as a file of weights. The hash of its
    first download is then kept beside it, as `NAME.sha256` in the form of the command sha256sum: a line says where a
    file is another one than that.

    Args:
        url: where the file is published.
        file_name: in the cache.
        sha256: hexadecimal digits that the file's SHA-256 starts with, or None.

    Returns:
        The path in the cache.

    Raises:
        ConnectionError: where the download fails; the message names the address and where a file that was
            fetched by other means may be put.
        ValueError: where the downloaded file has another hash or is no file of weights.
    """
    target = cache_folder() / file_name
    if target.is_file():
        if sha256 is None or _digits(target).startswith(sha256):
            if sha256 is None:
                _compare(target)
            return target
        print(f"{target} has another SHA-256 than the published {sha256}: it is downloaded again.", flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{file_name}.", dir=target.parent)
    except OSError as error:
        raise ConnectionError(
            f"{url} cannot be put at {str(target)!r} ({error.strerror}): "
            "set KERAS_HOME to a folder that can be written."
        ) from error
    with folder as scratch:
        try:
            with _socket_timeout(STALLED_SECONDS):
                found = Path(keras.utils.get_file(file_name, url, cache_dir=scratch, cache_subdir=""))
        except Exception as error:
            # What Keras says, without the address that it repeats.
            reason = str(error).removeprefix(f"URL fetch failure on {url}: ").removeprefix("None -- ")
            raise ConnectionError(
                f"{url} could not be downloaded ({reason}): where this machine has no connection, put the file at "
                f"{str(target)!r} by hand."
            ) from error
        if sha256 is not None and not (digits := _digits(found)).startswith(sha256):
            raise ValueError(
                f"The file from {url} has the SHA-256 {digits}, the published one is {sha256}: it was thrown away and "
                f"not put at {str(target)!r}."
            )
        if sha256 is None:
            try:
                read_arrays(found)
            except ValueError as error:
                told = str(error).replace(repr(str(found)), f"from {url}").rstrip(".")
                raise ValueError(f"{told}; it was thrown away and not put at {str(target)!r}.") from error
        os.replace(found, target)
    if sha256 is None:
        if not _record(target).is_file():
            _record(target).write_text(f"{_digits(target)}  {file_name}\n")
        _compare(target)
    return target


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _compare(path: Path) -> None:
    record = _record(path)
    if not record.is_file():
        return  # Put there by hand.
    first, found = record.read_text(errors="replace").partition(" ")[0], _digits(path)
    if found != first:
        print(
            f"{path} has the SHA-256 {found}, at its first download it was {first}: "
            f"where that is right, remove {record}.",
            flush=True,
        )


def _digits(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # `get_file` has no timeout of its own.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
