"""Who has gone silent, and who hangs: pure functions over what heartbeats said."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from elastic.membership.stage import UNHEARD, Position, Stage

BEFORE_FENCE = frozenset({Stage.UNHEARD, Stage.CONNECT, Stage.LOAD, Stage.DATA})
LEAST_S = 10.0
STEPS = 5.0
#: Times the hang time-out: a world in which nobody moves is made anew, and who would be the last with the state is
#: given up; who lives but says nothing, or whom nobody waits for, is.
STILL, QUIET = 3.0, 10.0


@dataclass(frozen=True)
class Progress:
    """How far a worker is, and since when (monotonic seconds).

    Args:
        where: the place, for people.
        samples: that it waits for.
        doubted: it may have left that place since: it is given no longer there than for a usual one.
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
        """Times longer than the hang time-out that it may take there."""
        return 1.0 if self.doubted else self.position.patience

    @property
    def waits_for_data(self) -> bool:
        return self.position.stage is Stage.DATA and not self.doubted

    @property
    def counts(self) -> bool:
        """Whether standing still there is not slowness alone."""
        return self.doubted or self.position.stage.counts

    @property
    def label(self) -> str:
        """For people."""
        return Stage.PASS.label if self.doubted else self.position.label


def hang_limit_s(patience: float, step_p95_s: float, fixed_s: float | None) -> float:
    """Longest time at one place: max(10 s, 5 x p95 of a step), or what the user fixed; longer where patience is due."""
    return (fixed_s if fixed_s is not None else max(LEAST_S, STEPS * step_p95_s)) * patience


def silent(
    heard: Mapping[str, float],
    now: float,
    limit_s: float,
    world: Collection[str],
    lease_s: float,
    excused_until: float,
    ready: Collection[str],
) -> list[str]:
    """Workers of which neither the watcher nor the machine said anything for `limit_s`: cut off.

    Members of the `world` that are excused are given until their lease is over; so is who is not `ready` yet, for whom
    nobody waits.
    """
    longer = set(world) if now < excused_until else set()
    most = dict.fromkeys(longer | heard.keys() - set(ready), max(limit_s, lease_s))
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


def caught_up(progress: Mapping[str, Progress]) -> dict[str, Progress]:
    """Where members are at least. Where one is in a step, all have passed the fence of the one before: what somebody
    said of an earlier place, which may take long, is over."""
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
    """Members furthest behind, for whom the others have waited longer than the limit of their phase.

    Nobody is behind where all are at one place: then there is no one to wait for. Nor is a second one given up for the
    same sample, or in the same step: it is the sample, or the job, that is slow.

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


def still(progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None) -> float:
    """For how many times the hang time-out nobody has moved. Beyond 1 it counts where all tell what they do."""
    if not progress or any(p.position.stage is Stage.HELD for p in progress.values()):
        return 0.0
    limit_s = max(hang_limit_s(p.patience, step_p95_s, fixed_s) for p in progress.values())
    times = (now - max(p.since for p in progress.values())) / limit_s
    return times if all(p.counts for p in progress.values()) else min(times, 1.0)


def slow_data(progress: Mapping[str, Progress], now: float, step_p95_s: float, fixed_s: float | None) -> list[str]:
    """Members that wait for samples longer than a step may take; nothing is done about it for a while."""
    usual_s = hang_limit_s(Stage.PASS.patience, step_p95_s, fixed_s)
    return [member for member, p in progress.items() if p.waits_for_data and now - p.since > usual_s]


def overdue(
    progress: Mapping[str, Progress],
    awaited: Mapping[str, float],
    since: float,
    now: float,
    step_p95_s: float,
    fixed_s: float | None,
) -> list[str]:
    """Members awaited since `since`, because their world is over, that were longer in one place than allowed.

    Args:
        awaited: members, with the times that the limit is longer for them.
    """
    start = Progress(UNHEARD, since)
    places = {member: progress.get(member, start) for member in sorted(awaited)}
    return [
        member
        for member, p in places.items()
        if now - max(p.since, since) > awaited[member] * hang_limit_s(p.patience, step_p95_s, fixed_s)
    ]


def p95(values: Iterable[float]) -> float:
    """The 95th percentile, 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0.0
