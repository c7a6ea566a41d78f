"""`python -m training [RECIPE] [--field value ...]`."""

import os
import shlex
import sys

import tyro

from training import memory
from training.config import Config
from training.recipes import cifar10, digits, paper, torchvision, torchvision_v2, transfer

RECIPES = {
    "digits": digits,
    "transfer": transfer,
    "cifar10": cifar10,
    "paper": paper,
    "torchvision": torchvision,
    "torchvision_v2": torchvision_v2,
}
DEFAULT = "digits"


def main() -> None:
    """Runs the recipe that the command line names, `digits` by default."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else DEFAULT
    if name not in RECIPES:
        sys.exit(f"The recipe must be one of {', '.join(RECIPES)}, got {name!r}.")
    listing = "\n\n".join(f"{recipe}: {module.__doc__.splitlines()[0]}" for recipe, module in RECIPES.items())
    config = tyro.cli(
        Config,
        prog=f"python -m training {name}",
        description=f"Trains MobileNetV2. Recipes (the first argument; {DEFAULT} by default):\n\n{listing}",
        default=RECIPES[name].CONFIG,
        args=arguments,
    )
    # After the parsing, so that --help does not wait for a backend.
    from training.stopping import Stopped
    from training.train import run

    try:
        run(config, repeated(name, arguments))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        sys.exit(128 + stopped.signal)


def repeated(recipe: str, arguments: list[str]) -> str:
    """The command that repeats a run, in a new folder."""
    kept = list(arguments)
    for flag in ("--run-dir", "--run_dir"):
        if flag in kept:
            del kept[kept.index(flag) : kept.index(flag) + 2]
    kept = [word for word in kept if not word.startswith(("--run-dir=", "--run_dir=")) and word != "--resume"]
    backend = os.environ.get("KERAS_BACKEND")
    return f"{f'KERAS_BACKEND={backend} ' if backend else ''}{shlex.join(['python', '-m', 'training', recipe, *kept])}"


if __name__ == "__main__":
    memory.use_large_pages("training")
    main()
