"""The kinds of settings, and their checks: an error names the setting, its value and what is allowed.

The wording is that of the library's arguments. The library itself is not imported: `--help` would wait for a backend.
"""

import contextlib
import io
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from .process import fail


@dataclass(frozen=True)
class Range:
    """What values of a kind are allowed.

    Attributes:
        words: for errors.
        fits: whether a number is allowed.
        whole: whether it must be whole.
    """

    words: str
    fits: Callable[[Any], bool]
    whole: bool = False

    def check(self, name: str, value: Any) -> int | float:
        """`value` as a number of Python; raises `ValueError` where it is not allowed."""
        if not self.allows(value):
            raise ValueError(f"{name} must be {self.words}, got {value!r}.")
        return int(value) if self.whole else float(value)

    def allows(self, value: Any) -> bool:
        """Whether `value` is such a number; a flag is none."""
        kind = numbers.Integral if self.whole else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and self.fits(value)


@dataclass(frozen=True)
class Rows:
    """Rows of whole numbers from 1 on; in each the last one is 1 or 2."""

    width: int

    def check(self, name: str, value: Any) -> tuple[tuple[int, ...], ...]:
        """`value` as tuples; raises `ValueError` where it is not allowed."""
        rows = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        if not rows or not all(map(self._is_row, rows)):
            raise ValueError(
                f"{name} must be rows of {self.width} whole numbers of at least 1, the last 1 or 2, got {value!r}."
            )
        return tuple(tuple(map(int, row)) for row in rows)

    def _is_row(self, row):
        numbered = isinstance(row, Sequence) and len(row) == self.width
        return numbered and all(map(_COUNT.allows, row)) and row[-1] <= 2


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def check(self, name: str, value: Any) -> bool:
        """`value`; raises `ValueError` where it is neither."""
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")
        return value


_BOX = re.compile("[\u2500-\u257f]+|-{5,}")


def _between(least, most):
    return Range(f"a whole number of at least {least} and at most {most}", lambda n: least <= n <= most, whole=True)


_COUNT = Range("a whole number of at least 1", lambda n: n >= 1, whole=True)
_COUNT_OR_0 = Range("a whole number of at least 0", lambda n: n >= 0, whole=True)
# Sides that the network takes, as large as photographs are.
_SIDE = _between(32, 8192)
_PIXELS = _between(1, 16384)
# Processes and devices have no more, and memory is taken for each.
_MANY = _between(1, 1024)
_POSITIVE = Range("a finite number above 0", lambda x: 0 < x < math.inf)
_RATE = Range("a number from 0 up to, and not including, 1", lambda x: 0 <= x < 1)
_PART = Range("a number above 0 and at most 1", lambda x: 0 < x <= 1)

# The annotations of settings; the second part is what --help shows.
Count = Annotated[int, _COUNT, tyro.conf.arg(metavar="INT>=1")]
MaybeCount = Annotated[int | None, _COUNT, tyro.conf.arg(metavar="None|INT>=1")]
CountOr0 = Annotated[int, _COUNT_OR_0, tyro.conf.arg(metavar="INT>=0")]
Batch = Annotated[int, _between(1, 2**20), tyro.conf.arg(metavar="1..1048576")]
Many = Annotated[int | None, _MANY, tyro.conf.arg(metavar="None|1..1024")]
Seed = Annotated[int, _between(0, 2**32 - 1), tyro.conf.arg(metavar="0..4294967295")]
Side = Annotated[int, _SIDE, tyro.conf.arg(metavar="32..8192")]
MaybeSide = Annotated[int | None, _SIDE, tyro.conf.arg(metavar="None|32..8192")]
MaybePixels = Annotated[int | None, _PIXELS, tyro.conf.arg(metavar="None|1..16384")]
Positive = Annotated[float, _POSITIVE, tyro.conf.arg(metavar="FLOAT>0")]
MaybePositive = Annotated[float | None, _POSITIVE, tyro.conf.arg(metavar="None|FLOAT>0")]
Amount = Annotated[
    float, Range("a finite number of at least 0", lambda x: 0 <= x < math.inf), tyro.conf.arg(metavar="FLOAT>=0")
]
Share = Annotated[float, Range("a number from 0 to 1", lambda x: 0 <= x <= 1), tyro.conf.arg(metavar="0<=FLOAT<=1")]
Rate = Annotated[float, _RATE, tyro.conf.arg(metavar="0<=FLOAT<1")]
MaybeRate = Annotated[float | None, _RATE, tyro.conf.arg(metavar="None|0<=FLOAT<1")]
Part = Annotated[float, _PART, tyro.conf.arg(metavar="0<FLOAT<=1")]
MaybePart = Annotated[float | None, _PART, tyro.conf.arg(metavar="None|0<FLOAT<=1")]
# On the command line a flag, which may also be left out.
MaybeFlag = Annotated[bool | None, Flag(), tyro.conf.DisallowNone]
Stages = Annotated[tuple[tuple[int, int, int, int], ...] | None, Rows(4)]


def checked(name: str, kind: Any, value: Any) -> Any:
    """`value` as a setting of this kind: one of the above, a `Literal`, `bool`, `str` or `Path`, or None besides.

    Raises:
        ValueError: where it is none.
    """
    if typing.get_origin(kind) is Annotated:
        kind, allowed = typing.get_args(kind)[:2]
        if value is None and type(None) in typing.get_args(kind):
            return None
        return allowed.check(name, value)
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        return value
    if kind is bool:
        return Flag().check(name, value)
    if not isinstance(value, str if kind is str else str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{name} must be {'a text' if kind is str else 'a path'} that is not empty, got {value!r}.")
    return kind(value)


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
