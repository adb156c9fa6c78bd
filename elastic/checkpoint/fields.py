"""What the fields of a manifest may be. Each of these refuses what cannot be true."""

from __future__ import annotations

import math
from typing import Any

from elastic.errors import CheckpointError

MAX_NAME = 1000
MAX_DIMS = 32

#: Bytes of an element, by the name of its dtype.
ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}

#: dtype and global shape of a tensor.
Head = tuple[str, tuple[int, ...]]


def check_name(name: str) -> None:
    """Refuse tensor names that could climb out of the folder or mean something to a URL.

    Raises:
        CheckpointError: the name is absolute or very long, has an empty or `..` part, or control characters.
    """
    parts = name.split("/")
    plain = name and len(name) <= MAX_NAME and "://" not in name
    if not plain or any(p in ("", ".", "..") for p in parts) or any(ord(c) < 32 for c in name):
        raise CheckpointError(f"tensor name {name[:MAX_NAME]!r} is not a plain relative name")


def head_of(name: str, dtype: Any, shape: Any) -> Head:
    """Parse what a manifest says about a tensor.

    Raises:
        CheckpointError: a name, dtype or shape that no tensor has.
    """
    check_name(name)
    sizes = ints(shape)
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"tensor {name!r} has the unknown dtype {str(dtype)[:100]!r}")
    item = ITEM_BYTES[dtype]
    if len(sizes) > MAX_DIMS or any(s < 0 for s in sizes) or math.prod(max(s, 1) for s in sizes) * item >= 1 << 63:
        raise CheckpointError(f"tensor {name!r} has the shape {str(sizes)[:200]}")
    return dtype, sizes


def integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:100]!r} should be a whole number")
    return value


def number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{str(value)[:100]!r} should be a number")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:100]!r} should be a text")
    return value


def items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:100]!r} should be a list")
    return value


def members(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:100]!r} should be an object")
    return value


def ints(value: Any) -> tuple[int, ...]:
    return tuple(map(integer, items(value)))
