"""Messages as JSON: one dataclass for each kind, whose fields are checked one by one on the way in. Pure.

An invalid message is refused with one sentence before anything acts on it. The type of a field says which values are
valid: a number, a text, a list, another dataclass. `Check` narrows the type and describes the valid values in words.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from elastic.membership.world import Generation

T = TypeVar("T")
Read = Callable[[Any, str], Any]

_SHOWN = 60


class Refused(Exception):
    """A message or request is invalid; the text is one sentence."""


@dataclass(frozen=True)
class Check:
    """Describes a field's valid values, in words that follow "give", and tests whether a JSON value is one."""

    what: str
    holds: Callable[[Any], bool]


# ---- out ---------------------------------------------------------------------------------------------------------


def plain(message: Any) -> dict[str, Any]:
    """A message as a JSON object. Dictionaries and lists in it are JSON already, and are not copied."""
    kind: Any = type(message)
    return {name: _plain(getattr(message, name)) for name in _names(kind)}


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool, dict, list):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return str(value) if isinstance(value, Generation) else plain(value)
    if isinstance(value, Enum):
        return value.name
    return value


# ---- in ----------------------------------------------------------------------------------------------------------


def parse(kind: type[T], body: Any, where: str = "") -> T:
    """The message of this kind that a JSON value holds.

    Args:
        where: name of the field that contains `body`, if another message does.

    Raises:
        Refused: `body` is no valid message of this kind.
    """
    if type(body) is not dict:
        raise Refused(f"{where or 'the request'} is {_shown(body)}; give a JSON object")
    values, prefix, known = {}, f"{where}." if where else "", cast(Any, kind)
    for name, what, read, required in _fields(known):
        if name in body:
            values[name] = read(body[name], prefix + name)
        elif required:
            raise Refused(f"{prefix}{name} is missing; give {what}")
    return kind(**values)


def loads(text: str | bytes) -> Any:
    """Parse JSON that another process sent.

    Raises:
        Refused: `text` is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is no JSON ({type(error).__name__}); give a JSON object") from error


@cache
def _fields(kind: Any) -> tuple[tuple[str, str, Read, bool], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((one.name, *_reader(hints[one.name]), _is_required(one)) for one in fields(kind))


def _is_required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _reader(hint: Any) -> tuple[str, Read]:
    """A type's description in words, and the function that turns a JSON value into it or refuses the value."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check = next(one for one in args[1:] if isinstance(one, Check))
        _, inner = _reader(args[0])
        return check.what, _checked(check.what, check.holds, inner)
    if origin in (Union, types.UnionType):
        (one,) = (a for a in args if a is not type(None))
        what, inner = _reader(one)
        return what, lambda value, name: None if value is None else inner(value, name)
    if origin is Literal:
        what = " or ".join(map(str, args))
        return what, _checked(what, lambda value: type(value) is str and value in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        what, inner = _reader(args[0])

        def read_items(value: Any, name: str) -> Any:
            return origin(inner(v, f"{name}[{i}]") for i, v in enumerate(value))

        return f"a list, each {what}", _checked(f"a list, each {what}", lambda value: type(value) is list, read_items)
    if origin is tuple:
        readers = [_reader(a) for a in args]
        what = f"a list of {' and '.join(w for w, _ in readers)}"

        def all_of(value: Any, name: str) -> tuple[Any, ...]:
            pairs = zip(readers, value, strict=True)
            return tuple(read(v, f"{name}[{i}]") for i, ((_, read), v) in enumerate(pairs))

        return what, _checked(what, lambda value: type(value) is list and len(value) == len(args), all_of)
    if origin is dict:
        return "an object", _checked("an object", lambda value: type(value) is dict)
    if hint in _PLAIN:
        what, holds = _PLAIN[hint]
        return what, _checked(what, holds)
    if hint is Generation:
        return "a generation such as 1-2", _checked(
            "a generation such as 1-2", lambda value: type(value) is str and _is_generation(value), _generation
        )
    if issubclass(hint, Enum):
        names: Mapping[str, Any] = hint.__members__
        what = f"one of {', '.join(names)}"
        return what, _checked(what, lambda value: type(value) is str and value in names, lambda value, _: names[value])
    return "an object", lambda value, name: parse(hint, value, name)


def _checked(what: str, holds: Callable[[Any], bool], read: Read | None = None) -> Read:
    def checked(value: Any, name: str) -> Any:
        if not holds(value):
            raise Refused(f"{name} is {_shown(value)}; give {what}")
        return read(value, name) if read is not None else value

    return checked


def is_whole(value: Any) -> bool:
    """Whether a JSON value is an integer that fits into 64 bits."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    Any: ("a value", lambda value: True),
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a whole number", is_whole),
    float: ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    str: ("a text", lambda value: type(value) is str),
}


def _is_generation(text: str) -> bool:
    epoch, _, n = text.partition("-")
    return len(text) < 40 and epoch.isdecimal() and n.isdecimal() and epoch.isascii() and n.isascii()


def _generation(text: str, _: str) -> Generation:
    return Generation.parse(text)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
