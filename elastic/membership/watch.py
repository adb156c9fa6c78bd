"""Who has gone silent, and who hangs: pure functions over what heartbeats said."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

DATA = "data"
#: Phases that may take long without anything being wrong: their time-out is this many times longer. A sample may come
#: from a cold object store, and whoever is given its microbatch instead has to fetch it as well.
PATIENCE = {"load": 10.0, "first step": 10.0, "eval": 10.0, "checkpoint": 10.0, DATA: 60.0}
LEAST_S = 10.0
STEPS = 5.0


@dataclass(frozen=True)
class Progress:
    """How far a worker is: `position` grows within a world; `since` is when it was first heard of.

    Args:
        where: the place, for people.
        samples: that it waits for.
    """

    position: tuple[int, int, int]  # step, stage of the step, microbatch
    phase: str
    since: float
    where: str = ""
    samples: tuple[int, ...] = ()


def hang_limit_s(phase: str, step_p95_s: float, fixed_s: float | None) -> float:
    """Longest time at one place: max(10 s, 5 x p95 of a step), or what the user fixed; longer in slow phases."""
    return (fixed_s if fixed_s is not None else max(LEAST_S, STEPS * step_p95_s)) * PATIENCE.get(phase, 1.0)


def silent(
    heard: Mapping[str, float], now: float, limit_s: float, world: Collection[str], lease_s: float, excused_until: float
) -> list[str]:
    """Workers whose watcher said nothing for `limit_s`: stopped, or cut off.

    Members of the `world` that are excused are given until their lease is over.
    """
    most = {m: max(limit_s, lease_s) for m in world} if now < excused_until else {}
    return [member for member, at in heard.items() if now - at > most.get(member, limit_s)]


def excuse(
    excused_until: float, heard: Mapping[str, float], now: float, limit_s: float, world: Collection[str]
) -> float:
    """Until when silence of single members of the `world` means nothing.

    Where none of them is heard, it may be the server that is cut off. They train on until their lease is over, and no
    world could follow theirs before; so nothing is lost by waiting. Later the lines come back one by one, as TCP
    repeats what was lost at intervals that grow with the silence: for as long as it lasted, some may still be missing.
    """
    quiet_s = now - max((heard[m] for m in world if m in heard), default=now)
    return now + max(limit_s, quiet_s) if quiet_s > limit_s / 2 else excused_until


def hung(
    progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None,
    waited_out: Collection[int] = (),
) -> list[str]:  # fmt: skip
    """Members furthest behind, for whom the others have waited longer than the limit of their phase.

    Nobody is behind where all are at one place: then there is no one to wait for. Nor is a second one given up for the
    same sample: it is the sample that is slow.

    Args:
        waited_out: samples for which members were given up before.
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
        if p.position == least
        and now - max(p.since, waited_since) > hang_limit_s(p.phase, step_p95_s, fixed_s)
        and not (p.phase == DATA and set(waited_out) & set(p.samples))
    ]


def slow_data(progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None) -> list[str]:
    """Members that wait for samples longer than a step may take; nothing is done about it for a while."""
    usual_s = hang_limit_s("step", step_p95_s, fixed_s)
    return [member for member, p in progress.items() if p.phase == DATA and now - p.since > usual_s]


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
