"""`python -m tests [--backend NAME] [pytest arguments]`: lint, types, site, and tests, a process a backend."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

# All at once: most of JAX's time is compilation, on one core, and much of the others' is the start of processes.
BACKENDS = ("jax", "tensorflow", "torch")


def run(name: str, command: list[str], **environment: str) -> tuple[str, bool, float, str]:
    """Runs one part with its output shown, and gives its name, success, seconds and last line."""
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
        last = line.strip() or last
    return name, process.wait() == 0, time.perf_counter() - start, last


def main() -> int:
    """Runs all parts, prints one summary, and gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this backend; may be repeated")
    chosen, arguments = parser.parse_known_args()
    parts = [
        run("ruff check", ["ruff", "check", "."]),
        run("ruff format", ["ruff", "format", "--check", "."]),
    ]
    with tempfile.TemporaryDirectory() as site:
        # The variable leaves out a notice of the theme's about its future.
        command = ["mkdocs", "build", "--strict", "--site-dir", site]
        parts.append(run("mkdocs", command, NO_MKDOCS_2_WARNING="1"))
    # Which tests take long is shown, so that it can be said of them that they are slow.
    command = ["pytest", "-q", "--durations=80", "--durations-min=8", *arguments]
    with ThreadPoolExecutor(len(BACKENDS) + 1) as pool, tempfile.TemporaryDirectory() as scratch:
        for name in ("jax", "tmp"):
            os.mkdir(os.path.join(scratch, name))
        shared = {
            # Tests, and the processes that they start, compile the same programs again and again.
            "JAX_COMPILATION_CACHE_DIR": os.path.join(scratch, "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            # PyTorch's threads would wait for one another in loops that take the other processes' cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            # TFDS leaves folders behind; pytest's own stay where one looks for them.
            "TMPDIR": os.path.join(scratch, "tmp"),
            "PYTEST_DEBUG_TEMPROOT": tempfile.gettempdir(),
        }
        types = pool.submit(run, "mypy", ["mypy"])
        backends = chosen.backend or BACKENDS
        parts += pool.map(lambda backend: run(backend, command, KERAS_BACKEND=backend, **shared), backends)
        parts.append(types.result())
    print("\n== summary")
    passed = failed = 0
    for name, fine, seconds, last in parts:
        print(f"{name:12} {'passed' if fine else 'FAILED'} {seconds:6.0f} s  {last}")
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", last)}
        if name in BACKENDS and counts:
            passed += counts.get("passed", 0)
            failed += counts.get("failed", 0) + counts.get("error", 0)
        else:
            passed, failed = passed + fine, failed + (not fine)
    ok = all(fine for _, fine, _, _ in parts)
    print(f"{passed} passed, {max(failed, 0 if ok else 1)} failed")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
