"""Values as strict JSON and back, equal and of the same type: options, states of optimizers and jobs, manifests.

JSON values stand for themselves. A value of any other kind becomes an object with the key `$`, which names the kind.
Reading imports and runs nothing: an enum, a dataclass or a named tuple is rebuilt only of a class that the reader
passes, and a tensor only by the reader's own function.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime
import enum
import json
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from elastic.value_kinds import (
    FACTORIES,
    PATHS,
    TAG,
    TEXT_OF,
    TEXTS,
    TORCH,
    Classes,
    ValueRefused,
    as_base64,
    class_name,
    classes,
    decode_numpy,
    decode_torch,
    encode_numpy,
    find_class,
    tagged,
    what,
)

__all__ = ["TAG", "Classes", "ValueRefused", "classes", "decode", "describe", "encode", "same", "show"]

MAX_DEPTH = 60
_LARGE = 1 << 1024  # larger integers are written in hexadecimal: Python limits the length of decimals that it reads


# ---- writing ---------------------------------------------------------------------------------------------------------


def encode(
    value: Any, where: str = "value", *, tensor: Callable[[Any, str], Any] | None = None, known: Classes | None = None
) -> Any:
    """The value as plain JSON.

    Args:
        where: name of the value in errors, such as `optimizer.state['weight']`.
        tensor: called with each tensor and its place (keys and indices, separated by slashes); returns what `decode`
            passes to its own `tensor`. None refuses tensors.
        known: the classes that the reader will have; None for any.

    Raises:
        ValueRefused: some value inside would not be read back equal.
    """
    return _Encoder(tensor, known).encode(value, where, "", 0)


class _Encoder:
    def __init__(self, tensor: Callable[[Any, str], Any] | None, known: Classes | None):
        self._tensor, self._known = tensor, known

    def encode(self, value: Any, where: str, place: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if -_LARGE < value < _LARGE else tagged("int", hex(value))
        if kind is float:
            return value if math.isfinite(value) else tagged("float", repr(value))
        if depth > MAX_DEPTH:
            raise ValueRefused(f"{where} lies more than {MAX_DEPTH} levels deep, or holds itself")

        def inside(one: Any, key: Any, part: str) -> Any:
            return self.encode(one, f"{where}[{key!r}]", f"{place}/{part}", depth + 1)

        def items(values: Iterable[Any]) -> list[Any]:
            return [inside(one, i, str(i)) for i, one in enumerate(values)]

        if kind is list:
            return items(value)
        if kind is tuple:
            return tagged("tuple", items(value))
        if kind is dict:
            if all(type(k) is str for k in value) and TAG not in value:
                return {k: inside(v, k, part_of(k, 0)) for k, v in value.items()}
            return tagged("dict", self._pairs(value, where, place, depth))
        if kind in (set, frozenset):
            coded = sorted((self.encode(v, f"{where}, in it {v!r},", place, depth + 1) for v in value), key=_text)
            return tagged(kind.__name__, coded)
        if kind in (collections.OrderedDict, collections.Counter):
            return tagged(kind.__name__, self._pairs(value, where, place, depth))
        if kind is collections.defaultdict:
            factory = next((n for n, made in FACTORIES.items() if made is value.default_factory), None)
            if factory is None and value.default_factory is not None:
                raise ValueRefused(f"{where} is a defaultdict of {what(value.default_factory)}; use a dict")
            return tagged("defaultdict", self._pairs(value, where, place, depth), factory=factory)
        if kind is collections.deque:
            return tagged("deque", items(value), maxlen=value.maxlen)
        if kind is types.SimpleNamespace:
            return tagged("namespace", {k: inside(v, k, part_of(k, 0)) for k, v in vars(value).items()})
        return self._other(value, kind, where, place, inside, items)

    def _other(
        self,
        value: Any,
        kind: type,
        where: str,
        place: str,
        inside: Callable[[Any, Any, str], Any],
        items: Callable[[Iterable[Any]], list[Any]],
    ) -> Any:
        if kind in (bytes, bytearray):
            return tagged(kind.__name__, as_base64(bytes(value), where))
        if kind is complex:
            return tagged("complex", items([value.real, value.imag]))
        if kind is range:
            return tagged("range", [value.start, value.stop, value.step])
        if kind is slice:
            return tagged("slice", items([value.start, value.stop, value.step]))
        if kind is datetime.timedelta:
            return tagged("timedelta", [value.days, value.seconds, value.microseconds])
        if kind in TEXT_OF:
            name, write, read = TEXT_OF[kind]
            text = write(value)
            if repr(read(text)) != repr(value):
                raise ValueRefused(f"{where} is {value!r}, which no text holds whole")
            return tagged(name, text)
        if isinstance(value, enum.Enum):
            name = class_name(self._check_known(kind, where))
            if value.name is not None and kind.__members__.get(value.name) is value:  # type: ignore[attr-defined]
                return tagged("enum", value.name, **{"class": name})
            return tagged("flags", inside(value.value, "value", "value"), **{"class": name})
        if dataclasses.is_dataclass(kind):
            return self._dataclass(value, kind, where, inside)
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return tagged("named tuple", items(value), **{"class": class_name(self._check_known(kind, where))})
        root = kind.__module__.partition(".")[0]
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None and (root == "numpy" or isinstance(value, numpy.ndarray)):
            return encode_numpy(numpy, value, kind, where)
        if torch is not None:
            if isinstance(value, torch.Tensor):
                if self._tensor is None:
                    raise ValueRefused(f"{where} is a tensor, and no tensors are kept here; use numbers")
                return tagged("tensor", self._tensor(value, place.removeprefix("/")))
            if kind is torch.Size:
                return tagged("torch.Size", list(value))
            if kind is torch.device:
                return tagged("torch.device", str(value))
            if kind.__name__ in TORCH and root == "torch":
                return tagged(f"torch.{kind.__name__}", str(value).removeprefix("torch."))
        raise ValueRefused(f"{where} is {what(value)}, which is not kept; keep numbers, texts, lists and dictionaries")

    def _pairs(self, value: Mapping[Any, Any], where: str, place: str, depth: int) -> list[Any]:
        return [
            [
                self.encode(k, f"the key {k!r} of {where}", f"{place}/{part_of(k, i)}/key", depth + 1),
                self.encode(v, f"{where}[{k!r}]", f"{place}/{part_of(k, i)}", depth + 1),
            ]
            for i, (k, v) in enumerate(value.items())
        ]

    def _dataclass(self, value: Any, kind: type, where: str, inside: Callable[[Any, Any, str], Any]) -> Any:
        name = class_name(self._check_known(kind, where))
        names = [f.name for f in dataclasses.fields(value)]
        more = sorted(set(getattr(value, "__dict__", {})) - set(names))
        if isinstance(value, (dict, list, tuple, set, str, int, float)):
            raise ValueRefused(f"{where} is a {kind.__name__}, which is more than its fields; keep plain values")
        if more:
            raise ValueRefused(f"{where} is a {kind.__name__} with the attribute {more[0]!r}, which is no field of it")
        missing = [n for n in names if not hasattr(value, n)]
        if missing:
            raise ValueRefused(f"{where} is a {kind.__name__} without a value for its field {missing[0]!r}")
        return tagged("dataclass", {n: inside(getattr(value, n), n, n) for n in names}, **{"class": name})

    def _check_known(self, kind: type, where: str) -> type:
        if self._known is not None and self._known.get(class_name(kind)) is not kind:
            raise ValueRefused(
                f"{where} is a {kind.__name__}, whose class is not known where it is read; define that class at the "
                "top of the job's module, or keep plain values"
            )
        return kind


def part_of(key: Any, index: int) -> str:
    """A key as one component of a tensor's place: characters with a meaning in paths are escaped."""
    if type(key) is not str or not key or len(key) > 200:
        return f"~{index}"
    plain = "".join(c if c.isalnum() or c in "_-+=@ .:" else f"%{ord(c):02x}" for c in key)
    return plain if plain.strip(".") else plain.replace(".", "%2e")


def _text(coded: Any) -> str:
    return json.dumps(coded, sort_keys=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def decode(coded: Any, *, tensor: Callable[[Any], Any] | None = None, known: Classes | None = None) -> Any:
    """The value that `encode` was given.

    Args:
        tensor: called with what the writer's `tensor` returned for each tensor.
        known: the classes of which values may be rebuilt, as `classes` returns them.

    Raises:
        ValueRefused: `coded` is no coded value, or has a class that is not known.
    """
    try:
        return _Decoder(tensor, known or {}).decode(coded)
    except ValueRefused:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, ArithmeticError) as error:
        raise ValueRefused(f"what should be a value is none: {error!r}"[:300]) from error


class _Decoder:
    def __init__(self, tensor: Callable[[Any], Any] | None, known: Classes):
        self._tensor, self._known = tensor, known

    def decode(self, coded: Any) -> Any:
        if isinstance(coded, list):
            return [self.decode(v) for v in coded]
        if not isinstance(coded, dict):
            return coded
        if TAG not in coded:
            return {k: self.decode(v) for k, v in coded.items()}
        kind, of = coded[TAG], coded["of"]
        if kind in TEXTS:
            return TEXTS[kind][2](of)
        if kind == "enum":
            return self._class(coded, enum.Enum)[of]
        if kind == "flags":
            return self._class(coded, enum.Enum)(self.decode(of))
        if kind == "named tuple":
            return tuple.__new__(self._class(coded, tuple), self.decode(of))
        if kind == "dataclass":
            return self._dataclass(coded)
        if kind == "tensor":
            if self._tensor is None:
                raise ValueRefused("a value holds a tensor, and there are none here")
            return self._tensor(of)
        if kind == "defaultdict":
            factory = None if coded["factory"] is None else FACTORIES[coded["factory"]]
            return collections.defaultdict(factory, self._pairs(of))
        if kind == "deque":
            return collections.deque(self.decode(of), coded["maxlen"])
        if kind == "Counter":
            return collections.Counter(dict(self._pairs(of)))
        if kind.startswith("numpy"):
            return decode_numpy(kind, of, coded)
        if kind.startswith("torch."):
            return decode_torch(kind.removeprefix("torch."), of)
        return _SIMPLE[kind](self._pairs(of) if kind in ("dict", "OrderedDict") else self.decode(of))

    def _pairs(self, of: Any) -> Iterator[tuple[Any, Any]]:
        return ((self.decode(k), self.decode(v)) for k, v in of)

    def _class(self, coded: dict[str, Any], base: type) -> Any:
        found = find_class(coded["class"], self._known)
        if found is None or not issubclass(found, base):
            raise ValueRefused(
                f"a value is of the class {str(coded['class'])[:200]}, which is not known here; use the code that "
                "saved it"
            )
        return found

    def _dataclass(self, coded: dict[str, Any]) -> Any:
        cls = self._class(coded, object)
        names, of = {f.name for f in dataclasses.fields(cls)}, coded["of"]
        if names != set(of):
            raise ValueRefused(f"a {cls.__name__} was saved with other fields than it has; use the code that saved it")
        made = object.__new__(cls)  # no code of the class runs
        for name, value in of.items():
            object.__setattr__(made, name, self.decode(value))
        return made


def _float(text: str) -> float:
    value = float(text)
    if math.isfinite(value):
        raise ValueError("a finite number is written as one")
    return value


_SIMPLE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": _float,
    "tuple": tuple,
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "set": set,
    "frozenset": frozenset,
    "namespace": lambda values: types.SimpleNamespace(**values),
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "slice": lambda parts: slice(*parts),
    "timedelta": lambda parts: datetime.timedelta(*parts),
}


# ---- for people ------------------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Whether two coded values represent the same value; the order of keys does not count."""
    return _text(one) == _text(other)


def has_tensors(coded: Any) -> bool:
    """Whether a coded value refers to tensors."""
    if isinstance(coded, list):
        return any(map(has_tensors, coded))
    if not isinstance(coded, dict):
        return False
    return coded.get(TAG) == "tensor" or any(map(has_tensors, coded.values()))


def show(coded: Any) -> str:
    """A coded value as one would write it in Python, for a sentence."""
    if isinstance(coded, list):
        return "[" + ", ".join(map(show, coded)) + "]"
    if not isinstance(coded, dict):
        return repr(coded)
    if TAG not in coded:
        return "{" + ", ".join(f"{k!r}: {show(v)}" for k, v in coded.items()) + "}"
    kind, of = coded[TAG], coded.get("of")
    if kind == "float":
        return str(of)
    if kind == "enum":
        return f"{str(coded.get('class')).rpartition('.')[2]}.{of}"
    if kind == "dataclass" and isinstance(of, dict):
        fields = ", ".join(f"{k}={show(v)}" for k, v in of.items())
        return f"{str(coded.get('class')).rpartition('.')[2]}({fields})"
    if kind == "tuple" and isinstance(of, list):
        return "(" + ", ".join(map(show, of)) + ("," if len(of) == 1 else "") + ")"
    return repr(of) if kind in PATHS else f"{kind} {show(of)}"


def describe(value: Any, where: str) -> Any:
    """Like `encode`, but a value that cannot be read back is described, well enough to see when it changes."""
    try:
        return encode(value, where)
    except ValueRefused:
        if isinstance(value, type) or hasattr(value, "__qualname__"):
            return tagged("described", f"{value.__module__}.{value.__qualname__}")
        text = repr(value)
        return tagged("described", class_name(type(value)) if " at 0x" in text else text)
