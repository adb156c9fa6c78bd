"""Streams in lanes: a position's sample follows from lane and count, wherever the lane is read."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic
from elastic.data.identity import identify
from elastic.errors import ConfigError
from elastic.job import Plan
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import dry_run, prepare
from elastic.seeds import seed_all
from elastic.units import ENDLESS
from tests.forked import B, configure, fault, train
from tests.shard_jobs import Streamed, streaming
from tests.tiny_jobs import Plain


class Skipping:
    """What can skip, as the streams of datasets can."""

    def __init__(self, samples: range):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)

    def skip(self, count):
        return Skipping(self.samples[count:])


def plan_of(lanes: int, size: int) -> Plan:
    return Plan(50, lanes * size, ENDLESS, size, 0)


def lengths(lane: int) -> int:
    return 3 + lane * 2


def of_range(lane: int, lanes: int) -> range:
    return range(100 * lane, 100 * lane + lengths(lane))


def bound(open, plan: Plan) -> elastic.Lanes:
    lanes = elastic.Lanes(open)
    lanes.bind(plan)
    return lanes


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.lists(st.integers(0, 200), min_size=1, max_size=12),
)
def test_a_position_has_the_same_sample_in_whatever_order_it_is_asked_for(lanes, size, skips, asked):
    plan = plan_of(lanes, size)
    data = bound((lambda lane, of: Skipping(of_range(lane, of))) if skips else of_range, plan)

    found = [data[position] for position in asked]

    for position, sample in zip(asked, found):
        step, place = divmod(position, plan.batch_size)
        lane, within = divmod(place, size)
        assert sample == 100 * lane + (step * size + within) % lengths(lane)


def test_what_a_sample_draws_does_not_go_by_what_was_skipped():
    def drawing(lane, lanes):
        for i in itertools.count():
            yield i, torch.rand(()).item()

    def at(data, position):
        seed_all(position)
        return data[position]

    plan = plan_of(2, 1)
    one, other = bound(drawing, plan), bound(drawing, plan)
    in_order = [at(one, position) for position in range(12)]

    assert at(other, 11) == in_order[11]
    assert at(other, 3) == in_order[3]


def test_a_stream_of_datasets_is_cut_by_its_shards():
    plan = plan_of(4, 1)

    def numbers(shards: int) -> list[list[int]]:
        data = elastic.Lanes.of(streaming(shards, 6))
        data.bind(plan)
        of_lane = [shards * 6 // 4 if shards >= 4 or 4 % shards == 0 else 3] * 4
        return [[data[step * 4 + lane]["n"] for step in range(of_lane[lane])] for lane in range(4)]

    assert sorted(itertools.chain(*numbers(4))) == list(range(24))
    assert sorted(itertools.chain(*numbers(2))) == list(range(12))
    assert sorted(itertools.chain(*numbers(1)))[:4] == [0, 1, 2, 3]
    far = elastic.Lanes.of(streaming(4, 6))
    far.bind(plan)
    assert far[4 * 8 + 1]["n"] == numbers(4)[1][8 % 6]
    few = elastic.Lanes.of(streaming(1, 6))
    few.bind(plan_of(5, 1))
    with pytest.raises(ConfigError, match="has 1 shards for 5 lanes, so that each would be read 5 times; give at most"):
        few[0]


def test_copies_and_pickles_read_for_themselves():
    data = bound(of_range, plan_of(2, 1))
    assert [data[0], data[2]] == [0, 1]

    assert copy.copy(data)[0] == 0
    assert pickle.loads(pickle.dumps(data))[3] == 101
    assert data[4] == 2
    assert data.order(np.arange(3), plan_of(2, 1)).tolist() == [0, 1, 2]
    assert set(identify(data)["found"]) == {"0", "1"}


@pytest.mark.parametrize(
    ("open", "words"),
    [
        (lambda lane, lanes: iter(()), "lane 0 of 2 of the stream has no samples; give a smaller --batch.microbatches"),
        (lambda lane, lanes: Skipping(range(0)), "lane 0 of 2 of the stream has no samples"),
    ],
)
def test_a_lane_without_samples_is_told(open, words):
    with pytest.raises(ValueError, match=words):
        bound(open, plan_of(2, 1))[2]


class Held(Streamed):
    def eval_data(self):
        return elastic.Lanes(of_range)


class Drawn(Streamed):
    def sampler(self, data):
        return elastic.Sequential()


def test_what_has_no_meaning_for_a_stream_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--run.duration is '2ep', but train_data.. is a stream, which has no"):
        prepare(Streamed(), configure(tmp_path, "run", run__duration="2ep"))
    with pytest.raises(ConfigError, match=r"eval_data.. '' is a stream, which has no end; return some of it in a list"):
        prepare(Held(), configure(tmp_path, "run"))
    with pytest.raises(ConfigError, match=r"sampler.. gives an order to a stream"):
        prepare(Drawn(), configure(tmp_path, "run"))
    with pytest.raises(ConfigError, match=r"Lanes.of\(\) was given a list, which has no shard\(\) and num_shards"):
        elastic.Lanes.of([1, 2])
    assert "\na stream, 12 steps\n" in dry_run(prepare(Streamed(), configure(tmp_path, "run")))


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_stream_is_the_same_for_every_world_through_a_death_and_a_resume(tmp_path):
    alone = train(Streamed(), configure(tmp_path, "alone"), 1)
    paused = configure(tmp_path, "moved", run__stop_after="8st", data__workers=2)
    stopped = train(Streamed(), paused, 3, faults=[fault("step.reduce", step=5, rank=1)])
    moved = train(Streamed(), configure(tmp_path, "moved", batch__microbatches=10), 2)
    cut = configure(tmp_path, "cut", parallel__strategy="fsdp")
    lost = train(Streamed(), cut, 3, faults=[fault("step.before_fence", step=5, rank=1)])

    assert (alone.failure, stopped.failure, moved.failure, lost.failure) == (None, None, None, None)
    assert stopped.events("member_lost")
    assert lost.events("member_lost")
    assert moved.sha == alone.sha == lost.sha
    assert moved.column("sample_hash") == alone.column("sample_hash")
    assert gaps_and_doubles(moved.rows, B) == []
    assert moved.result["exactness_held"] is True


class OfDatasets(Plain):
    def train_data(self):
        return elastic.Lanes.of(streaming(23, 7))

    def eval_data(self):
        return None

    def collate_fn(self, samples):
        return super().collate_fn([(torch.as_tensor(s["x"]), s["y"], s["n"]) for s in samples])


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_loader_processes_do_not_cut_a_stream_of_datasets_again(tmp_path):
    alone = train(OfDatasets(), configure(tmp_path, "alone", run__duration="4st"), 1)
    several = train(OfDatasets(), configure(tmp_path, "two", run__duration="4st", data__workers=2), 1)

    assert (alone.failure, several.failure) == (None, None)
    assert several.sha == alone.sha
