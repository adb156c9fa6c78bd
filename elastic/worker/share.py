"""Which microbatches of a step each worker of a world computes, and in which passes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.config import TrainConfig
from elastic.data.deal import deal
from elastic.parallel.layout import Layout, lockstep
from elastic.run.plan import RunPlan

Span = tuple[int, int]  # (first microbatch, number of microbatches)


def spans_of(run: range, plan: RunPlan, config: TrainConfig, *, one_each: bool) -> list[Span]:
    """Cut a run of microbatches into passes.

    Args:
        one_each: each pass has one microbatch.
    """
    if one_each:
        return [(i, 1) for i in run]
    most = -(-plan.microbatches // config.most_cells)
    if config.batch.pass_size is not None:
        most = max(1, config.batch.pass_size // (plan.global_size // plan.microbatches))
    return [(i, min(most, run.stop - i)) for i in range(run.start, run.stop, most)]


def longest_pass(plan: RunPlan, config: TrainConfig, *, one_each: bool) -> int:
    """Return the largest number of microbatches that a pass may have, in a world of any size."""
    return max(count for _, count in spans_of(range(plan.microbatches), plan, config, one_each=one_each))


@dataclass(frozen=True)
class Share:
    """The microbatches of a step that one worker of a world computes.

    Args:
        runs: the microbatches of each cell of the mesh, or of each pipeline.
        rows: the microbatches of each row of the mesh, whose cells share one copy of the model, or of each pipeline.
        own: the microbatches of this worker's cell, or of its pipeline.
        spans: its passes.
        padding: further passes of this worker, which count for nothing: the cells of a row of a sharded model gather
            its parameters together, so all of them make as many passes as the busiest one.
        singles: the same number if each pass has one microbatch.
    """

    runs: list[range]
    rows: list[range]
    own: range
    spans: list[Span]
    padding: int
    singles: int

    @classmethod
    def of(
        cls, plan: RunPlan, config: TrainConfig, layout: Layout, place: int, *, bitwise: bool, one_each: bool
    ) -> Share:
        """Deal the microbatches of a step to the cells of a mesh.

        Args:
            place: this worker's place in the mesh.
            one_each: each pass has one microbatch.
        """
        if layout.stages:  # all stages of a pipeline see the microbatches that it runs
            runs = deal(plan.microbatches, layout.pipelines)
            own = runs[layout.cell_of(place) // layout.stages]
            longest = max(map(len, runs)) if layout.replicas == 1 else len(own)  # a row may have several pipelines
            return cls(runs, runs, own, [(i, 1) for i in own], 0, longest - len(own))
        rows = deal(plan.microbatches, layout.replicas)
        if bitwise:
            runs = [lockstep(row, s, layout.shards) for row in rows for s in range(layout.shards)]
        else:
            runs = deal(plan.microbatches, layout.cells)
        own, padding, singles = runs[layout.cell_of(place)], 0, 0
        spans = spans_of(own, plan, config, one_each=one_each)
        if config.parallel.sharded:
            row = [runs[cell] for cell in layout.row_of(place)]
            padding = max(len(spans_of(run, plan, config, one_each=one_each)) for run in row) - len(spans)
            singles = max(map(len, row)) - len(own)
        return cls(runs, rows, own, spans, padding, singles)
