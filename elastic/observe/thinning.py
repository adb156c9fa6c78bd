"""A long curve as few points: each stands for a range of steps."""

from __future__ import annotations

import math
from array import array

BUCKETS = 400  # the most points of a curve, as many as a picture can show


def edges(count: int) -> list[tuple[int, int]]:
    """Divide `count` points into at most BUCKETS ranges of about equal size."""
    buckets = min(count, BUCKETS)
    return [(i * count // buckets, (i + 1) * count // buckets) for i in range(buckets)]


def thinned(steps: list[int]) -> list[int]:
    """The last step of each range."""
    return [steps[end - 1] for _, end in edges(len(steps))]


def bands(curve: array[float], ranges: list[tuple[int, int]]) -> dict[str, list[float | None]]:
    """Return the mean, the least and the greatest value of each bucket; None for a bucket without a finite number."""
    mean: list[float | None] = []
    low: list[float | None] = []
    high: list[float | None] = []
    for first, end in ranges:
        values = [v for v in curve[first:end] if math.isfinite(v)]
        mean.append(math.fsum(values) / len(values) if values else None)
        low.append(min(values) if values else None)
        high.append(max(values) if values else None)
    return {"mean": mean, "low": low, "high": high}


def means(column: array[float], ranges: list[tuple[int, int]]) -> list[float]:
    """The mean of each range."""
    return [round(math.fsum(filter(math.isfinite, column[first:end])) / (end - first), 6) for first, end in ranges]
