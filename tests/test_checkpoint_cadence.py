"""How often a run saves, and which checkpoints it keeps."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.cadence import LONGEST_S, SHORTEST_S, auto_interval, save_cost, young_daly
from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.run.plan import resolve
from tests.forked import configure, train
from tests.tiny_jobs import Everything, Plain

seconds = st.floats(0.001, 1e4)


@given(seconds, seconds)
def test_the_interval_by_young_and_daly_loses_least(cost, between):
    def lost(interval: float) -> float:  # share of time: saving, and half an interval at each fault
        return cost / interval + interval / (2 * between)

    best = young_daly(cost, between)

    assert lost(best) <= min(lost(best * 1.01), lost(best / 1.01))


@given(st.lists(seconds, max_size=20), st.floats(0, 1e6), st.integers(0, 100))
def test_saving_takes_at_most_a_twentieth_of_the_time_and_no_interval_is_absurd(costs, elapsed, faults):
    interval = auto_interval(costs, elapsed, faults)

    recent = sorted(costs[-9:])
    assert interval >= SHORTEST_S
    if recent:
        assert recent[len(recent) // 2] / interval <= 0.05 + 1e-9
    else:
        assert interval <= LONGEST_S
    assert auto_interval(costs, elapsed, faults + 1) <= interval
    assert math.isfinite(interval)


def test_auto_is_what_a_run_can_be_asked_for():
    config = configure("nowhere", "run", checkpoint__every="auto")

    assert resolve(config, dataset_size=100, tokens_per_sample=None).checkpoint_every_s == 0.0, "it is found out"


def test_one_slow_save_does_not_change_the_interval():
    usual = [save_cost(0.1, 2.0)] * 5

    assert auto_interval([*usual, 300.0], 3600, 2) == auto_interval([*usual, usual[0]], 3600, 2)


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_saves_by_the_clock(tmp_path):
    config = configure(tmp_path, "run", run__duration="300st", checkpoint__every="0.3s", checkpoint__keep_last=100)

    ran = train(Plain(), config, 1)

    committed = ran.events("checkpoint_committed")
    assert len(committed) > 1
    assert ran.events("checkpoint_failed") == []
    times = [e["time"] for e in committed[:-1]]
    assert all(later - earlier > 0.25 for earlier, later in itertools.pairwise(times))


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_keeps_every_nth_of_its_checkpoints_beside_the_last(tmp_path):
    options = {"checkpoint__every": "1st", "checkpoint__keep_last": 2, "checkpoint__keep_every": "150tok"}
    job = Counted()

    ran = train(job, configure(tmp_path, "run", **options), 1)

    assert [c.step for c in newest_first(ran.storage)] == [12, 11, 10, 5], "150 tokens are five steps of 30 samples"


class Counted(Plain):
    tokens_per_sample = 1


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_keeps_what_its_evaluation_calls_best(tmp_path):
    options = {"checkpoint__every": "1st", "checkpoint__keep_last": 1, "checkpoint__keep_best": 2}
    best = {"checkpoint__best_metric": "eval/near/accuracy", "checkpoint__best_mode": "max"}

    ran = train(Everything(), configure(tmp_path, "run", eval__every="2st", **options, **best), 1)

    found = {step: values["eval/near/accuracy"] for step, values in ran.evaluations.items()}
    ranked = sorted(found, key=lambda step: (-found[step], -step))
    kept = [c.step for c in newest_first(ran.storage)]
    assert kept == sorted({12, *ranked[:2]}, reverse=True)
    for checkpoint in newest_first(ran.storage):
        metrics = read_manifest(ran.storage, checkpoint).metrics
        assert metrics == ran.evaluations[checkpoint.step]
