"""How the process of `keras-mnv2 train` starts, which is settled before Keras is imported."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

COMMANDS = ("keras-mnv2", "keras-mnv2.exe")


def training(module: str) -> ModuleType:
    """A module of the training, which is installed inside this package, and in a checkout lies beside it."""
    package = "keras_mnv2.training"
    if importlib.util.find_spec(package) is None:
        package, checkout = "training", str(Path(__file__).parents[1])
        sys.path[:0] = [] if checkout in sys.path else [checkout]
    return importlib.import_module(f"{package}.{module}")


def is_training(words: Sequence[str]) -> bool:
    """Whether the words of a whole command line, Python's own included, are those of `keras-mnv2 train`.

    Examples:
        >>> is_training(["python", "-m", "keras_mnv2", "train", "digits"])
        True
    """
    triples = zip(words, words[1:], words[2:], strict=False)
    return any(
        command == "train" and (Path(name).name in COMMANDS or (before, name) == ("-m", "keras_mnv2"))
        for before, name, command in triples
    )


# The process may start itself again, with other settings of its memory: the second one alone waits for Keras.
if is_training(sys.orig_argv) and "keras" not in sys.modules:
    training("process").use_large_pages()
