"""Whether the numbers of a batch and of its two halves are sums or means.

A sum over samples grows with them, a mean does not. So a mean returned as the sum shows itself, and a weight that does
not count. Losses that are neither pass, such as contrastive ones or those with a penalty for each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from elastic.parallel.records import OWN_WEIGHT, names_of

CLOSE = 1e-3  # of a sum: what counts as rounding, where its number format is not shorter
_APART = 1e-4  # of the larger half: halves nearer than that say nothing


@dataclass(frozen=True)
class Sums:
    """The numbers that a pass returned."""

    samples: int
    loss: float
    weight: float
    metrics: Mapping[str, float]
    close: float = CLOSE  # of a sum: what counts as rounding

    def near(self, other: Sums) -> bool:
        """Whether another pass over the same samples found the same."""
        mine, theirs = ([s.loss, s.weight, *s.metrics.values()] for s in (self, other))
        return len(mine) == len(theirs) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(mine, theirs))


def growth(whole: float, first: float, other: float, close: float = CLOSE) -> str:
    """Return how a number of all samples follows from those of two halves: "sum", "mean", "same", or "" if that is
    unclear."""
    if not all(map(math.isfinite, (whole, first, other))) or first * other <= 0:
        return ""
    if abs(whole - first - other) <= close * abs(first + other):
        return "sum"
    if whole == first == other:
        return "same"
    low, high = sorted((first, other))
    spread = high - low
    return "mean" if spread > _APART * max(-low, high) and low + 0.01 * spread < whole < high - 0.01 * spread else ""


def counts(found: Sequence[Sums]) -> bool:
    """Whether the weight counts something in samples, rather than being the same for any number of them."""
    return growth(*(s.weight for s in found)) != "same"


def adds_up(found: Sequence[Sums]) -> bool:
    """Whether the loss of a batch is the sum of those of its halves, as far as can be known."""
    whole, *parts = (s.loss for s in found)
    if not all(map(math.isfinite, (whole, *parts))):
        return True
    return abs(whole - sum(parts)) <= found[0].close * sum(map(abs, parts))


def is_mean(found: Sequence[Sums], of: Callable[[Sums], float]) -> bool:
    """Whether a number of all samples is that of the halves, averaged by their samples or by their weights. Else it may
    lie between them by chance, as where a model goes by what a batch begins with."""
    whole, first, other = map(of, found)
    near = 0.01 * abs(first - other) + found[0].close * max(abs(first), abs(other))
    shares = [first_count / (first_count + other_count) for first_count, other_count in _counted(found)]
    return any(abs(whole - (share * first + (1 - share) * other)) <= near for share in shares)


def _counted(found: Sequence[Sums]) -> list[tuple[float, float]]:
    _, first, other = found
    both = [(float(first.samples), float(other.samples)), (first.weight, other.weight)]
    return [(a, b) for a, b in both if a + b > 0]


def mistake(name: str, found: Sequence[Sums], *, sure: bool = False) -> str | None:
    """Describe the mistake in what a function of the job returned for a batch and its halves; None if there is none.

    Args:
        sure: only if this batch leaves no doubt.
    """
    whole, first, other = found
    weight = growth(whole.weight, first.weight, other.weight)
    loss = growth(whole.loss, first.loss, other.loss, whole.close)
    half = f"{first.samples} and {other.samples} of them"
    if weight == "sum" and loss == "mean" and (not sure or is_mean(found, lambda s: s.loss)):
        return (
            f"{name} returned a mean, {whole.loss:.6g} for {whole.samples} samples, {first.loss:.6g} and "
            f"{other.loss:.6g} for {half}, but it is to return the sum, which is divided by the weight "
            f'({whole.weight:g} here); make it with reduction="sum", or multiply it by the weight'
        )
    if weight == "same" and loss == "sum":
        return (
            f"{name} returned a sum, {whole.loss:.6g} for {whole.samples} samples, {first.loss:.6g} and "
            f"{other.loss:.6g} for {half}, with the weight {whole.weight:g} each time, which counts none of them; "
            "return the number of samples or tokens as the weight"
        )
    counted = [key for key in names_of(whole.metrics) if key + OWN_WEIGHT not in whole.metrics]
    for key in counted if weight == "sum" else ():
        values = [s.metrics[key] for s in found if key in s.metrics]
        if len(values) != len(found) or growth(*values) != "mean":
            continue
        if not sure or is_mean(found, lambda s, key=key: s.metrics[key]):  # type: ignore[misc]
            return (
                f"metric {key!r} that {name} returned is a mean, {values[0]:.6g} for {whole.samples} samples, "
                f"{values[1]:.6g} and {values[2]:.6g} for {half}, but it is to be the sum, which is divided by the "
                "weight; count instead, or multiply it by the weight"
            )
    return None
