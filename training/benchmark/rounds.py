"""The processes of the benchmark's contenders, measured in interleaved rounds."""

import contextlib
import functools
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .peers import Spec

# Where this package is found, in a checkout and where it is installed.
ROOT = Path(__file__).parents[len(__package__.split("."))]
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Contenders share the GPU: none may reserve it all.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class ContenderError(Exception):
    """A contender cannot go on."""


class MissingPackage(ContenderError):
    """A contender needs a package that is not installed."""


class LimitExceeded(ContenderError):
    """A contender took longer than it may."""


def process_backend(spec: Spec) -> str:
    """Keras's backend in a contender's process.

    An exported file needs none; PyTorch first, since its CUDA build crashes where TensorFlow was imported before
    (torch 2.14, TensorFlow 2.21).
    """
    exported = spec.path and not spec.path.endswith(".keras")
    return "torch" if exported or not spec.backend else spec.backend


class Contender:
    """A process that runs one implementation when it is told to."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.facts: dict = {}
        self.medians: list[float] = []
        self._answers = b""  # What was read of them, and not yet used.
        # A file and not a pipe: nobody reads it while the process runs.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.contenders", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            env={**os.environ, **QUIET, "KERAS_BACKEND": process_backend(spec)},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked, self.answers = self.process.stdin, self.process.stdout

    def start(self) -> None:
        """Waits until the process is ready.

        Raises:
            ContenderError: where it ended, or took longer than the limit; so does `measure`.
        """
        self.facts = self._read()

    def measure(self, seconds: float) -> None:
        """Runs for so many seconds and keeps the median of a step."""
        with contextlib.suppress(BrokenPipeError):  # `_read` says why it ended.
            self.asked.write(f"{seconds}\n".encode())
            self.asked.flush()
        found = self._read()
        self.medians.append(statistics.median(found.pop("times")))
        self.facts |= found

    @property
    def seconds(self) -> float:
        """Of a step, in the median round."""
        return statistics.median(self.medians)

    def stop(self) -> None:
        """Ends the process, and those that it started, at once; a second time does nothing."""
        if self.asked.closed:
            return  # Another process may have its number by now.
        with contextlib.suppress(ProcessLookupError, PermissionError):  # It has ended already.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.asked, self.answers, self.errors):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> dict:
        line = self._line()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            last = ["", *self.errors.read().strip().splitlines()][-1]
            raise ContenderError(f"the process ended with status {status}. {last}".strip())
        answer = json.loads(line)
        if "missing" in answer:
            raise MissingPackage(answer["missing"])
        if "failed" in answer:
            raise ContenderError(answer["failed"])
        return answer

    def _line(self) -> bytes:
        """The next whole line of the process; nothing where it ended before."""
        pipe, limit = self.answers.fileno(), self.spec.limit
        end = None if limit is None else time.monotonic() + limit
        while b"\n" not in self._answers:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                raise LimitExceeded(f"round {len(self.medians) + 1}" if self.facts else "the start")
            found = os.read(pipe, 2**16)
            if not found:
                return b""
            self._answers += found
        line, _, self._answers = self._answers.partition(b"\n")
        return line


class Bench:
    """Measures contenders in interleaved rounds.

    Those that fail, take longer than their limit or are missing are said to, and the others go on.
    """

    def __init__(self) -> None:
        self.failed: dict[Spec, str] = {}
        self.exceeded: dict[Spec, str] = {}
        self.missing: dict[str, str] = {}

    def run_rounds(
        self, specs: list[Spec], rounds: int, seconds: float, keep: Callable[[list[Contender]], None] | None = None
    ) -> list[Contender]:
        """Starts the contenders one after the other, then measures each in every round (A B A B).

        Args:
            specs: of the contenders.
            rounds: how often each is measured.
            seconds: of each in a round.
            keep: called after each start and measurement, with those that are still running.

        Returns:
            Those that got through; their processes have ended.
        """
        with contextlib.ExitStack() as stack:
            running: list[Contender] = []

            def let(contender: Contender, action: Callable[[], None]) -> None:
                if not self._goes_on(contender, action):
                    running.remove(contender)
                if keep:
                    keep(running)

            for spec in specs:
                if spec in self.failed or spec in self.exceeded or spec.label in self.missing:
                    continue
                contender = Contender(spec)
                stack.callback(contender.stop)
                running.append(contender)
                let(contender, contender.start)
            for _ in range(rounds):
                for contender in list(running):
                    let(contender, functools.partial(contender.measure, seconds))
            return running

    def _goes_on(self, contender: Contender, action: Callable[[], None]) -> bool:
        spec = contender.spec
        what = f"{spec.mode}, batch {spec.batch}, size {spec.size}"
        try:
            action()
        except MissingPackage as error:
            self.missing[spec.label] = str(error)
            print(f"{spec.label} is missing: it needs the package {error}", flush=True)
        except LimitExceeded as error:
            contender.stop()  # The others have the machine.
            self.exceeded[spec] = str(error)
            print(f"{spec.label} exceeded the limit of {spec.limit:g} s in {error} ({what})", flush=True)
        except ContenderError as error:
            self.failed[spec] = str(error)
            print(f"{spec.label} failed ({what}): {error}", flush=True)
        else:
            return True
        return False
