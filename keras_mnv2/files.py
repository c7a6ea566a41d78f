"""Files and folders that are written beside their place, and moved there when they are whole."""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder of its own beside `path`, from where a move is one step; it vanishes with what is left in it.

    Raises:
        OSError: where it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def cleaned_up() -> Iterator[Callable[[], None]]:
    """Inside, SIGTERM first raises, so that no scratch folder and no child stays, and then ends the process.

    Yields:
        A function that raises again where the exception of a signal was lost: a callback, or a library in C, may
        swallow it. To be called before results get their names.
    """

    came: list[int] = []

    def terminate(number: int, frame: Any) -> None:
        came.append(number)
        raise _Terminated

    def check() -> None:
        if came:
            raise _Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        # The caller has a handler, or signals end in another thread.
        yield check
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Whatever became of the exception: the import of a C library makes another of it, too.
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


def move_results(folder: Path, path: Path, scratch: Path, overwrite: bool) -> None:
    """Gives the results their final names, the named one last; where that fails, all is as it was before.

    What they replace goes when the scratch folder does.

    Raises:
        ValueError: without `overwrite`, where something has got the name meanwhile.
    """
    with contextlib.ExitStack() as undo:
        for result in sorted(folder.iterdir(), key=lambda result: result.name == path.name):
            final, replaced = path.with_name(result.name), scratch / f"replaced-{result.name}"
            if overwrite and final.exists():
                final.rename(replaced)
                undo.callback(replaced.rename, final)
            _rename_to_new(result, final)
            undo.callback(final.rename, result)
        undo.pop_all()


def _rename_to_new(result: Path, final: Path) -> None:
    """Renames, but never over something; what else writes there may have got the name in the meantime."""
    try:
        if result.is_dir():
            # A folder that holds something is not replaced.
            result.rename(final)
        else:
            os.link(result, final)
            result.unlink()
    except OSError as error:
        if final.exists():
            raise ValueError(
                f"path must be new, got {str(final)!r}, which something else has written meanwhile."
            ) from error
        if result.is_dir():
            raise
        # A file system without links.
        result.rename(final)
