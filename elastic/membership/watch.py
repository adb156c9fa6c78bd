"""Finds workers that are silent or hang: pure functions of the heartbeats."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from elastic.membership.stage import UNHEARD, Position, Stage

BEFORE_FENCE = frozenset({Stage.UNHEARD, Stage.CONNECT, Stage.LOAD, Stage.DATA})
LEAST_S = 10.0
STEPS = 5.0
#: Times the hang time-out: after STALLED a world in which no member moves is replaced, and a worker that is the last
#: with the state is given up; after QUIET so is a worker that lives but is silent, or for which no other waits.
STALLED, QUIET = 3.0, 10.0


@dataclass(frozen=True)
class Progress:
    """How far a worker is, and since when (monotonic seconds).

    Args:
        where: the place in words.
        samples: ids of the samples that it waits for.
        doubted: it may have left that place since: its patience is that of an ordinary place.
    """

    position: Position
    since: float
    where: str = ""
    samples: tuple[int, ...] = ()
    doubted: bool = False

    @property
    def step(self) -> int:
        return self.position.step

    @property
    def patience(self) -> float:
        """Times the hang time-out that it may stay there."""
        return 1.0 if self.doubted else self.position.patience

    @property
    def waits_for_data(self) -> bool:
        return self.position.stage is Stage.DATA and not self.doubted

    @property
    def counts(self) -> bool:
        """Whether standing still there is more than slowness."""
        return self.doubted or self.position.stage.counts

    @property
    def label(self) -> str:
        """The name of the place, shown to people."""
        return Stage.PASS.label if self.doubted else self.position.label


def hang_limit_s(patience: float, step_p95_s: float, fixed_s: float | None) -> float:
    """Longest time at one place in seconds: max(10, 5 x p95 of a step) or the fixed value, times the patience."""
    return (fixed_s if fixed_s is not None else max(LEAST_S, STEPS * step_p95_s)) * patience


def silent(
    last_seen: Mapping[str, float],
    now: float,
    limit_s: float,
    world: Collection[str],
    lease_s: float,
    excused_until: float,
    ready: Collection[str],
) -> list[str]:
    """Workers that are cut off: neither the watcher nor the machine sent anything for `limit_s`.

    Members of the `world` that are excused get until the end of their lease, and so do workers that are not `ready`
    yet, since nobody waits for those.
    """
    longer = set(world) if now < excused_until else set()
    most = dict.fromkeys(longer | last_seen.keys() - set(ready), max(limit_s, lease_s))
    return [member for member, at in last_seen.items() if now - at > most.get(member, limit_s)]


def excuse(
    excused_until: float, last_seen: Mapping[str, float], now: float, limit_s: float, world: Collection[str]
) -> float:
    """Until when silence of single members of the `world` means nothing.

    If all of them are silent, it may be the server that is cut off. They train on until their lease is over, and no
    world could follow theirs before that; so waiting loses nothing. Then the connections come back one by one, since
    TCP resends lost packets at intervals that grow with the silence: for as long again some may still be missing.
    """
    quiet_s = now - max((last_seen[m] for m in world if m in last_seen), default=now)
    return now + max(limit_s, quiet_s) if quiet_s > limit_s / 2 else excused_until


def caught_up(progress: Mapping[str, Progress]) -> dict[str, Progress]:
    """The least progress of each member. If one is in a step, all have done their part of the step before: an earlier
    place that a member reported, and that may take long, is over."""
    furthest = max((p.step for p in progress.values()), default=-1)

    def is_over(p: Progress) -> bool:
        before_fence = p.position.first or p.position.stage in BEFORE_FENCE
        return p.step < (furthest if before_fence else furthest - 1)

    return {i: replace(p, doubted=True) if is_over(p) else p for i, p in progress.items()}


def hung(
    progress: Mapping[str, Progress],
    now: float,
    step_p95_s: float,
    fixed_s: float | None,
    waited_out: Collection[int] = (),
    steps_out: Collection[int] = (),
) -> list[str]:
    """The members furthest behind, if the others have waited for them longer than the limit of their stage.

    If all are at one place, no member is behind. No second member is given up for the same sample, or in the same step:
    then the sample or the job is slow, not the member.

    Args:
        waited_out, steps_out: samples for which, and steps (from 0) in which, members were given up before.
    """
    if not progress:
        return []
    least = min(p.position.key for p in progress.values())
    ahead = [p.since for p in progress.values() if p.position.key > least]
    if not ahead:
        return []
    waited_since = min(ahead)
    return [
        member
        for member, p in progress.items()
        if p.position.key == least
        and now - max(p.since, waited_since) > hang_limit_s(p.patience, step_p95_s, fixed_s)
        and not (set(waited_out) & set(p.samples) if p.waits_for_data else p.step in steps_out)
    ]


def stalled_times(progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None) -> float:
    """How many times the hang time-out no member has moved. It exceeds 1 only where all report everything they do."""
    if not progress or any(p.position.stage is Stage.HELD for p in progress.values()):
        return 0.0
    limit_s = max(hang_limit_s(p.patience, step_p95_s, fixed_s) for p in progress.values())
    times = (now - max(p.since for p in progress.values())) / limit_s
    return times if all(p.counts for p in progress.values()) else min(times, 1.0)


def slow(
    progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None, stage: Stage
) -> list[str]:
    """Members that are in a stage with more patience, such as data, for longer than a step may take. They are reported
    only."""
    usual_s = hang_limit_s(Stage.PASS.patience, step_p95_s, fixed_s)
    here = {member: p for member, p in progress.items() if p.position.stage is stage and not p.doubted}
    return [member for member, p in here.items() if now - p.since > usual_s]


def overdue(
    progress: Mapping[str, Progress],
    awaited: Mapping[str, float],
    since: float,
    now: float,
    step_p95_s: float,
    fixed_s: float | None,
) -> list[str]:
    """Members of a world that is over, awaited since `since`, that stayed at one place longer than allowed.

    Args:
        awaited: for each member, by how many times its limit is longer.
    """
    start = Progress(UNHEARD, since)
    places = {member: progress.get(member, start) for member in sorted(awaited)}
    return [
        member
        for member, p in places.items()
        if now - max(p.since, since) > awaited[member] * hang_limit_s(p.patience, step_p95_s, fixed_s)
    ]


def p95(values: Iterable[float]) -> float:
    """The 95th percentile; 0 if there are no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0.0
