"""`python -m training [RECIPE] [--field value ...]`."""

import sys

import tyro

from training import memory
from training.config import Config
from training.recipes import digits

RECIPES = {"digits": digits}
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
    from training.train import run

    try:
        run(config)
    except (ValueError, ImportError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    memory.use_large_pages("training")
    main()
