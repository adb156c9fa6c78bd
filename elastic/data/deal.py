"""Which microbatches of a step each rank runs. Pure functions; how the batch is divided never depends on the world."""

from __future__ import annotations

import itertools

from elastic.errors import ConfigError


def choose_microbatches(global_size: int, max_workers: int) -> int:
    """Choose the number of microbatches if the user gives none: the smallest divisor of `global_size` that is at least
    4 x max workers, or if there is none, the largest divisor that is at least max workers.

    Raises:
        ConfigError: the batch has no divisor that gives every worker a microbatch.
    """
    divisors = [d for d in range(1, global_size + 1) if global_size % d == 0]
    comfortable = [d for d in divisors if d >= 4 * max_workers]
    if comfortable:
        return comfortable[0]
    enough = [d for d in divisors if d >= max_workers]
    if enough:
        return enough[-1]
    raise ConfigError(
        f"--batch.global-size is {global_size}, less than --scaling.max-workers {max_workers}; "
        f"give at least {max_workers}"
    )


def check_microbatches(microbatches: int, max_workers: int) -> None:
    """Refuse a number of microbatches that leaves a worker of the largest world without work.

    Raises:
        ConfigError: there are fewer microbatches than max workers.
    """
    if microbatches < max_workers:
        raise ConfigError(
            f"--batch.microbatches is {microbatches}, less than --scaling.max-workers {max_workers}; "
            "every worker needs at least one microbatch of each step"
        )


def deal(count: int, world_size: int) -> list[range]:
    """Divide `count` microbatches into one contiguous range for each rank; their lengths differ by one at most."""
    bounds = [count * rank // world_size for rank in range(world_size + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def rounds(count: int, world_size: int) -> int:
    """Return how many microbatches the busiest rank runs one after another."""
    return -(-count // world_size)


def efficiency(count: int, world_size: int) -> float:
    """Return the share of the ranks' rounds that have work: 1.0 if the world size divides the number of
    microbatches."""
    return count / (rounds(count, world_size) * world_size)


def batch_table(microbatches: int, max_workers: int) -> list[tuple[int, int, float]]:
    """Return (workers, rounds, efficiency) for every world size up to the largest."""
    return [(w, rounds(microbatches, w), efficiency(microbatches, w)) for w in range(1, max_workers + 1)]


def batch_line(global_size: int, microbatches: int, max_workers: int) -> str:
    """Return the first console line, which shows how a global batch is divided."""
    return (
        f"global {global_size} = {microbatches} microbatches x {global_size // microbatches}; "
        f"{max_workers} workers -> {rounds(microbatches, max_workers)} rounds"
    )
