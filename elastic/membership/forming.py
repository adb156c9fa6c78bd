"""Which workers form the next world, how many, and when it may follow the last one: pure functions of the state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from elastic.likeness import device_difference, difference
from elastic.membership.state import Limits, Phase, State, Waiting, going
from elastic.membership.world import Member, World
from elastic.placement import pipelines


def helpful_size(microbatches: int | None, most: int, least: int = 1, cell_size: int = 1, stages: int = 1) -> int:
    """The largest useful world of at most `most` workers: one whose last cell still lowers ceil(V / cells), the rounds
    of a step. With pipelines it is one whose last pipeline does, all of as many stages as the workers fill.

    It is never smaller than `least` (nor larger than `most`): `min_workers` is a promise, since a model may need that
    many, and holds whether or not the last cell lowers the rounds.

    Args:
        cell_size: workers of a cell, which run a microbatch together.
        stages: the fewest cells of a pipeline; 1 without pipelines.
    """
    cells = most // cell_size
    if microbatches is not None and cells >= 1:
        rounds = -(-microbatches // pipelines(cells, stages)[0])
        count = -(-microbatches // rounds)
        helpful = count * (min(cells, (count + 1) * stages - 1) // count)  # one more would make a further pipeline
        cells = max(helpful, min(-(-least // cell_size), cells))
    return cells * cell_size


def in_cells(members: Collection[Member | Waiting], cell_size: int) -> int:
    """How many of some workers fill cells: `cell_size` workers of one node each."""
    if cell_size == 1:
        return len(members)
    on_node = Counter(m.node for m in members)
    return sum(count - count % cell_size for count in on_node.values())


def is_enough(limits: Limits, members: Collection[Member]) -> bool:
    """Whether these fill as many cells as a world needs: one at least."""
    return in_cells(members, limits.cell_size) >= max(1, limits.min_workers)


def full_size(limits: Limits) -> int:
    """The number of members of a world when there are enough workers."""
    return helpful_of(limits, limits.max_workers)


def helpful_of(limits: Limits, most: int) -> int:
    """`helpful_size` for these limits."""
    return helpful_size(limits.microbatches, most, limits.min_workers, limits.cell_size, limits.stages)


def world_size(limits: Limits, survivors: int, available: int) -> int:
    """The size of the next world out of `available` workers: all survivors, and as many others as lower the rounds.
    All these numbers are of workers that fill cells.

    A worker that would not lower the rounds costs a transfer of state and gains nothing: it waits as a spare.
    """
    most = min(available, limits.max_workers)
    return max(helpful_of(limits, most), min(survivors, most))


def usable(state: State) -> tuple[list[Waiting], list[tuple[Waiting, str]]]:
    """(waiting workers that fit into one world, those that do not, each with the reason).

    They are compared with a member of the last world. Before the first world they are compared with the worker that
    holds the newest state, or, if nobody holds any, with a worker of the most common kind.
    """
    everyone, exact = list(state.waiting.values()), state.limits.exact
    if not everyone:
        return [], []
    reference = _reference(state, everyone)
    reasons = [(w, unlike(w.member, reference, exact=exact)) for w in everyone]
    return [w for w, reason in reasons if not reason], [(w, reason) for w, reason in reasons if reason]


def _reference(state: State, everyone: Sequence[Waiting]) -> Member:
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
        compatible = [k for k in kinds.values() if not unlike(k[0].member, one, exact=state.limits.exact)]
        return sum(map(len, compatible)), -min(w.since for w in kind)

    return max(kinds.values(), key=rank)[0].member


def unlike(member: Member, reference: Member, *, exact: bool) -> str:
    """Why `member` does not fit into a world with `reference`; empty if it does."""
    found = device_difference(member.device, reference.device) if exact else ""
    return found or difference(member.says, reference.says, exact)


def choose(state: State, candidates: Sequence[Waiting]) -> list[Member]:
    """The members of the next world out of those that fit into one.

    Survivors come before others, then workers with the newest state. If survivors are too many, whole nodes stay: a
    node may hold one copy of a sharded state, and an empty node can be given back. Workers that are to leave, and
    workers that alone fail, are taken only if the others are too few, or to give their state. For that one of them may
    join even if the world is full, as long as every rank has a microbatch. A worker that sent nothing lately is taken
    only to give its state, since the others might wait for it in vain.

    Survivors that fill no cell, as the mates of a lost worker, stand by in the world: they hold parts of the state, and
    one that comes to their node makes a cell with them.
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
    quiet = state.quiet - old if limits.cut else state.quiet  # sharded state is incomplete without all its survivors
    ranked = sorted(candidates, key=order)
    staying = [w for w in ranked if stays(w.member)]
    answering = [w for w in ranked if w.member.id not in quiet]
    pool = staying if in_cells(staying, limits.cell_size) >= limits.min_workers else answering
    size = world_size(
        limits, in_cells([w for w in pool if w.member.id in old], limits.cell_size), in_cells(pool, limits.cell_size)
    )
    chosen = pool[:size] if limits.cell_size == 1 else _by_cells(pool, size, limits, old)
    newest = max((w.applied for w in answering), default=-1)
    if state.world is None or newest < max(_newest(state), 0):  # those that answer hold less than the world began with
        newest = max((w.applied for w in ranked), default=-1)
    if limits.cell_size > 1:
        return [w.member for w in _with_givers(chosen, [w for w in ranked if w.applied == newest >= 0], limits)]
    if chosen and newest >= 0 and all(w.applied < newest for w in chosen):
        giver = next(w for w in ranked if w.applied == newest)
        chosen = [*chosen[: max(1, limits.max_workers - 1)], giver]
        if limits.most_cells is not None and len(chosen) > limits.most_cells:
            chosen = [giver]
    return [w.member for w in chosen]


def _by_cells(pool: Sequence[Waiting], size: int, limits: Limits, old: frozenset[str]) -> list[Waiting]:
    """The first cells that workers in this order fill, `size` workers altogether, then survivors that fill none, as far
    as a world may have so many members."""
    cells: list[list[Waiting]] = []
    begun: dict[str, list[Waiting]] = {}
    for w in pool:
        here = begun.setdefault(w.member.node, [])
        here.append(w)
        if len(here) == limits.cell_size:
            cells.append(begun.pop(w.member.node))
    chosen = [w for cell in cells[: size // limits.cell_size] for w in cell]
    standing = [w for here in begun.values() for w in here if w.member.id in old]
    return chosen + standing[: limits.max_workers - size]


def _with_givers(chosen: list[Waiting], holders: Sequence[Waiting], limits: Limits) -> list[Waiting]:
    """With workers that hold the newest state, if nobody chosen does: all of them, since each holds a part. They may be
    fewer than fill cells, or take the places of others."""
    if not chosen or not holders or any(w in holders for w in chosen):
        return chosen
    room = max(limits.cell_size, limits.max_workers - in_cells(holders, limits.cell_size))
    found = [*chosen[:room], *holders]
    most = limits.most_cells
    return found if most is None or in_cells(found, limits.cell_size) <= most * limits.cell_size else list(holders)


def surplus(state: State, world: World) -> list[Member]:
    """Workers outside the running `world` that are not needed: drained ones, and those beyond the number to keep.

    Of these, workers that do not fit into the world go first, then the newest.
    """
    drained = [w.member for w in state.waiting.values() if w.member.id in state.drained]
    if state.keep is None:
        return drained
    fits = {w.member.id for w in usable(state)[0]}
    others = [w for w in state.waiting.values() if going(state, w.member) is None]
    fits -= state.faults.sick | state.quiet
    others.sort(key=lambda w: (w.member.id in fits, -w.since, w.member.id))
    staying = sum(going(state, m) is None for m in world.members)  # a member that leaves will be replaced
    too_many = max(0, staying + len(others) - state.keep)
    return drained + [w.member for w in others[:too_many]]


def may_follow(state: State, world: World, members: Iterable[Member], now: float) -> bool:
    """Two worlds never apply steps at the same time: the successor of `world` shares a member with it, or all members
    of `world` are dead, or the lease is over."""
    old = world.ids
    shares = any(m.id in old for m in members)
    return shares or old <= state.dead or now - state.broken_at >= state.limits.lease_s


def awaited(state: State) -> frozenset[str]:
    """Ids of the members of the broken or left world that have not joined again."""
    if state.world is None:
        return frozenset()
    return state.world.ids - state.waiting.keys() - state.gone


def all_back(state: State) -> bool:
    """Whether all members have joined again. Called for every join, so it is cheap while many are missing."""
    if state.world is not None and len(state.waiting) + len(state.gone) < state.world.size:
        return False
    return not awaited(state)


def can_do_without_others(state: State, now: float) -> bool:
    """Whether the members that are back can go on without those that are connected but do not answer.

    A member that has acknowledged is waited for, however long its step takes. One that holds the state the world began
    with must be among those that go on, so that nothing is lost. A sharded model needs the shards of all.
    """
    limits = state.limits
    if state.phase is not Phase.BROKEN or now - state.answered_at < limits.grace_s:
        return False
    if limits.cut or state.failing is not None or state.parting is not None or awaited(state) & state.acked:
        return False
    members = choose(state, usable(state)[0])
    return is_enough(limits, members) and _any_holds(state, members, _newest(state))


def holder_is_back(state: State) -> bool:
    """Whether a waiting worker holds the state that the world began with, so that no absent one is the last with it."""
    return any(w.applied >= _newest(state) for w in usable(state)[0])


def state_holders(state: State) -> frozenset[str]:
    """Waiting workers with state that is of use: no world waits for them, so silence is no reason to lose them."""
    return frozenset(i for i, w in state.waiting.items() if w.applied >= max(_newest(state), 0))


def has_newest(state: State, members: Iterable[Member]) -> bool:
    """Whether a member holds the state that the world began with, or no worker with it could still come."""
    return not state.late or _any_holds(state, members, _newest(state))


def _any_holds(state: State, members: Iterable[Member], applied: int) -> bool:
    return any(state.waiting[m.id].applied >= applied for m in members)


def _newest(state: State) -> int:
    """Fewest updates that the members of the world hold; the last recorded step may not be applied everywhere yet."""
    return max(state.newest, state.faults.step - 1)


def present(state: State) -> frozenset[str]:
    """Ids of the workers that are in the world or wait."""
    inside = state.world.ids if state.world is not None else frozenset()
    return (inside | state.waiting.keys()) - state.gone


def too_few_to_come(state: State) -> bool:
    """Whether the workers that are present, get ready or can still be expected are fewer than `min_workers`. A worker
    that could not get ready is replaced on a cluster, perhaps on the same node: one replacement is expected for
    each."""
    limits = state.limits
    expects = limits.expects if limits.expects is not None else 2 * (full_size(limits) + limits.spares) - 1
    return max(len(present(state) | state.warming), expects - state.never_ready) < limits.min_workers
