"""A job's own order: a pure function from position to index, the same for every number of workers."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.data.fetching import Order
from elastic.data.samplers import positions_to_ids, signs
from elastic.errors import ConfigError
from elastic.job import Plan
from elastic.likeness import data_change, difference
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import prepare
from tests.forked import B, configure, fault, train
from tests.surface_jobs import Drawn, Ordered


def plan_of(samples: int, microbatch: int, microbatches: int, seed: int = 0, steps: int = 20) -> Plan:
    return Plan(steps, microbatch * microbatches, samples, microbatch, seed)


samplers = st.sampled_from(
    [
        lambda n: elastic.Sequential(),
        lambda n: elastic.Weighted([1 + i % 7 for i in range(n)]),
        lambda n: elastic.ByLength([(i * 37) % 11 for i in range(n)], window=2),
        lambda n: elastic.Curriculum([(i * 53) % n for i in range(n)], until=5),
    ]
)


@given(samplers, st.integers(12, 200), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**63 - 1), st.data())
def test_a_position_has_the_same_sample_alone_as_among_others(make, samples, size, parts, seed, data):
    plan, sampler = plan_of(samples, size, parts, seed), make(samples)
    positions = np.arange(20 * plan.batch_size)

    together = sampler(positions, plan)

    assert together.min() >= 0
    assert together.max() < samples
    for position in data.draw(st.lists(st.sampled_from(positions.tolist()), min_size=1, max_size=5)):
        assert make(samples)(np.array([position]), plan).tolist() == [together[position]]


@given(st.integers(12, 200), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**63 - 1))
def test_by_length_takes_every_sample_once_an_epoch(samples, size, parts, window, seed):
    plan = plan_of(samples, size, parts, seed)
    sampler = elastic.ByLength([(i * 37) % 11 for i in range(samples)], window=window)

    ids = sampler(np.arange(3 * samples), plan)

    for epoch in range(3):
        assert sorted(ids[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))
    assert samples < 50 or ids[:samples].tolist() != ids[samples : 2 * samples].tolist()


def test_by_length_pads_less_in_every_epoch_though_epochs_have_no_whole_batches():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    plan = plan_of(1003, 8, 4)

    def padded(order: np.ndarray) -> float:
        of = lengths[order[: len(order) // 8 * 8]].reshape(-1, 8)
        return float((of.max(1) * 8).sum() / of.sum())

    ids = elastic.ByLength(lengths, window=10)(np.arange(4 * 1003), plan)
    shuffled = Order(seed=0, dataset_size=1003, global_size=32, microbatches=4).ids(np.arange(4 * 1003))

    assert padded(shuffled) > 1.6
    assert padded(ids) < 1.08
    of_steps = lengths[ids[: 4 * 1003 // 32 * 32]].reshape(-1, 32).mean(1)
    assert abs(np.corrcoef(of_steps[:-1], of_steps[1:])[0, 1]) < 0.3  # steps do not go from short to long


def test_weights_are_shares_of_the_positions_and_zero_is_never():
    weights = [0.0, 1.0, 3.0, 0.0, 6.0, 1e-300]
    plan = plan_of(6, 4, 4, seed=3)

    ids = elastic.Weighted(weights)(np.arange(100_000), plan)

    found = Counter(ids.tolist())
    assert set(found) == {1, 2, 4}
    assert [round(found[i] / 100_000, 2) for i in (1, 2, 4)] == [0.1, 0.3, 0.6]
    assert elastic.Weighted(weights)(np.arange(50), plan_of(6, 4, 4, seed=4)).tolist() != ids[:50].tolist()


def test_a_curriculum_begins_with_the_easiest_and_ends_with_all():
    difficulty = np.random.default_rng(1).permutation(200)
    plan = plan_of(200, 5, 4, steps=60)
    ids = elastic.Curriculum(difficulty, until=20, begin=0.1)(np.arange(60 * 20), plan)

    hardest = difficulty[ids].reshape(60, 20).max(1)

    assert hardest[0] < 20
    assert all(hardest[s] < 200 * (0.1 + 0.9 * s / 20) for s in range(20))
    assert sorted(ids[400:600].tolist()) == list(range(200))


def test_the_order_of_each_is_the_one_of_every_version():
    """Stored runs are resumed by newer versions: these values may never change."""
    plan, at = plan_of(10, 2, 2, seed=7), np.arange(12)

    assert elastic.Weighted(range(10))(at, plan).tolist() == [3, 6, 6, 9, 6, 6, 3, 2, 9, 4, 4, 5]
    assert elastic.ByLength(range(10), window=2)(at, plan).tolist() == [3, 4, 1, 2, 5, 6, 7, 8, 0, 9, 0, 1]
    assert elastic.Curriculum(range(10), until=2)(at, plan).tolist() == [0, 0, 0, 0, 3, 4, 3, 1, 0, 9, 3, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: elastic.Weighted([1, -2]), "but weight 1 is -2.0"),
        (lambda: elastic.Weighted([1, float("nan")]), "but weight 1 is nan"),
        (lambda: elastic.Weighted([0, 0]), "but there is none above 0"),
        (lambda: elastic.ByLength([1], window=0), "was given the window 0"),
        (lambda: elastic.Curriculum([1], until=3, begin=0), "until=3 and begin=0; give a whole number of steps"),
    ],
)
def test_what_makes_no_order_is_refused_where_it_is_made(make, words):
    with pytest.raises(ConfigError) as raised:
        make()
    assert words in str(raised.value)


def test_one_number_for_each_sample_is_needed():
    with pytest.raises(ConfigError, match=r"Weighted\(\) was given 3 weights, but train_data\(\) has 6 samples"):
        elastic.Weighted([1, 1, 1])(np.arange(2), plan_of(6, 1, 2))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("outside", "sampler() gives index 100 at position 100, but train_data() has 100 samples, 0 to 99"),
        ("short", "sampler(), asked for positions 0 to 29, answered with int64 [1]; it is to return a whole number"),
        ("halves", "sampler(), asked for positions 0 to 29, answered with float64 [30]"),
        ("late", "sampler(), asked for position 89, failed, KeyError: 'no more'"),
        ("by-call", "sampler() gives index"),
        ("list", "sampler() returned a list, but it is to return a function of (positions, plan)"),
    ],
)
def test_an_order_that_does_not_answer_is_refused_before_anything_starts(tmp_path, order, words):
    config = configure(tmp_path, "run")
    with pytest.raises(ConfigError) as raised:
        prepare(Ordered(order=order), config)
    assert str(raised.value).startswith(words)


def test_an_order_that_another_process_has_otherwise_is_another_description():
    plan = plan_of(100, 3, 10)
    mine, other = ({"samples": 100, "found": {}, "order": signs(lambda p, s=s: (p + s) % 100, plan)} for s in (0, 1))

    here = [f'{{"data": {{"train_data()": {text}}}}}'.replace("'", '"') for text in (str(mine), str(other))]

    assert mine["order"].keys() == {"0", *(str(1 << k) for k in range(10))}
    sentence = "its sampler() gives another sample than the world's at position 0"
    assert difference(here[0], here[1], False) == sentence
    assert difference(here[0], here[0], False) == ""
    assert data_change(mine, other, "before") == (
        "the sample at position 0 of the order is not the one that it was before"
    )
    assert data_change(mine, {"samples": 100, "found": {}}, "before") == ""  # an older version did not say


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_drawn_samples_are_the_same_for_every_world_through_deaths_and_a_resume(tmp_path):
    alone = train(Drawn(), configure(tmp_path, "alone"), 1)
    first = configure(tmp_path, "moved", run__stop_after="8st", data__workers=1)
    stopped = train(Drawn(), first, 3, faults=[fault("step.reduce", step=4, rank=1)])
    moved = train(Drawn(), configure(tmp_path, "moved", batch__microbatches=10), 2)

    assert (alone.failure, stopped.failure, moved.failure) == (None, None, None)
    assert stopped.result["steps"] == 8
    assert moved.events("member_lost") or stopped.events("member_lost")
    assert moved.sha == alone.sha
    assert moved.result["exactness_held"] is True
    assert moved.column("loss") == alone.column("loss")
    assert gaps_and_doubles(moved.rows, B) == []
    plan = alone.run.plan.for_job
    ids = positions_to_ids(Drawn(), range(plan.samples), plan)(np.arange(12 * B))
    assert len(set(ids[:60].tolist())) < 60  # some twice in less than an epoch
    parts = [xxhash.xxh3_64_intdigest(row.astype("<i8").tobytes()) for row in ids.reshape(-1, 3)]
    steps = np.array(parts, dtype=np.uint64).reshape(12, 10)
    assert moved.column("sample_hash") == [xxhash.xxh3_64_hexdigest(s.astype("<u8").tobytes()) for s in steps]


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_workers_with_other_orders_do_not_train_together_and_another_order_does_not_resume(tmp_path):
    left = train(Ordered(order="by-process"), configure(tmp_path, "process", run__duration="4st"), 2)
    kept = configure(tmp_path, "kept", run__stop_after="2st", run__duration="4st")
    train(Ordered(order="none"), kept, 1)
    changed = configure(tmp_path, "kept", run__duration="4st", run__allow_change=("job.order",))
    refused = train(Ordered(order="once"), changed, 1)

    [event] = [e for e in left.events("notice") if "left out" in e["detail"]]
    assert "its sampler() gives another sample than the world's at position 0" in str(event)
    assert "the sample at position 0 of the order is not the one that it was when step 2" in (refused.failure or "")


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("loaders", [0, 1])
def test_an_index_outside_the_data_ends_the_run_with_one_sentence(tmp_path, loaders):
    job = Ordered(order="in-workers", driver=os.getpid())

    ran = train(job, configure(tmp_path, "run", data__workers=loaders), 2)

    assert "sampler() gives index 180 at position 180, but train_data() has 100 samples, 0 to 99" in ran.failure
    assert "Traceback" not in ran.failure
