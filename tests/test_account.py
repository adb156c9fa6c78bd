"""The account of a run: every second of every worker has one cause, whatever happened, and its price."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import ConfigError
from elastic.observe.account import account
from elastic.observe.causes import CAUSES
from elastic.observe.ledger import read_records
from elastic.prices import ANY, Price, Prices, read_prices
from elastic.storage import Storage

V = 8
HOUR = 3600.0


class History:
    """Makes the ledger of a run while saying what each worker's time goes into."""

    def __init__(self) -> None:
        self.now, self.step, self.epoch, self.n, self.born = 1000.0, 0, 0, 0, 0
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.spent: dict[str, float] = defaultdict(float)
        self.whole = 0.0
        self.there: list[str] = []  # workers that are ready
        self.world: list[str] = []
        self.costs: dict[int, tuple[str, dict[str, float], int]] = {}  # of the steps that count so far

    @property
    def generation(self) -> str:
        return f"{self.epoch}-{self.n}"

    def event(self, kind: str, generation: str | None = None, **fields: Any) -> None:
        event = {"format": 1, "time": self.now, "kind": kind, "generation": generation or f"{self.epoch}-0"}
        self.events.append({**event, **fields})

    def spend(self, cause: str, seconds: float, workers: int) -> None:
        self.spent[cause] += seconds * workers
        self.whole += seconds * workers

    def pass_by(self, seconds: float, world: str, others: str = "") -> None:
        """Time in which members of the world do one thing, and others another."""
        self.spend(world, seconds, len(self.world))
        self.spend(others or world, seconds, len(self.there) - len(self.world))
        self.now += seconds

    def start(self, beat: float | None = None) -> None:
        self.epoch, self.n, self.there, self.world = self.epoch + 1, 0, [], []
        detail = {"microbatches": V, "padded": False, "heartbeat_before": beat}
        self.event("run_started", step=self.step, detail=detail)

    def warm(self, workers: int) -> None:
        """Some get ready side by side, in 4 seconds."""
        cause = "form" if not self.world else "spare"
        self.pass_by(4.0, "form", cause)
        for _ in range(workers):
            self.born += 1
            name = f"w{self.epoch}-{self.born}"
            detail = {"import_s": 1.0, "data_s": 0.5, "model_s": 0.5, "rehearsal_s": 1.0, "device": "{}"}
            self.event("worker_warm", member=name, node=f"n{self.born % 2}", seconds=4.0, detail=detail)
            for phase, seconds in (("import", 1.0), ("data", 0.5), ("model", 0.5), ("rehearsal", 1.0), ("other", 1.0)):
                self.spend(f"startup/{phase}", seconds, 1)
            self.there.append(name)

    def form(self, most: int) -> None:
        """A world of the first `most`."""
        self.n += 1
        self.world = self.there[:most]
        self.event("world_formed", self.generation, detail={"size": len(self.world), "ids": list(self.world)})
        self.pass_by(0.5, "form", "spare")
        self.pass_by(0.25, "restore", "spare")
        self.first: dict[str, Any] = {"connect_s": 0.25, "restore_s": 0.25}

    def train(self, steps: int, evaluates: bool, held: float) -> None:
        for _ in range(steps):
            if held:
                self.pass_by(held, "held", "spare")
                self.first = {**self.first, "held_s": held}
            self.do_step(evaluates)

    def do_step(self, evaluates: bool) -> None:
        count, most, own = len(self.world), -(-V // len(self.world)), V // len(self.world)
        each = 1.0 / 64  # seconds of a microbatch
        wait = (most - own) * each
        times = {"data": 0.125, "checkpoint": 0.0625, "snapshot": 0.03125, "other": 0.03125, "sync": 0.25}
        times |= {"productive": V * each / count, "imbalance": most * each - V * each / count}
        times |= {"evaluation": 0.5} if evaluates else {}
        if self.step + 1 in self.costs:  # it was done before
            _, before, workers = self.costs[self.step + 1]
            for cause, seconds in before.items():
                self.spent[cause] -= seconds * workers
                self.spent["redone"] += seconds * workers
        after = times.get("evaluation", 0.0) + times["checkpoint"] + times["snapshot"]
        length = math.fsum(times.values())
        for cause, seconds in times.items():
            self.spend(cause, seconds, count)
        self.spend("spare", length, len(self.there) - count)
        self.now += length
        self.step += 1
        self.costs[self.step] = (self.generation, times, count)
        row = {"step": self.step, "time": self.now - after, "generation": self.generation, "world_size": count}
        row |= {"sample_hash": "0", "step_s": length, "data_s": 0.125, "compute_s": own * each, "sync_s": 0.25 + wait}
        row |= {"checkpoint_s": 0.0625, "snapshot_s": 0.03125, **self.first}
        row["other_s"] = 0.03125 + times.get("evaluation", 0.0)
        self.first = {}
        self.rows.append(row)
        if evaluates:
            told = {"step": self.step, "generation": self.generation, "time": self.now - 0.1, "eval_s": 0.5}
            self.rows.append({**told, "eval/loss": 1.0})

    def lose(self, back_to: int | None) -> None:
        """A member is lost; the others go on, where they can from where they were."""
        self.pass_by(2.0, "detect", "spare")
        lost = self.world.pop(0)
        self.there.remove(lost)
        self.event("member_lost", self.generation, member=lost, step=self.step, detail="connection lost")
        self.spend("form", 1.0, len(self.world))
        self.now, spares = self.now + 1.0, len(self.there) - len(self.world)
        self.waited, self.spares = 1.0, spares
        if not self.there:
            return
        if back_to is not None:
            self.step = min(self.step, back_to)

    def reform(self, most: int) -> None:
        """After a loss: spares that are taken in have waited for it, the others were not needed."""
        taken = self.there[:most]
        before = set(self.world)
        for name in self.there:
            if name not in before:
                self.spend("form" if name in taken else "spare", self.waited, 1)
        self.world = []

    def finish(self) -> None:
        self.pass_by(1.5, "ending", "spare")
        self.event("run_finished", detail="finished", step=self.step)

    def kill(self, left: float) -> float:
        """The driver is killed; its last heartbeat comes `left` seconds after the last record."""
        self.spend("left_over", left, len(self.there))
        self.now += left
        return self.now


@st.composite
def histories(draw: st.DrawFn) -> History:
    history, beat = History(), None
    for last in (draw(st.lists(st.just(False), max_size=2))) + [True]:
        history.start(beat)
        history.warm(draw(st.integers(1, 4)))
        history.form(most := draw(st.integers(1, 4)))
        for _ in range(draw(st.integers(0, 3))):
            history.train(draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from((0.0, 3.0))))
            if len(history.there) == 1:
                break
            history.lose(draw(st.one_of(st.none(), st.integers(0, history.step))))
            history.reform(most)
            history.form(most)
        history.train(1, False, 0.0)
        if last:
            history.finish()
        else:
            beat = history.kill(draw(st.sampled_from((0.0, 4.0))))
            history.step = draw(st.integers(0, history.step))
            history.now += 30.0
    return history


@given(histories())
@settings(max_examples=60, deadline=None)
def test_each_second_of_each_worker_has_the_cause_that_it_had(history: History) -> None:
    found = account(history.rows, history.events)

    expected = {cause: history.spent.get(cause, 0.0) for cause in CAUSES}
    assert found.whole_s == pytest.approx(history.whole)
    assert found.seconds == pytest.approx(expected, abs=1e-6)
    assert math.fsum(found.seconds.values()) == pytest.approx(found.whole_s)
    for kind in ("member_lost", "run_started"):
        told = {"member_lost": "lost", "run_started": "restarted"}[kind]
        count = sum(e["kind"] == kind for e in history.events) - (kind == "run_started")
        assert sum(i.kind == told for i in found.interruptions) == count
    assert math.fsum(i.seconds.get("redone", 0.0) for i in found.interruptions) == pytest.approx(
        found.seconds["redone"]
    )
    priced = account(history.rows, history.events, prices=read_prices(["3.6"]))
    assert priced.cost == pytest.approx(history.whole / 1000)
    changing = Prices((Price(ANY, ANY, 3.6), Price(ANY, ANY, 3.6, since=1010.0)))  # then steps are looked at one by one
    apart = account(history.rows, history.events, prices=changing)
    assert apart.seconds == pytest.approx(found.seconds, abs=1e-6)
    assert apart.costs == pytest.approx(priced.costs, abs=1e-6)


_NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-5, 2**40), st.booleans(), st.text(max_size=3))
_TIMES = st.one_of(st.floats(0, 1e4), st.sampled_from((5.0, 50.0)), _NUMBERS)
_IDS = st.sampled_from(("a", "b", "c", "d"))
_GENERATIONS = st.sampled_from(("1-0", "1-1", "1-2", "2-0", "2-1", "x", None, "1--1"))
_KINDS = "run_started worker_warm world_formed member_lost world_broken member_late notice handed_over parked resumed"
_EVENTS = st.fixed_dictionaries(
    {"kind": st.sampled_from((*_KINDS.split(), "run_finished", "run_failed", "end")), "time": _TIMES},
    optional={
        "generation": _GENERATIONS,
        "member": st.one_of(_IDS, _NUMBERS),
        "node": _IDS,
        "seconds": _NUMBERS,
        "step": _NUMBERS,
        "detail": st.one_of(
            _NUMBERS,
            st.just("re-forming: a worker joins"),
            st.fixed_dictionaries({"ids": st.one_of(st.none(), st.lists(st.one_of(_IDS, st.integers())))}),
            st.fixed_dictionaries({"import_s": _NUMBERS, "microbatches": _NUMBERS, "heartbeat_before": _NUMBERS}),
        ),
    },
)
_COLUMNS = "step_s data_s compute_s sync_s checkpoint_s snapshot_s other_s connect_s restore_s held_s eval_s"
_ROWS = st.fixed_dictionaries(
    {"time": _TIMES, "step": st.one_of(st.integers(0, 4), _NUMBERS), "generation": _GENERATIONS},
    optional={"sample_hash": st.just("0"), "idle": st.lists(st.integers(-1, 3))}
    | dict.fromkeys(_COLUMNS.split(), _NUMBERS),
)


@given(st.lists(_ROWS, max_size=8), st.lists(_EVENTS, max_size=12), st.one_of(st.none(), st.floats(0, 1e4)))
@settings(max_examples=150, deadline=None)
def test_whatever_a_ledger_says_the_parts_add_up_to_the_whole_and_are_strict_json(rows, events, until):
    found = account(rows, events, prices=read_prices(["1.5"]), until=until, live=until is not None)

    assert list(found.seconds) == list(CAUSES)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert math.fsum(found.seconds.values()) == pytest.approx(found.whole_s, rel=1e-6, abs=1e-4)
    json.dumps(found.to_json(), allow_nan=False)


def test_parked_drained_silent_and_idle_workers_and_a_live_run():
    events: list[dict[str, Any]] = []

    def event(at: float, kind: str, generation: str = "1-0", **fields: Any) -> None:
        events.append({"time": at, "kind": kind, "generation": generation, **fields})

    event(0.0, "run_started", detail={"microbatches": 8})
    for name in "abc":
        event(10.0, "worker_warm", member=name, node=f"node-{name}", seconds=10.0, detail={})
    event(10.0, "world_formed", "1-1", detail={"ids": ["a", "b", "c"]})
    row = {"sample_hash": "0", "step_s": 1.0, "compute_s": 1.0, "other_s": 0.0, "generation": "1-1"}
    rows = [{**row, "step": 1, "time": 11.0, "idle": [2]}]
    event(13.0, "notice", node="node-b", detail="goes away", seconds=60.0)
    event(14.0, "notice", "1-1", detail="re-forming: a node goes away")
    event(15.0, "handed_over", member="b")
    event(15.0, "world_broken", "1-1", detail="connection")
    event(16.0, "member_late", member="c")
    event(20.0, "parked", detail="1 workers")
    event(50.0, "world_formed", "1-2", detail={"ids": ["a", "c"]})

    found = account(rows, events, until=60.0, live=True)

    told = {cause: seconds for cause, seconds in found.seconds.items() if seconds}
    assert found.whole_s == sum(told.values()) == 2 * 60 + 15
    assert told == {
        "startup/other": 30.0,
        "productive": 2.0,
        "draining": 4.0,  # b, from its last step on
        "detect": 4.0,  # a
        "spare": 5.0,  # c, which had no place in the mesh
        "form": 5.0 + 1.0,  # a until it is parked; c until it was silent
        "silent": 34.0,  # c
        "parked": 30.0,  # a
        "under_way": 20.0,
    }
    assert [(i.kind, i.generation) for i in found.interruptions] == [("broken", "1-2")]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_ledger_of_an_earlier_version_gives_an_account_with_what_it_does_not_tell(version):
    storage = Storage(str(Path(__file__).parent / "stored_runs" / f"format-{version}" / "exact"))
    found = account(read_records(storage, "metrics.jsonl"), read_records(storage, "events.jsonl"))

    assert math.fsum(found.seconds.values()) == pytest.approx(found.whole_s)
    assert found.seconds["unknown"] > 0
    assert found.seconds["productive"] > 0


# ---- prices --------------------------------------------------------------------------------------------------------


def _one_worker(node_type: str, market: str, hours: float, workers: int = 1) -> list[dict[str, Any]]:
    detail = {"node_type": node_type, "market": market}
    warm = {"kind": "worker_warm", "generation": "1-0", "node": "n", "seconds": hours * HOUR, "detail": detail}
    warms = [{**warm, "time": hours * HOUR, "member": f"w{i}"} for i in range(workers)]
    started = {"kind": "run_started", "time": 0.0, "generation": "1-0"}
    return [started, *warms, {"kind": "run_failed", "time": hours * HOUR, "generation": "1-0"}]


def test_a_node_s_price_is_shared_by_its_workers_and_compared_with_that_on_demand(tmp_path):
    spot_market = tmp_path / "prices.json"
    steps = [
        {"type": "big", "market": "spot", "price": 2.0},
        {"type": "big", "market": "spot", "price": 6.0, "from": "1970-01-01T01:00:00Z"},
        {"type": "big", "market": "spot", "price": 1.0, "from": 1.5 * HOUR},
        {"type": "big", "market": "on-demand", "price": 10.0},
    ]
    spot_market.write_text(json.dumps({"format": 1, "prices": steps}))
    prices = read_prices(["small=0.5/h", str(spot_market)])

    found = account([], _one_worker("big", "spot", 2.0, workers=4), prices=prices)
    assert (found.cost, found.on_demand_cost) == (pytest.approx(2.0 + 3.0 + 0.5), pytest.approx(20.0))
    assert account([], _one_worker("small", "", 2.0, workers=2), prices=prices).cost == pytest.approx(1.0)
    unknown = account([], _one_worker("other", "", 2.0), prices=prices)
    assert (unknown.cost, unknown.unpriced_s, unknown.on_demand_cost) == (0.0, 2 * HOUR, None)
    assert account([], _one_worker("big", "", 1.0), prices=prices).cost == pytest.approx(2.0)
    assert account([], _one_worker("", "", 1.0, workers=3), prices=read_prices([0.25])).cost == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("cheap", "give a price of one worker"),
        ("-1", "finite number from 0 on"),
        ("inf", "finite number"),
        ("nan", "finite number"),
        ("g5.xlarge=0.4", "say for how long: g5.xlarge=0.4/h"),
        ("g5.xlarge:auction=0.4/h", "one of spot, on-demand"),
        ("nowhere.json", "cannot be read"),
        ('{"prices": 5}', 'no list "prices"'),
        ('{"prices": [{"price": "x"}]}', "not 'x'"),
        ('{"prices": [{"price": 1, "from": "soon"}]}', "give a time"),
        ('{"format": 2, "prices": [{"price": 1}]}', "reads format 1"),
    ],
)
def test_a_bad_price_gets_one_sentence(given, says, tmp_path):
    if given.startswith("{"):
        (tmp_path / "prices.json").write_text(given)
        given = str(tmp_path / "prices.json")
    with pytest.raises(ConfigError, match=r"--observe\.price is") as raised:
        read_prices([given])
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
