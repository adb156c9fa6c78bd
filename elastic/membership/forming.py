"""Who is in the next world, how large it is, and when it may follow: pure functions of the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from elastic.likeness import device_difference, difference
from elastic.membership.state import Limits, Phase, State, Waiting, going
from elastic.membership.world import Member, World


def helpful_size(microbatches: int | None, most: int, least: int = 1) -> int:
    """The largest world of at most `most` workers whose last worker still lowers ceil(V / W), a step's rounds.

    Where that is fewer than `least`, it is `least`, as far as there may be so many: the fewest that a run trains with
    are a promise (they may be what its model needs), and hold whether or not the last one of them helps.
    """
    if microbatches is None or most < 1:
        return most
    rounds = -(-microbatches // most)
    return max(-(-microbatches // rounds), min(least, most))


def full_size(limits: Limits) -> int:
    """How many members a world has where there is no lack of workers."""
    return helpful_size(limits.microbatches, limits.max_workers, limits.min_workers)


def world_size(limits: Limits, survivors: int, available: int) -> int:
    """How many of the `available` workers go into the next world: survivors, and of others only as many as help.

    A worker that would not lower the rounds costs a transfer of state and brings nothing: it waits, as a spare.
    """
    most = min(available, limits.max_workers)
    return max(helpful_size(limits.microbatches, most, limits.min_workers), min(survivors, most))


def usable(state: State) -> tuple[list[Waiting], list[tuple[Waiting, str]]]:
    """(waiting workers that fit into one world, those that do not, each with the reason).

    The measure is the world before. The first world goes by what most are like, unless somebody already holds state.
    """
    everyone, exact = list(state.waiting.values()), state.limits.exact
    if not everyone:
        return [], []
    measure = _measure(state, everyone)
    said = [(w, unlike(w.member, measure, exact=exact)) for w in everyone]
    return [w for w, reason in said if not reason], [(w, reason) for w, reason in said if reason]


def _measure(state: State, everyone: Sequence[Waiting]) -> Member:
    if state.world is not None:
        return state.world.members[0]
    newest = max(everyone, key=lambda w: w.applied)
    if newest.applied >= 0:
        return newest.member
    kinds: dict[tuple[str, str], list[Waiting]] = {}
    for w in everyone:
        kinds.setdefault((w.member.device, w.member.says), []).append(w)

    def rank(kind: list[Waiting]) -> tuple[int, float]:
        one = kind[0].member
        alike = [k for k in kinds.values() if not unlike(k[0].member, one, exact=state.limits.exact)]
        return sum(map(len, alike)), -min(w.since for w in kind)

    return max(kinds.values(), key=rank)[0].member


def unlike(member: Member, measure: Member, *, exact: bool) -> str:
    """Why a worker does not fit into a world of this other one; empty if it does."""
    found = device_difference(member.device, measure.device) if exact else ""
    return found or difference(member.says, measure.says, exact)


def choose(state: State, candidates: Sequence[Waiting]) -> list[Member]:
    """The members of the next world out of those that fit into one.

    Survivors come before others, then those with the newest state; of survivors that are too many, whole nodes stay, as
    a node may hold one copy of a sharded state, and an empty one can be given back. Workers that are to go, or that
    fail where others do not, are taken only where the others are too few, or to give their state: one of them may come
    along for that, even if there is no room for it, as long as every rank has a microbatch. Who said nothing lately is
    taken only for that, since the others might wait in vain.
    """
    limits = state.limits
    old = state.world.ids if state.world else frozenset()
    nodes = Counter(w.member.node for w in candidates if w.member.id in old and going(state, w.member) is None)

    def order(w: Waiting) -> tuple[Any, ...]:
        survives = w.member.id in old
        place = (-nodes[w.member.node], w.member.node, w.member.local_index) if survives else (w.since,)
        return not stays(w.member), w.member.id in quiet, not survives, -w.applied, *place, w.member.id

    def stays(member: Member) -> bool:
        return going(state, member) is None and member.id not in sick and member.id not in quiet

    sick = state.faults.sick
    quiet = state.quiet - old if limits.cut else state.quiet  # without its survivors' parts a cut model is not whole
    ranked = sorted(candidates, key=order)
    staying = [w for w in ranked if stays(w.member)]
    answering = [w for w in ranked if w.member.id not in quiet]
    pool = staying if len(staying) >= limits.min_workers else answering
    size = world_size(limits, sum(w.member.id in old for w in pool), len(pool))
    chosen = pool[:size]
    newest = max((w.applied for w in answering), default=-1)
    if state.world is None or newest < max(_newest(state), 0):  # who answers has what came after that in hand
        newest = max((w.applied for w in ranked), default=-1)
    if chosen and newest >= 0 and all(w.applied < newest for w in chosen):
        giver = next(w for w in ranked if w.applied == newest)
        chosen = [*chosen[: max(1, limits.max_workers - 1)], giver]
        if limits.microbatches is not None and len(chosen) > limits.microbatches:
            chosen = [giver]
    return [w.member for w in chosen]


def surplus(state: State, world: World) -> list[Member]:
    """Workers outside the running `world` that are not needed: drained ones, and those beyond what is to be kept.

    Of these, such as do not fit into the world go first, then the newest.
    """
    drained = [w.member for w in state.waiting.values() if w.member.id in state.drained]
    if state.keep is None:
        return drained
    fits = {w.member.id for w in usable(state)[0]}
    others = [w for w in state.waiting.values() if going(state, w.member) is None]
    fits -= state.faults.sick | state.quiet
    others.sort(key=lambda w: (w.member.id in fits, -w.since, w.member.id))
    staying = sum(going(state, m) is None for m in world.members)  # for the others, somebody is to come
    too_many = max(0, staying + len(others) - state.keep)
    return drained + [w.member for w in others[:too_many]]


def may_follow(state: State, world: World, members: Iterable[Member], now: float) -> bool:
    """Two worlds never apply steps at one time: a successor of `world` shares a member, or waits out the lease."""
    old = world.ids
    shares = any(m.id in old for m in members)
    return shares or old <= state.dead or now - state.broken_at >= state.limits.lease_s


def awaited(state: State) -> frozenset[str]:
    """Members of the broken or left world that have not joined again, by id."""
    if state.world is None:
        return frozenset()
    return state.world.ids - state.waiting.keys() - state.gone


def all_back(state: State) -> bool:
    """Whether nobody is awaited any more. Costs nothing while many are: it is asked once for each who joins."""
    if state.world is not None and len(state.waiting) + len(state.gone) < state.world.size:
        return False
    return not awaited(state)


def can_do_without_others(state: State, now: float) -> bool:
    """Whether those who are back go on without members of theirs that are connected but do not answer.

    Who has answered is awaited, however long its step takes. One that holds what the world began with must be among
    those that go on, so that nothing is lost; a model that is cut needs the parts of all.
    """
    limits = state.limits
    if state.phase is not Phase.BROKEN or now - state.answered_at < limits.grace_s:
        return False
    if limits.cut or state.failing is not None or state.parting is not None or awaited(state) & state.acked:
        return False
    members = choose(state, usable(state)[0])
    return len(members) >= limits.min_workers and _any_holds(state, members, _newest(state))


def holder_is_back(state: State) -> bool:
    """Whether somebody who waits holds what the world began with, so that no other is the last who does."""
    return any(w.applied >= _newest(state) for w in usable(state)[0])


def keepers(state: State) -> frozenset[str]:
    """Workers with state that is of use, and in no world that waits for them: these are not lost for being silent."""
    return frozenset(i for i, w in state.waiting.items() if w.applied >= max(_newest(state), 0))


def has_newest(state: State, members: Iterable[Member]) -> bool:
    """Whether one of them holds what the world began with, or nobody who does is left that might still come."""
    return not state.late or _any_holds(state, members, _newest(state))


def _any_holds(state: State, members: Iterable[Member], applied: int) -> bool:
    return any(state.waiting[m.id].applied >= applied for m in members)


def _newest(state: State) -> int:
    """Updates that those who were in the world hold at least; one that is recorded may be in hand still."""
    return max(state.newest, state.faults.step - 1)


def there(state: State) -> frozenset[str]:
    """Workers that are in the world or wait, by id."""
    inside = state.world.ids if state.world is not None else frozenset()
    return (inside | state.waiting.keys()) - state.gone


def too_few_to_come(state: State) -> bool:
    """Whether fewer than a run trains with are there or get ready, and no more are to be hoped for. Those that cannot
    get ready are replaced on a cluster, maybe on the same nodes: once is enough."""
    limits = state.limits
    expects = limits.expects if limits.expects is not None else 2 * (full_size(limits) + limits.spares) - 1
    return max(len(there(state) | state.warming), expects - state.never_ready) < limits.min_workers
