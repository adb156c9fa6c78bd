"""Layouts, and how a cut state gets from one into another: pure."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from elastic.data.deal import deal
from elastic.parallel.layout import SHARD, TENSOR, Held, Layout, fill_cells, holders, lay_out, lockstep, lost_parts
from elastic.placement import Part


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
            assert place in found.copies[found.part(place)]
    assert found.size >= 1
    assert [*found.copies] == [*found.part(0).siblings], "together they hold the state"
    assert [found.is_first(place) for place in range(found.size)] == [p < found.shards for p in range(found.size)]


@given(worlds(), st.integers(1, 4))
def test_a_row_of_hsdp_lies_on_one_node_wherever_there_are_several_rows(nodes, per_node):
    found = lay_out(nodes, "hsdp", per_node)

    if found.replicas > 1:
        assert found.shards == per_node
        rows = [found.ranks[i : i + per_node] for i in range(0, found.size, per_node)]
        assert all(len({nodes[rank] for rank in row}) == 1 for row in rows)
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


def part(shard: int, shards: int) -> Part:
    return Part.of([(SHARD, shard, shards)])


NONE = Held(-1, Part())


def test_a_lost_shard_of_the_newest_state_is_named_and_nothing_is_whole():
    held = [Held(7, part(0, 3)), Held(7, part(2, 3)), NONE]

    assert holders(held) is None
    assert lost_parts(held) == "of the state of step 7, shard 1 of 3 was lost"


def test_whoever_is_behind_or_new_holds_nothing():
    assert holders([NONE, NONE]) is None
    assert lost_parts([NONE]) == ""
    found = holders([Held(4, part(0, 2)), Held(5, part(0, 2)), Held(5, part(1, 2)), NONE])
    assert found == {part(0, 2): [1], part(1, 2): [2]}


def test_copies_hold_what_one_of_them_lost():
    assert holders([Held(3, part(0, 2)), Held(3, part(1, 2)), Held(3, part(1, 2))]) == {
        part(0, 2): [0],
        part(1, 2): [1, 2],
    }
    assert holders([Held(2, Part()), Held(3, Part()), Held(3, Part())]) == {Part(): [1, 2]}


def test_a_state_that_was_cut_otherwise_counts_by_itself():
    """A spare may come from a world of another size."""
    found = holders([Held(3, part(0, 2)), *(Held(3, part(shard, 3)) for shard in range(3))])

    assert found == {part(shard, 3): [shard + 1] for shard in range(3)}


@given(worlds(), st.sampled_from(["ddp", "fsdp", "hsdp"]), st.sampled_from([2, 3, 4]), st.integers(1, 2))
def test_a_cell_has_neighbours_of_one_node_and_every_rank_a_place_or_none(nodes, strategy, tensor, cells_per_node):
    assume(fill_cells(nodes, tensor))
    found = lay_out(nodes, strategy, tensor * cells_per_node, tensor)

    assert sorted((*found.ranks, *found.spares)) == list(range(len(nodes)))
    assert found.size == len(found.ranks) == found.cells * tensor
    for first in range(0, found.size, tensor):
        cell = found.ranks[first : first + tensor]
        assert len({nodes[rank] for rank in cell}) == 1
        assert [found.part(place).axes[-1] for place in range(first, first + tensor)] == [
            (TENSOR, t, tensor) for t in range(tensor)
        ]
        assert len({found.cell_of(place) for place in range(first, first + tensor)}) == 1
    assert [*found.copies] == [*found.part(0).siblings], "together they hold the state"
    assert all(len(places) == found.replicas for places in found.copies.values())
    if strategy != "hsdp":
        assert found.cells == sum(nodes.count(node) // tensor for node in set(nodes))
    rows = [found.row_of(place) for place in range(found.size)]
    assert sorted({row.start for row in rows}) == [i * found.shards for i in range(found.replicas)]


@given(worlds(), st.sampled_from(["ddp", "fsdp", "hsdp"]), st.integers(1, 4))
def test_cells_of_one_worker_are_what_there_was_before(nodes, strategy, per_node):
    found = lay_out(nodes, strategy, per_node)

    assert found.tensor == 1
    assert found.cells == found.size
    assert all(len(found.part(place).axes) <= 1 for place in range(found.size))


def test_mates_of_two_lost_workers_hold_a_copy_together():
    layout = lay_out("aabb", "ddp", None, 2)
    held = [Held(5, layout.part(place)) for place in range(4)]

    assert holders([held[0], held[3]]) == {layout.part(0): [0], layout.part(1): [1]}
    assert holders([held[0], held[2]]) is None
    assert lost_parts([held[0], held[2]]) == "of the state of step 5, tensor 1 of 2 was lost"
