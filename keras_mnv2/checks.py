"""The checks of numbers, choices and paths: each error names the argument, the value, and what is allowed.

The training's settings run this file without the package, whose import starts a backend.
"""

import numbers
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Choice = TypeVar("Choice")


def check_number(name: str, value: Any, allowed: str, fits: Callable[[Any], bool]) -> float:
    """`value` as a number of Python; raises `ValueError`, which says what is allowed, unless it is one that fits."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)
        if fits(plain):
            return plain
    raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def check_positive(name: str, value: Any, most: float = sys.float_info.max) -> float:
    """`value` as a number of Python; raises `ValueError` unless it is above 0 and at most `most`."""
    bound = f", and at most {most}" if most != sys.float_info.max else ""
    return check_number(name, value, f"a finite number above 0{bound}", lambda number: 0 < number <= most)


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an integer of Python; raises `ValueError` unless it is whole, and from `least` to `most`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):
        bound = f" and at most {most}" if most is not None else ""
        raise ValueError(f"{name} must be a whole number of at least {least}{bound}, got {value!r}.")
    return int(value)


def check_rate(name: str, value: Any) -> float:
    """`value` as a number of Python; raises `ValueError` unless it is from 0 up to, and not including, 1."""
    return check_number(name, value, "a number from 0 up to, and not including, 1", lambda number: 0 <= number < 1)


def check_choice(name: str, value: Any, allowed: Sequence[Choice]) -> Choice:
    """The one of `allowed` that `value` is; raises `ValueError` where it is none."""
    for choice in allowed:
        same = type(value) is type(choice) or (isinstance(value, numbers.Integral) and isinstance(choice, int))
        if same and not isinstance(value, bool) and value == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_flag(name: str, value: Any) -> bool:
    """`value` as True or False; raises `ValueError` where it is neither, such as a text."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def check_path(name: str, path: Any) -> Path:
    """`path` as a `Path`; raises `ValueError` where it is none, or empty."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise ValueError(f"{name} must be a path that is not empty, got {path!r}.")
    return Path(path)
