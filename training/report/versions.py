"""The versions of what a run's numbers depend on."""

import platform
from collections.abc import Iterable
from importlib import metadata

PACKAGES = ("keras_mnv2", "keras", "numpy", "tensorflow", "jax", "torch")


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that the numbers depend on and of `more`, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
