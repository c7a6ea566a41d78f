"""Python in a process of its own, for what converts a file or runs it."""

import os
import subprocess
import sys
from typing import Any


def run_python(*arguments: Any, backend: str = "tensorflow") -> None:
    """Runs Python with these arguments; what goes wrong in it is one sentence."""
    # A child that needs no accelerator: the parent may hold all of its memory.
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    # What the caller can import, such as modules with layers of their own, the child can too.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-P", "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"The export failed in its own process: {_cause(lines)}")


def _cause(lines: list[str]) -> str:
    """The line that names an exception, the last that starts as one does; or the last line."""
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    return (errors or lines)[-1][:500]
