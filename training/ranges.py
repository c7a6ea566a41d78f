"""The kinds of settings, and their checks: an error names the setting, its value and what is allowed."""

import contextlib
import functools
import importlib.util
import io
import math
import re
import runpy
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .process import fail

_BOX = re.compile("[\u2500-\u257f]+|-{5,}")


def _library_checks() -> types.SimpleNamespace:
    """The library's checks of arguments. The library itself is not imported: `--help` would wait for a backend."""
    library = importlib.util.find_spec("keras_mnv2")
    assert library is not None
    assert library.submodule_search_locations is not None
    return types.SimpleNamespace(**runpy.run_path(str(Path(library.submodule_search_locations[0], "checks.py"))))


_library = _library_checks()


def _rows(width: int) -> Callable[[str, Any], tuple[tuple[int, ...], ...]]:
    """The check of rows of whole numbers from 1 on, of which the last one is 1 or 2."""

    def check(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
        rows = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        try:
            if not rows or not all(isinstance(row, Sequence) and len(row) == width and row[-1] <= 2 for row in rows):
                raise ValueError
            return tuple(tuple(_library.check_whole(name, number) for number in row) for row in rows)
        except (ValueError, TypeError):
            raise ValueError(
                f"{name} must be rows of {width} whole numbers of at least 1, the last 1 or 2, got {value!r}."
            ) from None

    return check


def _positive_numbers(count: int) -> Callable[[str, Any], tuple[float, ...]]:
    """The check of so many numbers above 0."""

    def check(name: str, value: Any) -> tuple[float, ...]:
        try:
            if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
                raise ValueError
            return tuple(float(_library.check_positive(name, number)) for number in value)
        except (ValueError, TypeError):
            raise ValueError(f"{name} must be {count} finite numbers above 0, got {value!r}.") from None

    return check


def _whole(least: int, most: int | None = None) -> Callable[[str, Any], int]:
    return functools.partial(_library.check_whole, least=least, most=most)


def _number(allowed: str, fits: Callable[[Any], bool]) -> Callable[[str, Any], float]:
    return functools.partial(_library.check_number, allowed=allowed, fits=fits)


_COUNT = _whole(1)
# Sides that the network takes, as large as photographs are.
_SIDE = _whole(32, 8192)
_PIXELS = _whole(1, 16384)
# Processes and devices have no more, and memory is taken for each.
_MANY = _whole(1, 1024)
_POSITIVE, _RATE = _library.check_positive, _library.check_rate
_PART = _number("a number above 0 and at most 1", lambda x: 0 < x <= 1)

# The annotations of settings; the second part is what --help shows.
Count = Annotated[int, _COUNT, tyro.conf.arg(metavar="INT>=1")]
MaybeCount = Annotated[int | None, _COUNT, tyro.conf.arg(metavar="None|INT>=1")]
CountOr0 = Annotated[int, _whole(0), tyro.conf.arg(metavar="INT>=0")]
Batch = Annotated[int, _whole(1, 2**20), tyro.conf.arg(metavar="1..1048576")]
Many = Annotated[int | None, _MANY, tyro.conf.arg(metavar="None|1..1024")]
Seed = Annotated[int, _whole(0, 2**32 - 1), tyro.conf.arg(metavar="0..4294967295")]
Side = Annotated[int, _SIDE, tyro.conf.arg(metavar="32..8192")]
MaybeSide = Annotated[int | None, _SIDE, tyro.conf.arg(metavar="None|32..8192")]
MaybePixels = Annotated[int | None, _PIXELS, tyro.conf.arg(metavar="None|1..16384")]
Positive = Annotated[float, _POSITIVE, tyro.conf.arg(metavar="FLOAT>0")]
MaybePositive = Annotated[float | None, _POSITIVE, tyro.conf.arg(metavar="None|FLOAT>0")]
Amount = Annotated[
    float, _number("a finite number of at least 0", lambda x: 0 <= x < math.inf), tyro.conf.arg(metavar="FLOAT>=0")
]
Fraction = Annotated[
    float, _number("a number from 0 to 1", lambda x: 0 <= x <= 1), tyro.conf.arg(metavar="0<=FLOAT<=1")
]
Rate = Annotated[float, _RATE, tyro.conf.arg(metavar="0<=FLOAT<1")]
MaybeRate = Annotated[float | None, _RATE, tyro.conf.arg(metavar="None|0<=FLOAT<1")]
Factor = Annotated[
    float, _number("a finite number of at least 1", lambda x: 1 <= x < math.inf), tyro.conf.arg(metavar="FLOAT>=1")
]
Part = Annotated[float, _PART, tyro.conf.arg(metavar="0<FLOAT<=1")]
MaybePart = Annotated[float | None, _PART, tyro.conf.arg(metavar="None|0<FLOAT<=1")]
# On the command line a flag, which may also be left out.
MaybeFlag = Annotated[bool | None, _library.check_flag, tyro.conf.DisallowNone]
Stages = Annotated[tuple[tuple[int, int, int, int], ...] | None, _rows(4)]
# Of the six maps of a detector, and one more.
Scales = Annotated[tuple[float, ...] | None, _positive_numbers(7)]


def checked(name: str, kind: Any, value: Any) -> Any:
    """`value` as a setting of this kind: one of the above, a `Literal`, `bool`, `str` or `Path`, or None besides.

    Raises:
        ValueError: where it is none.
    """
    if typing.get_origin(kind) is Annotated:
        kind, check = typing.get_args(kind)[:2]
        if value is None and type(None) in typing.get_args(kind):
            return None
        value = check(name, value)
        return float(value) if float in (kind, *typing.get_args(kind)) else value
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return _library.check_choice(name, value, typing.get_args(kind))
    if kind is bool:
        return _library.check_flag(name, value)
    if kind is Path:
        return _library.check_path(name, value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text that is not empty, got {value!r}.")
    return value


def parsed(kind: type, **how: Any) -> Any:
    """The settings of a command line, by `tyro.cli`; where one is not allowed, the process ends with one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, **how)
    except SystemExit as ended:
        # Around what it says tyro draws a box, of lines as short as the terminal.
        if isinstance(ended.__context__, ValueError):
            fail(ended.__context__)
        if ended.code:
            fail(_BOX.sub(" ", said.getvalue()))
        raise


def check_all(settings: Any) -> None:
    """Checks every field of a dataclass by its annotation, and makes its value a plain one."""
    for name, kind in typing.get_type_hints(type(settings), include_extras=True).items():
        # The class is frozen.
        object.__setattr__(settings, name, checked(name, kind, getattr(settings, name)))
