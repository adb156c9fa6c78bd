"""Kinds of values that JSON does not have: which there are, and how those of numpy and torch become texts and numbers.

Imports numpy and torch only when it meets a value of theirs.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import typing
import uuid
from collections.abc import Callable, Mapping
from typing import Any

TAG = "$"
MAX_BYTES = 1 << 20  # of one array or bytes object; larger ones must be tensors
FACTORIES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "set": set}
PATHS: dict[str, type[pathlib.PurePath]] = {
    "path": type(pathlib.Path()),
    "posix path": pathlib.PurePosixPath,
    "windows path": pathlib.PureWindowsPath,
}
#: Kinds that a text represents completely: type, how to write it, how to read it.
TEXTS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "fraction": (fractions.Fraction, str, fractions.Fraction),
    "uuid": (uuid.UUID, str, uuid.UUID),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    **{name: (kind, str, kind) for name, kind in PATHS.items()},
}
TEXT_OF = {kind: (name, write, read) for name, (kind, write, read) in TEXTS.items()}
#: Kinds of torch's own, by the names of their types.
TORCH = ("dtype", "layout", "memory_format")

Classes = Mapping[str, type]


class ValueRefused(ValueError):
    """A value that would not be read back equal; the text is one sentence that names its place."""


def is_own_kind(cls: Any) -> bool:
    """Whether values of this class are rebuilt by the class's name: an enum, a dataclass or a named tuple."""
    if not isinstance(cls, type):
        return False
    if issubclass(cls, enum.Enum):
        return True
    return dataclasses.is_dataclass(cls) or (issubclass(cls, tuple) and hasattr(cls, "_fields"))


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def find_class(name: str, known: Classes) -> type | None:
    """The class of this name. A script's module is `__main__` in the process that runs it, and has its own name in
    others, so both match."""
    if name in known:
        return known[name]
    main = "__main__."
    matching = [
        cls
        for theirs, cls in known.items()
        if name == main + cls.__qualname__ or (theirs.startswith(main) and name.endswith(f".{cls.__qualname__}"))
    ]
    return matching[0] if len(matching) == 1 else None


def classes(*roots: Any) -> dict[str, type]:
    """The classes, by name, of which values like `roots` may be rebuilt: those in values, in annotations, and in the
    fields of the classes found."""
    found: dict[str, type] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, type):
            if is_own_kind(one):
                found.setdefault(class_name(one), one)
                waiting.extend(_hints(one).values())
        elif isinstance(one, Mapping):
            waiting.extend([*one.keys(), *one.values()])
        elif isinstance(one, (list, tuple, set, frozenset, collections.deque)):
            waiting.extend([type(one), *one])
        elif is_own_kind(type(one)):
            waiting.append(type(one))
            if dataclasses.is_dataclass(one):
                waiting.extend(getattr(one, f.name, None) for f in dataclasses.fields(one))
        else:
            waiting.extend(typing.get_args(one))
    return found


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):  # annotations with names that only type checkers know
        return {}


def what(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    if callable(value) and hasattr(value, "__qualname__"):
        return "a function"
    name = type(value).__qualname__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def as_base64(data: bytes, where: str) -> str:
    if len(data) > MAX_BYTES:
        raise ValueRefused(f"{where} has {len(data)} bytes, and values at most {MAX_BYTES}; make it a tensor")
    return base64.b64encode(data).decode()


# ---- numpy and torch ---


def encode_numpy(numpy: Any, value: Any, kind: type, where: str) -> Any:
    if isinstance(value, numpy.dtype):
        if value.hasobject or value.names:
            raise ValueRefused(f"{where} is the dtype {value}, which is not kept")
        return tagged("numpy.dtype", value.str)
    if kind is numpy.ndarray or isinstance(value, numpy.generic):
        dtype = value.dtype
        if dtype.hasobject or dtype.names or not dtype.isnative or not dtype.itemsize:
            raise ValueRefused(f"{where} is a numpy {kind.__name__} of {dtype}, which is not kept; use numbers")
        data = as_base64(value.tobytes(), where)
        if kind is numpy.ndarray:
            return tagged("numpy.ndarray", data, dtype=dtype.str, shape=list(value.shape))
        return tagged("numpy", data, dtype=dtype.str)
    raise ValueRefused(f"{where} is {what(value)}, which is not kept; keep its state as arrays or numbers")


def decode_numpy(kind: str, of: str, coded: dict[str, Any]) -> Any:
    import numpy

    if kind == "numpy.dtype":
        return numpy.dtype(of)
    dtype = numpy.dtype(coded["dtype"])
    if dtype.hasobject:
        raise ValueRefused("a value is an array of objects")
    data = base64.b64decode(of)
    array = numpy.frombuffer(data, dtype) if data else numpy.empty(0, dtype)
    return array.reshape(coded["shape"]).copy() if kind == "numpy.ndarray" else array[0]


def decode_torch(kind: str, of: Any) -> Any:
    import torch

    if kind == "Size":
        return torch.Size(of)
    if kind == "device":
        return torch.device(of)
    if kind not in TORCH:
        raise ValueRefused(f"a value is of the kind torch.{kind[:100]}, which is not known to this version")
    found = getattr(torch, of)
    if type(found) is not getattr(torch, kind):
        raise ValueRefused(f"a value is torch.{of[:100]}, which is no {kind}")
    return found


def tagged(kind: str, of: Any, **more: Any) -> dict[str, Any]:
    """The code of a value of a kind that JSON does not have."""
    return {TAG: kind, "of": of, **more}
