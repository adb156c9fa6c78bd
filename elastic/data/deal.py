"""Which microbatches of a step each cell runs. Pure functions; how the batch is divided never depends on the world.

A cell is what runs a microbatch: one worker, or `cell_size` workers together.
"""

from __future__ import annotations

import itertools

from elastic.errors import ConfigError
from elastic.placement import pipelines


def choose_microbatches(global_size: int, max_workers: int, cell_size: int = 1) -> int:
    """Choose the number of microbatches if the user gives none: the smallest divisor of `global_size` that is at least
    4 x the most cells, or if there is none, the largest divisor that is at least the most cells.

    Raises:
        ConfigError: the batch has no divisor that gives every cell a microbatch.
    """
    cells = max_workers // cell_size
    divisors = [d for d in range(1, global_size + 1) if global_size % d == 0]
    comfortable = [d for d in divisors if d >= 4 * cells]
    if comfortable:
        return comfortable[0]
    enough = [d for d in divisors if d >= cells]
    if enough:
        return enough[-1]
    raise ConfigError(
        f"--batch.global-size is {global_size}, less than {_most_cells(max_workers, cell_size)}; give at least {cells}"
    )


def check_microbatches(microbatches: int, max_workers: int, cell_size: int = 1) -> None:
    """Refuse a number of microbatches that leaves a cell of the largest world without work.

    Raises:
        ConfigError: there are fewer microbatches than the most cells.
    """
    if microbatches < max_workers // cell_size:
        raise ConfigError(
            f"--batch.microbatches is {microbatches}, less than {_most_cells(max_workers, cell_size)}; every "
            f"{'worker' if cell_size == 1 else 'cell'} needs at least one microbatch of each step"
        )


def _most_cells(max_workers: int, cell_size: int) -> str:
    if cell_size == 1:
        return f"--scaling.max-workers {max_workers}"
    return (
        f"the {max_workers // cell_size} cells of --scaling.max-workers {max_workers} (--parallel.tensor {cell_size})"
    )


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
