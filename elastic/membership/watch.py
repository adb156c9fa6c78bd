"""Who has gone silent, and who hangs: pure functions over what heartbeats said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Phases that may take long without anything being wrong: their time-out is this many times longer.
PATIENCE = {"load": 10.0, "first step": 10.0, "eval": 10.0, "checkpoint": 10.0}
LEAST_S = 10.0
STEPS = 5.0


@dataclass(frozen=True)
class Progress:
    """How far a worker is: `position` grows within a world; `since` is when it was first heard of."""

    position: tuple[int, int, int]  # step, stage of the step, microbatch
    phase: str
    since: float


def hang_limit_s(phase: str, step_p95_s: float, fixed_s: float | None) -> float:
    """Longest time at one place: max(10 s, 5 x p95 of a step), or what the user fixed; longer in slow phases."""
    return (fixed_s if fixed_s is not None else max(LEAST_S, STEPS * step_p95_s)) * PATIENCE.get(phase, 1.0)


def silent(heard: Mapping[str, float], now: float, limit_s: float) -> list[str]:
    """Workers whose watcher said nothing for `limit_s`: stopped, or cut off."""
    return [member for member, at in heard.items() if now - at > limit_s]


def hung(progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None) -> list[str]:
    """Members furthest behind, for whom the others have waited longer than the limit of their phase.

    Nobody is behind where all are at one place: then there is no one to wait for.
    """
    if not progress:
        return []
    least = min(p.position for p in progress.values())
    ahead = [p.since for p in progress.values() if p.position > least]
    if not ahead:
        return []
    waited_since = min(ahead)
    return [
        member
        for member, p in progress.items()
        if p.position == least and now - max(p.since, waited_since) > hang_limit_s(p.phase, step_p95_s, fixed_s)
    ]


def overdue(
    progress: Mapping[str, Progress], awaited: Iterable[str], since: float, now: float, step_p95_s: float,
    fixed_s: float | None,
) -> list[str]:  # fmt: skip
    """Members awaited since `since`, because their world is over, that were longer in one place than allowed."""
    start = Progress((-1, 0, 0), "load", since)
    places = {member: progress.get(member, start) for member in sorted(awaited)}
    return [
        member for member, p in places.items() if now - max(p.since, since) > hang_limit_s(p.phase, step_p95_s, fixed_s)
    ]


def p95(values: Iterable[float]) -> float:
    """The 95th percentile, 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0.0
