"""What is different where a run has several processes: the first one tells what all do, and each can end at once."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from ..parallel.channel import Channel
from ..process import status_of
from ..state.signals import Stopped


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed: the first process tells what all do. Errors are."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def end_at_once(error: BaseException, channel: Channel) -> NoReturn:
    """Ends one process of several: what runs when Python ends would wait for the others."""
    if isinstance(error, Stopped):
        if error.agreed:
            channel.close()
        told, code = str(error) if channel.main else "", 128 + error.signal
    else:
        plain = isinstance(error, (ValueError, ImportError, OSError))
        told, code = (f"{error}", status_of(error)) if plain else ("".join(traceback.format_exception(error)), 1)
    sys.stdout.flush()
    if told:
        print(told, file=sys.stderr, flush=True)
    os._exit(code)
