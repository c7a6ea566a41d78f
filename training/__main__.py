"""`python -m training [RECIPE] [--field value ...]` in a checkout, `keras-mnv2 train ...` where it is installed."""

import os
import shlex
import sys
from collections.abc import Sequence

from . import process, ranges
from .config import Config
from .process import fail
from .recipes import cifar10, detection, digits, paper, segmentation, torchvision, torchvision_v2, transfer

RECIPES = {
    "digits": digits,
    "transfer": transfer,
    "cifar10": cifar10,
    "paper": paper,
    "torchvision": torchvision,
    "torchvision_v2": torchvision_v2,
    "segmentation": segmentation,
    "detection": detection,
}
DEFAULT = "digits"


def main(words: Sequence[str] | None = None, own_process: bool = False) -> None:
    """Runs the recipe that the words of a command line name, those of this process by default.

    Args:
        words: the recipe and its fields.
        own_process: whether this process is the command's, which may start it again with large pages.
    """
    name, arguments = split(sys.argv[1:] if words is None else words)
    config = settings(name, arguments)
    # After the parsing, so that --help and mistakes do not wait for a backend.
    if own_process:
        process.use_large_pages()
    try:
        from .run.train import run
        from .state.signals import Stopped
    except ModuleNotFoundError as error:
        fail(f'The training needs {error.name}: pip install "keras_mnv2[train]".')

    try:
        run(config, repeated(name, arguments))
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.signal)


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe's name, `digits` where there is none, and the fields."""
    if words and not words[0].startswith("-"):
        return words[0], list(words[1:])
    return DEFAULT, list(words)


def settings(name: str, arguments: list[str]) -> Config:
    """The settings that a command line means; ends the process with one sentence where they are not allowed."""
    if name not in RECIPES:
        fail(f"The recipe must be one of {', '.join(RECIPES)}, got {name!r}.")
    listing = "\n\n".join(f"{recipe}: {(module.__doc__ or '').splitlines()[0]}" for recipe, module in RECIPES.items())
    return ranges.parsed(
        Config,
        prog=f"{process.COMMAND} {name}",
        description=f"Trains MobileNetV2. Recipes (the first argument; {DEFAULT} by default):\n\n{listing}",
        default=RECIPES[name].CONFIG,
        args=arguments,
    )


def repeated(recipe: str, arguments: list[str]) -> str:
    """The command that repeats a run, in a new folder."""
    kept = list(arguments)
    for flag in ("--run-dir", "--run_dir"):
        if flag in kept:
            del kept[kept.index(flag) : kept.index(flag) + 2]
    kept = [word for word in kept if not word.startswith(("--run-dir=", "--run_dir=")) and word != "--resume"]
    backend = os.environ.get("KERAS_BACKEND")
    command = os.environ.get(process.LAUNCH, process.COMMAND)
    return f"{f'KERAS_BACKEND={backend} ' if backend else ''}{command} {shlex.join([recipe, *kept])}"


if __name__ == "__main__":
    main(own_process=True)
