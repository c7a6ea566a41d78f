"""Pickles of PyTorch, carried out by a machine that can call nothing."""

import functools
import math
import pickletools
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

# NumPy has no bfloat16: these are read as the upper halves of float32.
_BFLOAT16 = "bfloat16"
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict")
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
# A tensor takes 30 operations of a pickle; the limit bounds time and memory.
_MOST_OPERATIONS = 2**22
_MOST_AXES = 32


def widened(halves: np.ndarray) -> np.ndarray:
    """float32 values of those whose upper 16 bits are given, which is what bfloat16 is."""
    return (halves.astype("uint32") << 16).view("float32")


class Unknown(dict):
    """Stands for a name of the file, and for what that would make: with its items, in case it was a dictionary."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.state = name, None


class Storage:
    """The numbers that tensors are views of; `read` gives their bytes."""

    def __init__(self, dtype: str, length: int, read: Callable[[], Any] | None = None) -> None:
        self.dtype, self.length, self.read = dtype, length, read
        self.itemsize = 2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize

    @functools.cached_property
    def values(self) -> np.ndarray:
        if self.read is None:
            raise ValueError("a tensor has a storage that the file lacks")
        data = self.read()
        return widened(np.frombuffer(data, "uint16")) if self.dtype == _BFLOAT16 else np.frombuffer(data, self.dtype)


class Tensor:
    """A view of a storage, by shape and strides in elements."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        values = self.storage.values
        axes = [axes for axes in (self.shape, self.strides) if isinstance(axes, tuple) and len(axes) <= _MOST_AXES]
        numbers = (self.offset, *sum(axes, ()))
        if len(set(map(len, axes))) > 1 or len(axes) < 2 or any(type(n) is not int or n >> 48 for n in numbers):
            raise ValueError("a tensor has a shape, strides or offset that no tensor has")
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        # A view beyond its storage, or one that repeats it, is no tensor of a checkpoint.
        if count and (last >= len(values) or count > len(values)):
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its {len(values)} values")
        return np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, [step * values.itemsize for step in self.strides]
        )


class Bounded:
    """A file that is asked for no more than it has: a pickle may say that a text of gigabytes follows."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.ended = file, size, False
        self.tell, self.readline = file.tell, file.readline

    def read(self, count: int) -> bytes:
        left = self.size - self.tell()
        self.ended |= count > left
        return self.file.read(min(count, left))

    def numbers(self, count: int) -> bytearray:
        """The next bytes, all of them."""
        data = self.read(count)
        if len(data) != count:
            raise EOFError("it ends within the numbers of a tensor")
        return bytearray(data)


class Machine:
    """Carries out a pickle's operations, none of which calls anything: names stay names.

    Args:
        storage: gives what a persistent id stands for, mostly a storage.
    """

    def __init__(self, storage: Callable[[Any], Any]) -> None:
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Bounded) -> Any:
        """What the next pickle of a file makes."""
        try:
            # It reads and asks where it is: `Bounded` need not be a whole file.
            for count, (operation, value, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
                if count > _MOST_OPERATIONS:
                    raise ValueError(f"it has more than {_MOST_OPERATIONS} operations")
                if operation.name != "STOP":
                    self._do(operation.name, value)
            return self.stack.pop()
        except Exception as error:
            if file.ended:
                raise EOFError("it ends within a pickle") from error
            raise error if isinstance(error, ValueError) else ValueError("its pickle is corrupt") from error

    def _do(self, name: str, value: Any) -> None:
        stack, pop = self.stack, self.stack.pop
        if name in _VALUES:
            stack.append(value)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if value is None else value] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            makers: dict[str, Callable[[list], Any]] = {"TUPLE": tuple, "LIST": list, "DICT": _dictionary}
            stack.append(makers.get(name, _nothing)(self._marked()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [pop()] if name == "APPEND" else self._marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            value, key = (pop(), pop()) if name == "SETITEM" else (None, None)
            items = [key, value] if name == "SETITEM" else self._marked()
            if isinstance(stack[-1], dict):
                stack[-1].update(_dictionary(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            attribute, module = (pop(), pop()) if value is None else reversed(value.split(" ", 1))
            stack.append(Unknown(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = pop()
            stack.append(_made(pop(), arguments))
        elif name == "NEWOBJ_EX":
            del stack[-2:]
        elif name in ("INST", "OBJ"):
            items = self._marked()
            stack.append(Unknown(items[0].name if value is None else value.replace(" ", ".")))
        elif name == "BUILD":
            state = pop()
            if isinstance(stack[-1], Unknown):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(self.storage(pop()))
        elif name == "POP":
            pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the operation {name}, which no file of tensors needs")

    def _marked(self) -> list[Any]:
        """Takes what lies above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _nothing(*_: Any) -> Unknown:
    return Unknown("builtins.set")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": _nothing,
}


def _dictionary(items: Sequence[Any]) -> dict[str, Any]:
    """Of keys and values in turn; only texts are names, and nothing else is worth hashing."""
    return {key: value for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str)}


def _made(function: Any, arguments: Any) -> Any:
    """What a call in a pickle would give, where that is a tensor or a dictionary."""
    if not isinstance(function, Unknown) or not isinstance(arguments, tuple):
        raise ValueError("it calls what is no name")
    if function.name in _TENSORS:
        if len(arguments) < 4 or not isinstance(arguments[0], Storage):
            raise ValueError("it has a tensor without a storage")
        return Tensor(*arguments[:4])
    if function.name in _PARAMETERS:
        return arguments[0]
    if function.name == "torch._tensor._rebuild_from_type_v2":
        return _made(arguments[0], arguments[2])
    if function.name in _DICTIONARIES:
        # Python 2 gave the items at once. They are taken out of their list, so that no list is gone through twice.
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        items = [part for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 for part in pair]
        pairs.clear()
        return _dictionary(items)
    return Unknown(function.name)


def named_storage(pid: Any, storages: dict[str, Storage], read: Callable[[str], Any] | None = None) -> Any:
    """The storage that a persistent id names, each once; or the class of a module that was saved whole."""
    if pid[0] == "module":
        return pid[1]
    kind, dtype, key, _, length, *view = pid
    name = dtype.name.rpartition(".")[2] if isinstance(dtype, Unknown) else repr(dtype)
    if kind != "storage" or name not in _STORAGES or not isinstance(key, str) or type(length) is not int:
        raise ValueError(f"it has a storage of {name}")
    if view and view[0] is not None:
        raise ValueError("it has a storage that is a part of another one")
    if key not in storages:
        storages[key] = Storage(_STORAGES[name], length, read and functools.partial(read, key))
    return storages[key]
