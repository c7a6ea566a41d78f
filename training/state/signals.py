"""SIGTERM and Ctrl-C: the step that is going on is saved, everything else stops at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# Seconds after which a step that does not end, such as a compilation, is given up; more where steps are slow.
GRACE = 8.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal asks for an end. No Exception, so that no library takes it for a failure of its own.

    Args:
        told: what is left of the run.
        agreed: whether all workers stop after the same step.
    """

    def __init__(self, told: str = "Stopped: the last checkpoint holds.", agreed: bool = False):
        super().__init__(told)
        self.agreed = agreed
        self.signal: int = signal.SIGTERM  # If another worker got it, we do not know.


class Stop:
    """Whether a signal has asked for an end, and what a signal does.

    Inside `waiting`, it sets `signal`, which the steps look at; a second signal, or a step that takes more than `grace`
    seconds, ends the process with what the last checkpoint holds. Elsewhere it raises `Stopped` where the main thread
    is.
    """

    def __init__(self):
        self.signal: int | None = None
        self.grace = GRACE
        self._waits = False
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signals inside; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, steps end before a signal has an effect."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def check(self) -> None:
        """Raises `Stopped` if a signal has come."""
        if self.signal is not None:
            self.in_time()
            raise Stopped

    def took(self, seconds: float) -> None:
        """Says how long a step took: a signal in the next one waits for it, however slow they are."""
        self.grace = max(GRACE, 2 * seconds)

    def in_time(self) -> None:
        """Says that the step has ended: now there is time to save."""
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, number, frame):
        if self.signal is not None:
            self._give_up("a second signal came")
        self.signal = number
        if not self._waits:
            raise Stopped
        self._timer = threading.Timer(
            self.grace, self._give_up, [f"the step did not end within {self.grace:.0f} seconds"]
        )
        self._timer.daemon = True
        self._timer.start()

    def _give_up(self, why):
        # No buffered print: the main thread may hold the stream.
        os.write(sys.stderr.fileno(), f"\nStopped without saving, since {why}: the last checkpoint holds.\n".encode())
        os._exit(128 + (self.signal or signal.SIGTERM))
