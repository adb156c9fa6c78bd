"""Values come back from strict JSON equal and of their type, or are refused by the name of their place."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import json
import math
import pathlib
import random
import types
import uuid
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.job import Job
from elastic.job_options import job_classes, option_defaults
from elastic.values import ValueRefused, classes, decode, describe, encode, same, show


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: float
    y: Any


@dataclass(frozen=True)
class Inner:
    depth: int
    more: Any = ()


@dataclass
class Outer:
    inner: Inner
    colors: list[Color] = field(default_factory=list)
    made: int = field(init=False, default=3)


KNOWN = classes(Outer, Point, Level, Mode)


def back(value: Any) -> Any:
    text = json.dumps(encode(value), allow_nan=False)
    return decode(json.loads(text), known=KNOWN)


def alike(one: Any, other: Any) -> bool:
    """Equal, of equal types all the way down; nan equals nan."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    if isinstance(one, complex):
        return alike(one.real, other.real) and alike(one.imag, other.imag)
    if isinstance(one, dict):
        items = [(alike(a, c) and alike(b, d)) for (a, b), (c, d) in zip(one.items(), other.items())]
        return len(one) == len(other) and all(items)
    if isinstance(one, (list, tuple, collections.deque)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Outer):
        return all(alike(v, vars(other)[k]) for k, v in vars(one).items())
    if isinstance(one, Inner):
        return alike(one.depth, other.depth) and alike(one.more, other.more)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(one == other)


keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.sampled_from(Color), st.tuples(st.integers()))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.sampled_from([Color.RED, Color.BLUE, Level.LOW, Mode.A, Mode.A | Mode.B, Mode(0)]),
    st.builds(pathlib.PurePosixPath, st.text("ab/.", min_size=1)),
    st.fractions(),
    st.uuids(),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.datetimes(timezones=st.sampled_from([None, datetime.UTC])).filter(lambda d: not d.fold),
    st.dates(),
    st.builds(np.float32, st.floats(width=32, allow_nan=False)),
    st.builds(np.int64, st.integers(0, 9)),
    st.builds(bytearray, st.binary()),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([2, 3]), torch.channels_last, torch.strided]),
    st.builds(lambda v: np.asarray(v, "<f4"), st.lists(st.floats(width=32, allow_nan=False))),
    st.builds(range, st.integers(0, 5)),
    st.frozensets(st.integers()),
    st.sets(st.text()),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.dictionaries(st.text(), inner),
        st.dictionaries(keys, inner).map(collections.OrderedDict),
        st.builds(collections.deque, st.lists(inner)),
        st.builds(lambda d: collections.defaultdict(list, d), st.dictionaries(keys, inner)),
        st.builds(Point, st.floats(), inner),
        st.builds(Inner, st.integers(), inner),
        st.builds(Outer, st.builds(Inner, st.integers(), inner), st.lists(st.sampled_from(Color))),
    ),
    max_leaves=8,
)


@given(values)
def test_whatever_is_taken_comes_back_equal_and_of_its_type(value: Any):
    assert alike(value, back(value))
    assert same(encode(value), encode(back(value)))
    assert isinstance(show(encode(value)), str)


plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text().filter(lambda k: k != "$"), inner)),
)


@given(plain)
def test_plain_json_stands_for_itself(value: Any):
    assert encode(value) == value
    assert alike(decode(value), value)


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        float("nan"),
        -0.0,
        10**600,
        collections.Counter("aab"),
        {1: 2},
        {"$": 1},
        random.getstate(),
        np.random.RandomState(1).get_state(),
        types.SimpleNamespace(a=(1,)),
        np.bool_(True),
        np.datetime64("2020-01-01"),
        pathlib.Path("a"),
        uuid.UUID(int=1),
        decimal.Decimal("NaN"),
        Fraction(1, 3),
        np.zeros((0, 2)),
        slice(1, None),
        datetime.time(1, 2),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_jobs_keep_comes_back(value: Any):
    found = back(value)

    assert type(found) is type(value)
    assert same(encode(found), encode(value))


def function() -> None: ...


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"weight": [1, {"f": function}]}, r"state\['weight'\]\[1\]\['f'\] is a function"),
        ((1, object()), r"state\[1\] is an object, which is not kept"),
        ({"a": torch.ones(1)}, r"state\['a'\] is a tensor, and no tensors are kept here"),
        ([np.array([None])], r"state\[0\] is a numpy ndarray of object"),
        (type("Sub", (dict,), {})(), r"state is a Sub"),
        (b"x" * (2 << 20), r"state has 2097152 bytes.*make it a tensor"),
        (collections.defaultdict(lambda: 1), r"state is a defaultdict of a function"),
        (torch.nn.ReLU, r"state is the class ReLU"),
        (random.Random(1), r"state is a Random"),
    ],
    ids=lambda v: "" if isinstance(v, str) else type(v).__name__,
)
def test_what_would_not_come_back_is_refused_by_its_place(value: Any, said: str):
    with pytest.raises(ValueRefused, match=f"^{said}"):
        encode(value, "state")


def test_what_holds_itself_is_refused():
    value: list[Any] = []
    value.append({"again": value})
    with pytest.raises(ValueRefused, match="or holds itself"):
        encode(value)


def test_a_class_that_the_reader_does_not_have_is_refused_by_the_writer_and_never_made():
    coded = encode({"color": Color.RED, "at": Inner(1)})

    with pytest.raises(ValueRefused, match=r"options\['color'\] is a Color, whose class is not known where it is read"):
        encode({"color": Color.RED}, "options", known={})
    with pytest.raises(ValueRefused, match=r"of the class tests\.test_values\.Color, which is not known here"):
        decode(coded)
    with pytest.raises(ValueRefused, match="with other fields than it has"):
        decode({"$": "dataclass", "class": "Inner", "of": {"other": 1}}, known={"Inner": Inner})


def test_a_class_of_a_script_is_known_under_either_name_of_it():
    coded = encode(Color.RED)

    assert decode({**coded, "class": "__main__.Color"}, known=KNOWN) is Color.RED
    assert decode(coded, known={"__main__.Color": Color}) is Color.RED
    with pytest.raises(ValueRefused, match="not known here"):
        decode({**coded, "class": "elsewhere.Color"}, known=KNOWN)


@pytest.mark.parametrize(
    "coded",
    [
        {"$": "no such kind", "of": 1},
        {"$": "tuple"},
        {"$": ["x"], "of": 1},
        {"$": "float", "of": "1"},
        {"$": "torch.dtype", "of": "load"},
        {"$": "torch.load", "of": "x"},
        {"$": "numpy", "of": "", "dtype": "O"},
        {"$": "int", "of": "-"},
        {"$": "dict", "of": [[[], 1]]},
        {"$": "enum", "class": "os.system", "of": "x"},
        {"$": "tensor", "of": "x"},
        {"$": "bytes", "of": 3},
        {"$": None, "of": None},
    ],
    ids=str,
)
def test_whatever_is_no_value_is_refused_in_one_way(coded: Any):
    with pytest.raises(ValueRefused):
        decode([coded])


def test_tensors_go_beside_under_the_names_of_their_places():
    first, second = torch.ones(2), torch.zeros(1)
    kept: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, place: str) -> str:
        kept[place] = tensor
        return place

    value = {"norms": [first, 3], "by id": {7: (second,)}, "..": {"a/b": first}}
    found = decode(encode(value, tensor=keep), tensor=kept.__getitem__)

    assert found["norms"][0] is first
    assert found["by id"][7] == (second,)
    assert sorted(kept) == ["%2e%2e/a%2fb", "by id/~0/0", "norms/0"]


def test_a_jobs_classes_are_those_of_its_options_and_its_module():
    @dataclass
    class Mine(Job):
        color: Color | None = None
        points: list[Point] = field(default_factory=list)

    assert {"tests.test_values.Color", "tests.test_values.Point", "tests.test_values.Inner"} <= set(job_classes(Mine))
    assert option_defaults(Mine) == {"color": None, "points": []}


def test_what_cannot_be_read_back_is_described_alike_in_every_process():
    assert describe(function, "x") == {"$": "described", "of": "tests.test_values.function"}
    assert describe(object(), "x") == {"$": "described", "of": "builtins.object"}
    assert show(encode([float("inf"), Color.RED, (1,), pathlib.Path("a/b")])) == "[inf, Color.RED, (1,), 'a/b']"
