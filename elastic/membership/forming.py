"""Who is in the next world, and when it may follow: pure functions of the state."""

from __future__ import annotations

from collections.abc import Iterable

from elastic.membership.state import Phase, State, Waiting
from elastic.membership.world import Member


def usable(state: State) -> tuple[list[Waiting], list[Waiting]]:
    """(waiting workers that fit into one world, those whose device differs)."""
    everyone = list(state.waiting.values())
    if not state.limits.exact or not everyone:
        return everyone, []
    if state.phase is Phase.RUNNING and state.world is not None:
        device = state.world.members[0].device
    else:
        device = max(everyone, key=lambda w: (w.applied, -w.since)).member.device
    return [w for w in everyone if w.member.device == device], [w for w in everyone if w.member.device != device]


def choose(state: State, usable: list[Waiting]) -> list[Member]:
    """The members of the next world: those with the newest state first; those on nodes that go away only if needed."""
    newest = max((w.applied for w in usable), default=-1)
    ranked = sorted(
        usable, key=lambda w: (w.member.node in state.notices, -w.applied, w.since, w.member.id)
    )  # fmt: skip
    staying = [w for w in ranked if w.member.node not in state.notices]
    enough = len(staying) >= state.limits.min_workers
    if enough and (newest < 0 or any(w.applied == newest for w in staying)):
        return [w.member for w in staying[: state.limits.max_workers]]
    if enough:  # only workers that go away hold the state: one comes along to give it
        giver = next(w for w in ranked if w.applied == newest)
        return [*(w.member for w in staying[: max(1, state.limits.max_workers - 1)]), giver.member]
    return [w.member for w in ranked[: state.limits.max_workers]]


def may_follow(state: State, members: Iterable[Member], now: float) -> bool:
    """Two worlds never apply steps at one time: a successor shares a member, or waits out the lease."""
    assert state.world is not None
    old = {m.id for m in state.world.members}
    shares = any(m.id in old for m in members)
    return shares or old <= state.dead or now - state.broken_at >= state.limits.lease_s


def awaited(state: State) -> list[Member]:
    """Members of the broken or left world that have not joined again."""
    if state.world is None:
        return []
    return [m for m in state.world.members if m.id not in state.gone and m.id not in state.waiting]
