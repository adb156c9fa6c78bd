"""Layouts, and how a cut state gets from one into another: pure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.deal import deal
from elastic.parallel.layout import Held, Layout, holders, lay_out, lockstep, lost_shards, moves, shard_range, sources

sizes = st.integers(1, 12)


@st.composite
def worlds(draw: st.DrawFn) -> list[str]:
    """Nodes of the ranks of a world, in rank order: a node's ranks are neighbours, as membership orders them."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    return [f"n{i}" for i, count in enumerate(counts) for _ in range(count)]


@given(worlds(), st.sampled_from(["ddp", "fsdp", "hsdp"]), st.integers(1, 4))
def test_every_rank_has_one_place_or_is_a_spare(nodes, strategy, per_node):
    found = lay_out(nodes, strategy, per_node)

    assert sorted((*found.ranks, *found.spares)) == list(range(len(nodes)))
    assert found.size == len(found.ranks)
    for rank in range(len(nodes)):
        place = found.place_of(rank)
        assert (place is None) == (rank in found.spares)
        if place is not None:
            assert found.ranks[place] == rank
            assert rank in found.row(place)
    assert found.size >= 1


@given(worlds(), st.integers(1, 4))
def test_a_row_of_hsdp_lies_on_one_node_wherever_there_are_several_rows(nodes, per_node):
    found = lay_out(nodes, "hsdp", per_node)

    if found.replicas > 1:
        assert found.shards == per_node
        assert all(len({nodes[r] for r in found.row(place)}) == 1 for place in range(found.size))
        assert len(found.spares) == sum(nodes.count(n) % per_node for n in set(nodes))
    else:
        assert sum(nodes.count(n) // per_node for n in set(nodes)) <= 1
        assert found == Layout(1, len(nodes), tuple(range(len(nodes))))


@pytest.mark.parametrize(
    ("nodes", "strategy", "expected"),
    [
        ("aabb", "ddp", Layout(4, 1, (0, 1, 2, 3))),
        ("aabb", "fsdp", Layout(1, 4, (0, 1, 2, 3))),
        ("aabb", "hsdp", Layout(2, 2, (0, 1, 2, 3))),
        ("abbcc", "hsdp", Layout(2, 2, (1, 2, 3, 4), (0,))),
        ("abb", "hsdp", Layout(1, 3, (0, 1, 2))),
        ("ab", "hsdp", Layout(1, 2, (0, 1))),
        ("a", "hsdp", Layout(1, 1, (0,))),
    ],
)
def test_layouts(nodes, strategy, expected):
    assert lay_out(nodes, strategy, 2) == expected


@given(st.integers(0, 40), sizes)
def test_shards_are_those_of_torch_chunk(length, shards):
    cut = torch.arange(length).chunk(shards) if length else ()

    found = [list(shard_range(length, shard, shards)) for shard in range(shards)]

    assert [c.tolist() for c in cut] == [f for f in found if f]
    assert [i for f in found for i in f] == list(range(length))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
def test_lockstep_deals_every_microbatch_once_in_rounds_of_neighbours(count, replicas, shards):
    if count < replicas * shards:
        return  # every worker has a microbatch: checked with the options
    rows = deal(count, replicas)

    runs = [lockstep(row, s, shards) for row in rows for s in range(shards)]

    assert sorted(m for run in runs for m in run) == list(range(count))
    for i, row in enumerate(rows):
        mine = runs[i * shards : (i + 1) * shards]
        rounds = max(map(len, mine))
        assert min(map(len, mine)) in (rounds, rounds - 1)
        dealt = [run[k] for k in range(rounds) for run in mine if k < len(run)]
        assert dealt == list(row), "round after round, in the order of the tree"


# ---- who holds what --------------------------------------------------------------------------------------------


def test_a_lost_shard_of_the_newest_state_is_named_and_nothing_is_whole():
    held = [Held(7, 0, 3), Held(7, 2, 3), Held(-1, 0, 1)]

    assert holders(held) is None
    assert lost_shards(held) == "of the state of step 7, shard 1 of 3 was lost"


def test_whoever_is_behind_or_new_holds_nothing():
    assert holders([Held(-1, 0, 1), Held(-1, 0, 1)]) is None
    assert holders([Held(4, 0, 2), Held(5, 0, 2), Held(5, 1, 2), Held(-1, 0, 1)]) == [[1], [2]]


def test_copies_hold_what_one_of_them_lost():
    assert holders([Held(3, 0, 2), Held(3, 1, 2), Held(3, 1, 2)]) == [[0], [1, 2]]


def test_a_state_that_was_cut_otherwise_counts_by_itself():
    """A spare may come from a world of another size."""
    assert holders([Held(3, 0, 2), Held(3, 0, 3), Held(3, 1, 3), Held(3, 2, 3)]) == [[1], [2], [3]]


@given(st.integers(0, 30), st.lists(st.integers(1, 3), min_size=1, max_size=4), sizes, st.data())
def test_moves_bring_every_row_to_everyone_who_needs_it_from_someone_who_has_it(length, copies, shards, data):
    found, rank = [], 0
    for count in copies:
        found.append(list(range(rank, rank + count)))
        rank += count
    targets = [(data.draw(st.integers(0, rank + 2)) if rank else 0, s, shards) for s in range(shards)]

    plan = moves(length, found, targets)

    for target, shard, _ in targets:
        mine = [m for m in plan if m.target == target]
        rows = [row for m in mine for row in range(m.start, m.stop)]
        assert set(shard_range(length, shard, shards)) <= set(rows)
    for m in plan:
        old = next(i for i, ranks in enumerate(found) if m.source in ranks)
        have = shard_range(length, old, len(found))
        assert have.start <= m.start < m.stop <= have.stop
        holder = any(m.target in ranks and m.source != m.target and m.target in found[old] for ranks in found)
        assert not holder, "who holds rows takes them from itself"


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=9))
def test_who_lacks_the_newest_state_takes_it_from_those_that_have_it_in_turn(steps):
    found = sources(steps)

    assert all(steps[source] == max(steps) for source in found)
    assert all(source == rank for rank, source in enumerate(found) if steps[rank] == max(steps))
    given_by = [sum(s == giver != rank for rank, s in enumerate(found)) for giver in set(found)]
    assert max(given_by) - min(given_by) <= 1
