"""The processes of the benchmark's contenders, and whose turn it is."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from training.peers import Spec

ROOT = Path(__file__).parent.parent
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
        # A file and not a pipe: nobody reads it while the process runs.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.contenders", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **QUIET, "KERAS_BACKEND": process_backend(spec)},
            start_new_session=True,
        )

    def start(self) -> None:
        """Waits until the process is ready."""
        self.facts = self._read()

    def turn(self, seconds: float) -> None:
        """Runs for so many seconds and keeps the median of a step."""
        with contextlib.suppress(BrokenPipeError):  # `_read` says why it ended.
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        found = self._read()
        self.medians.append(statistics.median(found.pop("times")))
        self.facts |= found

    @property
    def seconds(self) -> float:
        """Of a step, in the median turn."""
        return statistics.median(self.medians)

    def stop(self) -> None:
        """Ends the process, and those that it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # It has ended already.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
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


class Bench:
    """Lets contenders take turns; those that fail or are missing are said to be, and the others go on."""

    def __init__(self) -> None:
        self.failed: dict[Spec, str] = {}
        self.missing: dict[str, str] = {}

    def take_turns(self, specs: list[Spec], rounds: int, seconds: float) -> list[Contender]:
        """Starts the contenders one after the other, then gives each its turn, `rounds` times (A B A B).

        Returns:
            Those that got through; their processes have ended.
        """
        with contextlib.ExitStack() as stack:
            running = []
            for spec in specs:
                if spec in self.failed or spec.label in self.missing:
                    continue
                contender = Contender(spec)
                stack.callback(contender.stop)
                if self._goes_on(contender, contender.start):
                    running.append(contender)
            for _ in range(rounds):
                running = [c for c in running if self._goes_on(c, lambda c=c: c.turn(seconds))]
            return running

    def _goes_on(self, contender: Contender, action) -> bool:
        spec = contender.spec
        try:
            action()
        except MissingPackage as error:
            self.missing[spec.label] = str(error)
            print(f"{spec.label} is missing: it needs the package {error}", flush=True)
        except ContenderError as error:
            self.failed[spec] = str(error)
            print(f"{spec.label} failed ({spec.mode}, batch {spec.batch}, size {spec.size}): {error}", flush=True)
        return spec not in self.failed and spec.label not in self.missing
