"""What data, models and options are described by, and how two descriptions differ, in words."""

from __future__ import annotations

import datetime
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.data.identity import fingerprint, identify, places
from elastic.likeness import changed_sample, data_change, device_difference, difference, packed
from elastic.membership.commands import Form, LeftOut
from elastic.membership.decisions import advance
from elastic.membership.events import Joined, Tick
from elastic.membership.forming import usable
from elastic.membership.state import Limits, State, Waiting
from elastic.membership.world import Member
from elastic.worker.description import describe_model, describe_optimizer, describe_options, describe_worker
from tests.identity_jobs import Changing, Noisy, Pair, Record


class Sampled:
    """A list of samples as a dataset."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


@dataclass
class Item:
    name: str
    values: torch.Tensor


class Image:
    """Looks like one of PIL's."""

    mode, size = "L", (2, 2)

    def __init__(self, data: bytes):
        self._data = data

    def tobytes(self) -> bytes:
        return self._data


DIFFERENT = [
    (torch.ones(3), torch.zeros(3)),
    (torch.ones(3), torch.ones(4)),
    (torch.ones(3), torch.ones(3, dtype=torch.bfloat16)),
    (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    (torch.tensor([1, 2]), torch.tensor([2, 1])),
    (torch.tensor([1 + 2j]), torch.tensor([2 + 1j])),
    (np.arange(4), np.arange(4) + 1),
    (np.array(["a", "b"]), np.array(["a", "c"])),
    (np.array([{"a": 1}], dtype=object), np.array([{"a": 2}], dtype=object)),
    (np.float32(1), np.float32(2)),
    ((torch.ones(2), 1), (torch.ones(2), 0)),
    ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ([1, [2, "x"]], [1, [2, "y"]]),
    (Item("a", torch.ones(1)), Item("b", torch.ones(1))),
    (Pair(torch.ones(1), torch.ones(1)), Pair(torch.ones(1), torch.zeros(1))),
    (Record(torch.ones(1), torch.ones(1)), Record(torch.ones(1), torch.ones(1), "note")),
    (Image(b"1234"), Image(b"1235")),
    ({1, 2}, {1, 3}),
    (0.25, 0.5),
    (True, 1),
    (None, 0),
    (b"a", b"b"),
    (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
    ("/data/one/a.jpg", "/data/one/b.jpg"),
    (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 0.0])),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=lambda value: type(value).__name__)
def test_samples_that_differ_are_told_apart_and_equal_ones_are_not(one, other):
    first, second = identify(Sampled(one)), identify(Sampled(other))

    assert changed_sample(first, second, exact=False) == changed_sample(first, second, exact=True) == 0
    assert changed_sample(first, json.loads(json.dumps(identify(Sampled(one)))), exact=True) is None


@pytest.mark.parametrize("sample", [torch.linspace(-3, 3, 1000), np.linspace(0, 1e6, 50), 0.3, [1.5, {"x": 2.5}]])
def test_numbers_from_another_machine_may_differ_in_the_last_bits(sample):
    def other(value):
        if isinstance(value, list):
            return [other(v) for v in value]
        return {k: other(v) for k, v in value.items()} if isinstance(value, dict) else value * (1 + 2e-7)

    one, two = identify(Sampled(sample)), identify(Sampled(other(sample)))

    assert changed_sample(one, two, exact=False) is None
    assert changed_sample(one, two, exact=True) == 0


def test_a_file_may_lie_in_another_folder():
    one, other = {"path": "/mnt/a/1.jpg"}, {"path": Path("/scratch/b/1.jpg")}

    assert fingerprint(one) == fingerprint(other)


@given(st.integers(1, 10**9))
def test_first_last_and_some_between_stand_for_the_data(count):
    found = places(count)

    assert found == places(count)
    assert {0, count - 1} <= set(found)
    assert all(0 <= place < count for place in found)
    assert len(found) == len(set(found)) <= 6


def test_augmentation_does_not_matter_but_order_and_content_do():
    data = identify(Noisy(64))
    random.seed()  # whatever the process drew before

    assert data == identify(Noisy(64))
    assert len(data["found"]) >= 4
    reverse = Sampled(*[Noisy(64)[i] for i in reversed(range(64))])
    assert changed_sample(data, identify(reverse), exact=False) == 0


def test_what_is_random_under_one_seed_and_what_cannot_be_compared_is_known_as_that(monkeypatch):
    monkeypatch.setenv("UNSEEDED", "1")
    assert identify(Changing(8, 0.5)) == {"samples": 8, "found": {}, "varies": True}
    assert identify(Sampled(*[object()] * 3)) == {"samples": 3, "found": {}}
    loop: list[object] = []
    loop.append(loop)
    assert fingerprint(loop) is None
    assert fingerprint(lambda: 0) is None


def test_a_dataset_that_passes_attributes_on_to_another_is_described():
    class Around:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, i):
            return self.data[i]

        def __getattr__(self, name):  # as it is often written: without end while there is no `data`
            return getattr(self.data, name)

    assert identify(Around(Changing(8, 0.5))) == identify(Changing(8, 0.5))


def test_a_sample_that_cannot_be_fetched_is_left_out(monkeypatch):
    whole = identify(Changing(100, 0.5))
    monkeypatch.setenv("BROKEN", "99")

    found = identify(Changing(100, 0.5))

    assert found["found"].keys() == whole["found"].keys() - {"99"}
    assert changed_sample(found, whole, exact=True) is None


def test_the_change_of_data_is_told_in_words():
    data = identify(Changing(64, 0.5))

    assert data_change(identify(Changing(80, 0.5)), data, "before") == "train_data() has 80 samples, and had 64 before"
    place = min(int(p) for p in data["found"] if p != "0")
    changed = f"sample {place} of train_data() is not what it was before"
    assert data_change(identify(Changing(64, 0.377)), data, "before") == changed
    assert data_change(data, data, "before") == data_change(data, None, "before") == data_change(data, {}, "") == ""


# ---- workers ---------------------------------------------------------------------------------------------------------


def says(width=4, samples=100, number=0.5, lr=0.1, groups=1, options=(), freeze=False, held_out=10) -> str:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, width))
    model[0].weight.requires_grad_(not freeze)
    parameters = [{"params": [p]} for p in model.parameters()] if groups > 1 else model.parameters()
    data = {
        "train_data()": identify(Changing(samples, number)),
        "eval_data()": identify(Changing(held_out, 0.1), some=0),
    }
    return describe_worker(
        data,
        configuration=describe_options({"job.lr": lr, "job.thing": object(), **dict(options)}),
        model=describe_model(model),
        optimizer=describe_optimizer(torch.optim.SGD(parameters, lr=lr)),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 80}, "its train_data() has 80 samples, the world's 100"),
        ({"number": 0.377}, "its train_data() has another sample 11 than the world's"),
        ({"held_out": 12}, "its eval_data() has 12 samples, the world's 10"),
        ({"width": 2}, "its model has parameter 2.weight float32[2, 4], the world's parameter 2.weight float32[4, 4]"),
        ({"freeze": True}, "its model has parameter 0.weight float32[4, 6] frozen, the world's parameter 0.weight "),
        ({"lr": 0.2}, "its configuration has job.lr=0.2, the world's job.lr=0.1"),
        ({"options": {"zzz": 1}}, "its configuration has zzz=1, which the world's has not"),
        ({"groups": 2}, "its optimizer has group 0 of 1 parameters"),
    ],
)
def test_the_first_thing_in_which_a_worker_differs_is_named(change, words):
    assert difference(says(), says(), exact=True) == ""
    assert difference(says(**change), says(), exact=False).startswith(words)


def test_who_says_nothing_is_like_anybody():
    assert difference("", says(), exact=True) == difference(says(), "", exact=True) == ""
    assert device_difference("x", "x") == ""


def test_devices_differ_in_words():
    one = {"type": "cpu", "name": "AVX2", "torch": "2.13", "threads": 1}
    words = device_difference(json.dumps({**one, "threads": 2}), json.dumps(one))

    assert words == "its device differs: thread count 2, the world's 1"
    assert "its device" in device_difference("anything", "else")


def test_a_model_of_many_parts_is_compared_without_their_names():
    lines = [f"parameter {seed} {random.Random(seed).random()}" for seed in range(3000)]
    one, other = packed(lines), packed([*lines[:-1], "another"])

    assert "lines" not in one
    words = difference(json.dumps({"lines": {"model": one}}), json.dumps({"lines": {"model": other}}), exact=False)
    assert words == "its model differs from the world's: 3000 and 3000 entries"
    assert "lines" in packed([f"parameter layers.{i}.attention.weight float32[4096, 4096]" for i in range(500)])


def waiting(name: str, text: str, *, since: float = 0.0, applied: int = -1, device: str = "") -> Waiting:
    return Waiting(Member(name, "node", device=device, says=text), applied, since)


def left_out(*workers: Waiting, exact: bool = False) -> dict[str, str]:
    state = State(1, Limits(1, 8, exact=exact), waiting={w.member.id: w for w in workers})
    fitting, different = usable(state)
    assert {w.member.id for w in fitting} | {w.member.id for w, _ in different} == state.waiting.keys()
    return {w.member.id: reason for w, reason in different}


def test_the_first_world_is_of_the_kind_that_most_are_of_and_then_of_whoever_holds_state():
    four, eight = says(width=4), says(width=8)

    assert left_out(waiting("a", eight), waiting("b", four, since=1), waiting("c", four, since=2)).keys() == {"a"}
    assert left_out(waiting("a", four, since=1), waiting("b", eight)).keys() == {"a"}, "of equals who came first"
    assert left_out(waiting("a", eight, applied=3), waiting("b", four), waiting("c", four)).keys() == {"b", "c"}
    assert left_out(waiting("a", four), waiting("b", four), waiting("c", "")) == {}


def test_the_device_counts_in_exact_worlds_only_and_so_do_the_last_bits_of_samples():
    near, text = says(number=0.5 + 1e-8), says()

    assert left_out(waiting("a", text), waiting("b", text, device="x", since=1)) == {}
    assert left_out(waiting("a", text), waiting("b", text, device="x", since=1), exact=True).keys() == {"b"}
    assert near != text
    assert left_out(waiting("a", text), waiting("b", near, since=1)) == {}
    assert left_out(waiting("a", text), waiting("b", near, since=1), exact=True).keys() == {"b"}


def test_who_is_left_out_of_a_world_is_named_once():
    state = State(1, Limits(1, 2, settle_s=0.0))
    state, formed = advance(state, Joined(Member("a", "n", says=says()), 0.0))
    other = Member("b", "n", says=says(samples=80))

    state, first = advance(state, Joined(other, 2.0))
    state, again = advance(state, Tick(60.0))

    assert [type(c) for c in formed] == [Form]
    assert first == [LeftOut(other, "its train_data() has 80 samples, the world's 100")]
    assert again == []
