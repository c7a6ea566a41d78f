"""`python -m training.experiments NAME --out FOLDER`: an experiment of the paper, with its tables and picture."""

import importlib
import os
import sys
from collections.abc import Sequence

from .. import process, ranges
from ..process import fail
from .options import EXPERIMENTS


def main(words: Sequence[str] | None = None, own_process: bool = False) -> None:
    """Runs the experiment that the words of a command line name, those of this process by default.

    Args:
        words: the name and its settings.
        own_process: whether this process is the command's, which may start it again with large pages.
    """
    words = list(sys.argv[1:] if words is None else words)
    command = f"python -m {process.PACKAGE}.experiments"
    told = ", ".join(EXPERIMENTS)
    if words[:1] in (["--help"], ["-h"]):
        print(f"{command} NAME --out FOLDER, where NAME is one of {told}; NAME --help shows the other settings.")
        sys.exit()
    if not words or words[0] not in EXPERIMENTS:
        fail(f"The experiment must be one of {told}, got {words[0]!r}." if words else f"Name an experiment: {told}.")
    name, *arguments = words
    kind = EXPERIMENTS[name]
    options = ranges.parsed(kind, prog=f"{command} {name}", description=kind.__doc__, args=arguments)
    # After the parsing, so that --help and mistakes do not wait for a backend.
    if own_process:
        process.use_large_pages()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        experiment = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        fail(f'The experiment needs {error.name}: pip install "keras_mnv2[train]".')
    try:
        experiment.run(options)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from results.json.", file=sys.stderr)
        sys.exit(130)
    print(f"\nresults.json, table.md and {name}.png are in {options.out}")


if __name__ == "__main__":
    main(own_process=True)
