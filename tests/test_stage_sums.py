"""The exchange of gradients between stages and those that hold their rows, without processes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.deal import deal
from elastic.parallel.canonical import add
from elastic.parallel.levels import Transfer
from elastic.parallel.stage_sums import Grid, Rows, StageSums
from elastic.parallel.tree import TreeSum, blocks
from elastic.placement import Box

LIKE = torch.empty(0)


def carry_out(transfers, members):
    """What a collective does: the tensors of all members of a group, in their order."""
    if transfers[0].output_sizes is None:
        whole = torch.cat([t.input for t in transfers])
        for t in transfers:
            t.output.copy_(whole)
        return
    for i, target in enumerate(transfers):
        came = [t.input.split(t.input_sizes)[i] for t in transfers]
        assert [len(one) for one in came] == target.output_sizes, members
        target.output.copy_(torch.cat(came))


def run(workers, grid):
    """Drive the generators of all cells; returns what each brings."""
    found, waiting = {}, dict(enumerate(workers))
    sent = [0] * grid.cells  # elements that each sends to others
    while waiting:
        ready: dict[int, Transfer] = {}
        for cell, steps in list(waiting.items()):
            try:
                ready[cell] = next(steps)
                assert ready[cell].input_sizes is None or ready[cell].input_sizes[cell] == 0
                sent[cell] += len(ready[cell].input)
            except StopIteration as end:
                found[cell] = end.value
                del waiting[cell]
        if not ready:
            break
        levels = {t.level for t in ready.values()}
        assert len(levels) == 1
        every = [list(range(grid.cells))]
        columns = [list(range(s, grid.cells, grid.shards)) for s in range(grid.shards)]
        for members in every if levels == {0} else columns:
            carry_out([ready[cell] for cell in members], members)
    return found, sent


def rows_of(shape, stage, shards):
    each = shape[1] if len(shape) > 1 else 1
    boxes = [Box.whole(shape).chunk(0, shard, shards) for shard in range(shards)]
    return Rows(stage, tuple(range(b.offsets[0] * each, b.offsets[0] * each + b.volume) for b in boxes))


@given(
    stages=st.integers(1, 4),
    pipelines=st.integers(1, 4),
    over_all=st.booleans(),
    more=st.integers(0, 5),
    shapes=st.lists(st.tuples(st.tuples(st.integers(1, 7), st.integers(1, 3)), st.integers(0, 3)), max_size=7),
    seed=st.integers(0, 1000),
)
def test_each_worker_gets_its_rows_with_the_bits_of_one_tree_over_all_microbatches(
    stages, pipelines, over_all, more, shapes, seed
):
    grid = Grid(1, stages * pipelines, stages) if over_all else Grid(pipelines, stages, stages)
    runs = deal(pipelines + more, pipelines)
    owned = sorted(((shape, stage % stages) for shape, stage in shapes), key=lambda one: one[1])
    generator = torch.Generator().manual_seed(seed)
    leaves = [[torch.randn(shape, generator=generator) for shape, _ in owned] for _ in range(pipelines + more)]
    expected: TreeSum = TreeSum(add)
    for number, leaf in enumerate(leaves):
        expected.push((number, 1), [t.clone() for t in leaf])
    whole = expected.total()
    parameters = [rows_of(shape, stage, grid.shards) for shape, stage in owned]

    workers, plans = [], []
    for cell in range(grid.cells):
        total: TreeSum = TreeSum(add)
        for number in runs[cell // stages]:
            mine = [t.clone() for t, (_, stage) in zip(leaves[number], owned, strict=True) if stage == cell % stages]
            total.push((number, 1), mine)
        plans.append(StageSums(parameters, grid, cell))
        workers.append(plans[-1].exchange(total.parts(), [blocks(run) for run in runs], LIKE))
    found, sent = run(workers, grid)

    for cell in range(grid.cells):
        pieces = [p for flat, sizes in zip(found[cell], plans[cell].sizes, strict=True) for p in flat.split(sizes)]
        for piece, of, total in zip(pieces, parameters, whole, strict=True):
            held = of.shards[cell % grid.shards]
            assert torch.equal(piece, total.reshape(-1)[held.start : held.stop])
    held = sum(len(blocks(run)) for run in runs) * stages * sum(t.numel() for t in whole)
    assert sum(sent) <= held + grid.replicas * (sum(t.numel() for t in whole) + stages * pipelines), "it sends too much"
