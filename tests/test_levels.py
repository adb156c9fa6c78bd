"""The exchange of gradients in one level and in two: the bits of the tree in one process, whoever is on which node."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.deal import deal
from elastic.membership.protocol import Assignment, RestorePoint
from elastic.membership.world import Generation
from elastic.parallel.canonical import CanonicalSum
from elastic.parallel.levels import Level, Transfer, exchange, levels, one_level
from elastic.parallel.tree import TreeSum
from elastic.worker.group import Group
from tests.forked import fork


def tree_sum(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum as one process makes it."""
    total: TreeSum[torch.Tensor] = TreeSum(lambda a, b: a + b)
    for i, leaf in enumerate(leaves):
        total.push((i, 1), leaf)
    return total.total()


def parts_of(run: range, leaves: Sequence[torch.Tensor], cut: int) -> list:
    """The blocks of one rank: of two tensors, cut here."""
    total: TreeSum[torch.Tensor] = TreeSum(lambda a, b: a + b)
    for i in run:
        total.push((i, 1), leaves[i])
    return [(block, [value[:cut].clone(), value[cut:].clone()]) for block, value in total.parts()]


class Wire:
    """Carries out the transfers of all ranks, and counts what each sends to whom."""

    def __init__(self, steps: Sequence[Sequence[Level]]):
        self.steps = steps
        self.sent: dict[tuple[int, int], int] = {}

    def carry(self, transfers: dict[int, Transfer]) -> list[int]:
        """Those of a level's group that all of its members have begun; the ranks that can go on."""
        for rank, transfer in transfers.items():
            members = self.steps[rank][transfer.level].members
            others = [transfers.get(r) for r in members]
            kind = transfer.output_sizes is None
            same = [
                o for o in others if o is not None and o.level == transfer.level and (o.output_sizes is None) == kind
            ]
            if len(same) == len(members) and all(self.steps[r][transfer.level].members == members for r in members):
                self._carry_group(members, [transfers[r] for r in members])
                return list(members)
        raise AssertionError("every rank waits for another one")

    def _carry_group(self, members: Sequence[int], transfers: Sequence[Transfer]) -> None:
        if transfers[0].output_sizes is None:
            everyone = torch.cat([t.input for t in transfers])
            for (rank, t), to in itertools.product(zip(members, transfers), members):
                self._count(rank, to, t.input.numel())
            for t in transfers:
                t.output.copy_(everyone)
            return
        given = [t.input.split(t.input_sizes) for t in transfers]
        for i, t in enumerate(transfers):
            pieces = [of[i] for of in given]
            assert [len(p) for p in pieces] == t.output_sizes
            t.output.copy_(torch.cat(pieces))
            for rank, piece in zip(members, pieces):
                self._count(rank, members[i], len(piece))

    def _count(self, source: int, target: int, elements: int) -> None:
        if source != target and elements:
            self.sent[source, target] = self.sent.get((source, target), 0) + elements


def exchanged(nodes: Sequence[str], leaves: Sequence[torch.Tensor], cut: int = 0) -> tuple[list[torch.Tensor], Wire]:
    """What each rank of a world on these nodes has at the end."""
    runs = deal(len(leaves), len(nodes))
    steps = [levels(nodes, rank) for rank in range(len(nodes))]
    wire, found, waiting = Wire(steps), {}, {}
    under_way = {r: exchange(steps[r], runs, parts_of(runs[r], leaves, cut)) for r in range(len(nodes))}
    going = list(under_way)
    while len(found) < len(nodes):
        for rank in going:
            try:
                waiting[rank] = next(under_way[rank])
            except StopIteration as end:
                found[rank] = end.value
                waiting.pop(rank, None)
        going = wire.carry(waiting) if waiting else []
    return [found[r] for r in range(len(nodes))], wire


def values(count: int, length: int) -> list[torch.Tensor]:
    """Leaves of very different sizes, so that every other order of sums has other bits."""
    made = torch.Generator().manual_seed(count * 1009 + length)
    return [torch.randn(length, generator=made) * 10.0 ** (i % 7) for i in range(count)]


@st.composite
def layouts(draw: st.DrawFn) -> list[str]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return [f"node {n}" for n, size in enumerate(sizes) for _ in range(size)]


@given(layouts(), st.integers(0, 25), st.integers(1, 17), st.data())
def test_every_rank_has_the_bits_of_one_process(nodes, more, length, data):
    leaves = values(len(nodes) + more, length)

    found, _ = exchanged(nodes, leaves, data.draw(st.integers(0, length)))

    expected = tree_sum(leaves)
    for rank, total in enumerate(found):
        assert torch.equal(total, expected), rank


def test_the_leaves_of_these_tests_have_other_bits_in_another_order():
    leaves = values(12, 17)

    assert not torch.equal(tree_sum(leaves), sum(leaves[1:], leaves[0]))


def test_two_levels_have_few_partners_and_send_little_to_other_nodes():
    nodes = [f"node {n}" for n in range(4) for _ in range(8)]
    length = 32 * 8

    _, wire = exchanged(nodes, values(32, length))

    for rank, node in enumerate(nodes):
        partners = {b for a, b in wire.sent if a == rank}
        far = {b for b in partners if nodes[b] != node}
        assert len(partners) == 7 + 3
        assert {b % 8 for b in far} == {rank % 8}
        # its slice is an eighth; of that a quarter stays, and the sum of another quarter goes to three others
        assert sum(wire.sent[rank, b] for b in far) == length // 8 * 3 // 4 + 3 * length // 32


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param("aaaa", id="one node"),
        pytest.param("abcd", id="one worker a node"),
        pytest.param("aaaabbc", id="a node with one worker"),
        pytest.param("aaaaabb", id="a node with more than twice as many"),
        pytest.param("abab", id="nodes that are no neighbours"),
    ],
)
def test_where_a_second_level_brings_nothing_there_is_one(nodes):
    assert [levels(nodes, r) for r in range(len(nodes))] == [(one_level(len(nodes), r),) for r in range(len(nodes))]


def test_a_worker_beyond_those_of_the_smallest_node_owns_nothing():
    inside, *between = levels("aaabb", 2)

    assert (inside.members, inside.owners, inside.owns, between) == ((0, 1, 2), 2, False, [])
    assert levels("aaabb", 1)[1] == Level((1, 4), ((0, 1, 2), (3, 4)), 2, 0)


# ---- over real connections -----------------------------------------------------------------------------------------

NODES = ["a", "a", "b", "b"]


def take_part(port: int, rank: int, folder: str) -> None:
    """A worker of a world of four on two nodes: it sums its leaves with the others, each bucket on the way at once."""
    assignment = Assignment(Generation(1, 1), rank, 4, ("127.0.0.1", port), RestorePoint(), 0)
    world = Group(assignment, torch.device("cpu"), node=NODES[rank], exact=True)
    world.connect(60.0)
    runs = deal(9, 4)
    total = CanonicalSum(world.mesh.links, runs, 300)
    for i in runs[rank]:
        total.push(i, leaf(i))
    found = total.reduce()
    torch.save(([link.level for link in world.mesh.links], found), f"{folder}/{rank}")
    world.gather_ints(0)
    world.close()


def leaf(i: int) -> list[torch.Tensor]:
    """Tensors of several shapes, one of them empty, and two dtypes: several buckets."""
    flat = values(9, 130)[i]
    return [flat[:100].clone().view(4, 25), flat[:0], flat[100:107].clone(), flat[107:].double()]


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_four_workers_on_two_nodes_have_the_bits_of_one_process(tmp_path):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [fork(take_part, server.port, rank, str(tmp_path)) for rank in range(4)]
    try:
        for member in members:
            member.join(60)
            assert member.exitcode == 0
    finally:
        for member in members:
            member.kill()
            member.join()

    for rank in range(4):
        steps, found = torch.load(tmp_path / str(rank), weights_only=False)
        assert steps == list(levels(NODES, rank))
        assert len(steps) == 2
        for i, tensor in enumerate(found):
            expected = tree_sum([leaf(n)[i] for n in range(9)])
            assert tensor.shape == expected.shape
            assert torch.equal(tensor, expected)
