"""What every worker knows of a step: sums in tree order, the sample hash, changed buffers, the first bad microbatch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.data.deal import deal
from elastic.errors import ConfigError
from elastic.parallel.carrier import Carrier
from elastic.parallel.records import Metrics, PendingRecord, Records
from elastic.parallel.replicated import _LossOf

CPU = torch.device("cpu")
finite = st.floats(-1e6, 1e6)
microbatches = st.lists(
    st.tuples(finite, st.integers(1, 99), finite, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=24
)


def _add(records, loss, weight, metric, digest, changed=0):
    records.add(torch.tensor(loss, dtype=torch.float64), weight, {"metric": metric}, (digest,), changed)


def _gathered(runs, values, buffer_words=0, changed=()):
    """The record of a step, from what each rank would send: its rows, padded to the longest."""
    ranks = []
    for rank, run in enumerate(runs):
        records = Records(runs, rank, CPU, buffer_words, Metrics(names=["metric"]))
        for i in run:
            _add(records, *values[i], changed=changed[i] if changed else 0)
        ranks.append(records)
    longest = max(len(run) for run in runs)
    everyone = torch.stack([records._matrix(longest) for records in ranks])
    return PendingRecord(ranks[0], everyone, None).result()


@given(microbatches, st.integers(1, 6))
def test_the_record_has_the_same_bits_at_every_world_size(values, world_size):
    alone = _gathered([range(len(values))], values)
    if world_size > len(values):
        return

    found = _gathered(deal(len(values), world_size), values)

    assert found == alone
    assert found.loss == pytest.approx(math.fsum(v[0] for v in values) / sum(v[1] for v in values), abs=1e-6)
    assert found.weight == sum(v[1] for v in values)


@given(microbatches, st.data())
def test_another_sample_or_another_order_gives_another_hash(values, data):
    here = _gathered([range(len(values))], values).sample_hash
    i = data.draw(st.integers(0, len(values) - 1))
    other = [*values]
    other[i] = (*values[i][:3], values[i][3] ^ 1)

    assert _gathered([range(len(other))], other).sample_hash != here
    backwards = values[::-1]
    same = [v[3] for v in backwards] == [v[3] for v in values]
    assert (_gathered([range(len(values))], backwards).sample_hash == here) == same


@given(st.lists(st.integers(0, 2**130 - 1), min_size=1, max_size=8), st.integers(1, 3))
def test_a_buffer_changed_anywhere_is_changed_for_all(changed, world_size):
    values = [(1.0, 1, 0.0, 0)] * len(changed)
    if world_size > len(changed):
        return

    found = _gathered(deal(len(changed), world_size), values, buffer_words=3, changed=changed)

    expected = 0
    for mask in changed:
        expected |= mask
    assert found.changed_buffers == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_microbatch_whose_loss_or_weight_is_not_finite_is_known(bad):
    good = (1.0, 1, 0.0, 0)

    assert _gathered(deal(5, 2), [good] * 5).nonfinite_microbatch is None
    assert _gathered(deal(5, 2), [good, good, good, (bad, 1, 0.0, 0), (bad, 1, 0.0, 0)]).nonfinite_microbatch == 3
    assert _gathered(deal(5, 2), [good, (1.0, bad, 0.0, 0), good, good, good]).nonfinite_microbatch == 1
    assert _gathered(deal(5, 2), [(1.0, 1, bad, 0), good, good, good, good]).nonfinite_microbatch is None


@given(st.lists(st.tuples(st.integers(1, 3), st.floats()), min_size=1, max_size=4))
def test_what_each_rank_tells_beside_is_known_to_all_and_in_no_sum(told):
    values = [(2.0, 3, 1.0, 11)] * sum(count for count, _ in told)
    starts = [sum(count for count, _ in told[:rank]) for rank in range(len(told) + 1)]
    runs = [range(a, b) for a, b in itertools.pairwise(starts)]
    ranks = [Records(runs, rank, CPU, metrics=Metrics(names=["metric"])) for rank in range(len(runs))]
    for records, (count, value) in zip(ranks, told):
        for i in range(count):
            _add(records, *values[i])
        records.attach(torch.tensor(value, dtype=torch.float64), 7.0)
        records.say([count, -count, 1 << 62])

    longest = max(count for count, _ in told)
    found = PendingRecord(ranks[0], torch.stack([r._matrix(longest) for r in ranks]), None).result()

    assert list(map(repr, found.attached)) == [repr((value, 7.0)) for _, value in told]
    counts = [count for count, _ in told]
    assert found.said == (max(counts), -min(counts), 1 << 62), "of what ranks say, all know the largest"
    assert dataclasses.replace(found, attached=(), said=()) == _gathered(runs, values)


def test_several_microbatches_of_one_pass_count_once_and_keep_their_digests():
    values = [(2.0, 3, 1.0, 11), (4.0, 5, 2.0, 22)]
    one_by_one = _gathered([range(2)], values)
    runs = [range(2)]
    together = Records(runs, 0, CPU)

    together.add(torch.tensor(6.0), 8, {"metric": 3.0}, (11, 22))

    assert together.gather(None).result() == one_by_one


def _alone(microbatches, metrics):
    """The record of a step of one rank, from (weight, metrics) of each microbatch."""
    records = Records([range(len(microbatches))], 0, CPU, metrics=metrics)
    for i, (weight, values) in enumerate(microbatches):
        records.add(torch.tensor(1.0), weight, values, (i,))
    return records.gather(None).result()


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), finite), min_size=1, max_size=4), st.integers(1, 3))
def test_metrics_are_those_of_the_step_whatever_they_were_before(steps, count):
    agreed = Metrics()

    for values in steps:
        found = _alone([(1, values)] * count, agreed)

        assert found.metrics == {k: pytest.approx(v * count) for k, v in sorted(values.items())}
        assert agreed.names == sorted(values)


def test_metrics_that_change_from_microbatch_to_microbatch_are_refused_by_name():
    with pytest.raises(ConfigError, match="returned the metrics accuracy for some microbatches and perplexity, top5 f"):
        _alone([(1, {"accuracy": 1.0}), (1, {"top5": 1.0, "perplexity": 2.0})], Metrics())


def test_a_negative_weight_is_refused_by_microbatch():
    with pytest.raises(
        ConfigError, match=r"the weight that loss\(\) returned is -2 in microbatch 1; return the number"
    ):
        _alone([(1, {}), (-2, {}), (1, {})], Metrics())


def test_a_step_without_weight_has_no_loss():
    found = _gathered([range(1)], [(1.0, 0, 2.0, 0)])

    assert math.isnan(found.loss)
    assert math.isnan(found.mean_metrics()["metric"])


@given(
    st.lists(st.tuples(st.floats(), st.integers(-(2**63), 2**63 - 1)), min_size=2, max_size=6),
    st.sampled_from([1, 1, 3, 7, 682]),
)
def test_rows_come_back_bit_for_bit_from_the_sum_of_gradients(values, times):
    ranks = len(values) * times
    runs = [range(rank, rank + 1) for rank in range(ranks)]
    total, pending = 0.0, None
    for rank, (loss, digest) in enumerate(values):  # the other ranks' rows are zero
        records = Records(runs, rank, CPU, 1, Metrics(names=["metric"]))
        _add(records, loss, 3, -loss, digest, changed=1 << 63)
        records.say([digest, ~digest])
        carrier = Carrier(ranks, rank, 1, 1, CPU, rounds=False)
        if not carrier.has_room(records._matrix(1)):
            assert ranks > 500, "only large records are gathered"
            return
        carrier(torch.zeros((), requires_grad=True)).backward()
        pending = records.gather(None, carrier)  # it would raise if it needed a process group
        total = total + carrier._given * (1.0 / ranks)  # as DDP does
    carrier.rows.grad = total
    rows = pending.everyone()

    for row, (loss, digest) in zip(rows[:, 0], values):
        assert row[0] == digest
        assert row[1] == -(2**63)
        assert repr(row[3:6].view("f8").tolist()) == repr([loss, 3.0, -loss])
        assert row[6:].tolist() == [digest, ~digest]


def test_a_record_travels_in_the_last_backward_pass_of_ddp_and_not_in_those_before():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, carrier = nn.Linear(3, 2), Carrier(1, 0, 2, 0, CPU, rounds=False)
        ddp = nn.parallel.DistributedDataParallel(
            _LossOf(model, lambda model, batch: (model(batch).sum(), 1, {}), carrier), gradient_as_bucket_view=True
        )
        for step in range(3):
            model.zero_grad(set_to_none=True)
            for last in (False, True):
                ddp.module.batch = torch.full((4, 3), float(step))
                with contextlib.nullcontext() if last else ddp.no_sync():
                    loss = ddp(last=last)
                    fetch = carrier.load(torch.tensor([[step, -1], [1 << 62, 5]]))
                    loss.backward()
            assert fetch().tolist() == [[[step, -1], [1 << 62, 5]]]
            assert model.weight.grad.tolist() == [[8.0 * step] * 3] * 2
    finally:
        dist.destroy_process_group()


def test_no_rows_travel_with_gradients_that_are_rounded_or_when_they_are_many():
    mine = torch.zeros(2, 8, dtype=torch.int64)
    assert Carrier(2, 0, 2, 0, CPU, rounds=False).has_room(mine)
    assert not Carrier(2, 0, 2, 0, CPU, rounds=True).has_room(mine)
    assert not Carrier(2, 0, 4096, 0, CPU, rounds=False).has_room(mine)
    assert not Carrier(2, 0, 2, 0, CPU, rounds=False).has_room(torch.zeros(2, 30, dtype=torch.int64))
