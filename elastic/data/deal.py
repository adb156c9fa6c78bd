"""Which microbatches of a step each cell runs. Pure functions; how the batch is divided never depends on the world.

A cell is what runs a microbatch: one worker, or `cell_size` workers together.
"""

from __future__ import annotations

import itertools

from elastic.errors import ConfigError
from elastic.placement import pipelines


def choose_microbatches(global_size: int, max_workers: int, cell_size: int = 1, stages: int = 1) -> int:
    """Choose the number of microbatches if the user gives none: the smallest divisor of `global_size` that is at least
    4 x the most cells, or if there is none, the largest divisor that is at least the most cells, or pipelines.

    Args:
        stages: the fewest of a pipeline; 1 without pipelines.

    Raises:
        ConfigError: the batch has no divisor that gives every cell, or every pipeline, a microbatch.
    """
    cells, least = max_workers // cell_size, _most_runs(max_workers, cell_size, stages)
    divisors = [d for d in range(1, global_size + 1) if global_size % d == 0]
    comfortable = [d for d in divisors if d >= 4 * cells]
    if comfortable:
        return comfortable[0]
    if global_size >= least:
        return global_size
    most = _most(max_workers, cell_size, stages)
    raise ConfigError(f"--batch.global-size is {global_size}, less than {most}; give at least {least}")


def check_microbatches(microbatches: int, max_workers: int, cell_size: int = 1, stages: int = 1) -> None:
    """Refuse a number of microbatches that leaves a cell, or a pipeline, of the largest world without work.

    Args:
        stages: the fewest of a pipeline; 1 without pipelines.

    Raises:
        ConfigError: there are fewer microbatches than the most cells, or pipelines.
    """
    if microbatches < _most_runs(max_workers, cell_size, stages):
        kind = "pipeline" if stages > 1 else "worker" if cell_size == 1 else "cell"
        raise ConfigError(
            f"--batch.microbatches is {microbatches}, less than {_most(max_workers, cell_size, stages)}; every {kind} "
            "needs at least one microbatch of each step"
        )


def _most_runs(max_workers: int, cell_size: int, stages: int) -> int:
    """How many cells, or pipelines, run microbatches side by side in the largest world."""
    return pipelines(max_workers // cell_size, stages)[0]


def _most(max_workers: int, cell_size: int, stages: int) -> str:
    if cell_size == 1 and stages == 1:
        return f"--scaling.max-workers {max_workers}"
    by = [("pipeline", stages), ("tensor", cell_size)]
    options = " ".join(f"--parallel.{name} {size}" for name, size in by if size > 1)
    what = "pipelines" if stages > 1 else "cells"
    count = _most_runs(max_workers, cell_size, stages)
    return f"the {count} {what} of --scaling.max-workers {max_workers} ({options})"


def deal(count: int, cells: int) -> list[range]:
    """Divide `count` microbatches into one contiguous range for each cell; their lengths differ by one at most."""
    bounds = [count * cell // cells for cell in range(cells + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def rounds(count: int, cells: int) -> int:
    """Return how many microbatches the busiest cell runs one after another."""
    return -(-count // cells)


def efficiency(count: int, cells: int) -> float:
    """Return the share of the cells' rounds that have work: 1.0 if their number divides the number of microbatches."""
    return count / (rounds(count, cells) * cells)


def batch_table(
    microbatches: int, max_workers: int, cell_size: int = 1, stages: int = 1
) -> list[tuple[int, int, float]]:
    """Return (workers, rounds, efficiency) for every world size up to the largest.

    Args:
        stages: of a pipeline; its first stage waits while the last microbatch passes the others, and the other way
            round.
    """
    if stages > 1:
        found = []
        for cells in range(1, max_workers // cell_size + 1):
            count, each = pipelines(cells, stages)
            longest = rounds(microbatches, count)
            found.append((cells * cell_size, longest, microbatches * each / (cells * (longest + each - 1))))
        return found
    sizes = range(1, max_workers // cell_size + 1)
    return [(cells * cell_size, rounds(microbatches, cells), efficiency(microbatches, cells)) for cells in sizes]


def batch_line(
    global_size: int, microbatches: int, max_workers: int, cell_size: int = 1, spares: int = 0, stages: int = 1
) -> str:
    """Return the first console line, which shows how a global batch is divided.

    Args:
        spares: workers to have in addition; told where a cell or a pipeline has several.
        stages: of a pipeline.
    """
    cells = max_workers // cell_size
    if stages > 1:
        cells, each = pipelines(cells, stages)
        idle = max_workers - cells * each * cell_size
        tensor = f" x {cell_size} tensor" if cell_size > 1 else ""
        made_of = f" = {_count(cells, 'pipeline')} x {each} stages{tensor}, {idle + spares} spare"
        return (
            f"global {global_size} = {microbatches} microbatches x {global_size // microbatches}; "
            f"{max_workers} workers{made_of} -> {rounds(microbatches, cells)} rounds"
        )
    made_of = f" = {cells} cells x {cell_size} tensor, {spares} spare" if cell_size > 1 else ""
    return (
        f"global {global_size} = {microbatches} microbatches x {global_size // microbatches}; "
        f"{max_workers} workers{made_of} -> {rounds(microbatches, cells)} rounds"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
