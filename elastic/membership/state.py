"""Who is in the world: a pure state machine, (state, event) -> (state, commands).

Workers come in groups: all that were started together carry the same group number. The first world is formed when
every worker of the newest group has joined, or when at least `min_workers` have and none came for `settle_s`. A
member that is lost breaks its world; the next one is formed when all others have joined again. A newer group
replaces an older one whole, whose workers are fenced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, order=True)
class Generation:
    """(epoch of the claim, number of the world in it); only grows."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}"

    @staticmethod
    def parse(text: str) -> Generation:
        epoch, _, n = text.partition("-")
        return Generation(int(epoch), int(n))


@dataclass(frozen=True)
class Member:
    """A worker that joined, warm and ready."""

    id: str
    group: int
    node: str
    local_index: int
    pid: int = 0
    host: str = ""


@dataclass(frozen=True)
class World:
    """An immutable formed membership; a member's rank is its place in `members`."""

    generation: Generation
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return len(self.members)

    def rank_of(self, member_id: str) -> int | None:
        return next((r for r, m in enumerate(self.members) if m.id == member_id), None)


@dataclass(frozen=True)
class Joined:
    """A worker of a group of `group_size` asks for a world."""

    member: Member
    group_size: int
    now: float


@dataclass(frozen=True)
class Lost:
    """A worker's connection ended before it said that it was done, or it was reported dead."""

    member_id: str
    now: float


@dataclass(frozen=True)
class Done:
    """A worker said that it is done: its leaving is no loss."""

    member_id: str


@dataclass(frozen=True)
class Tick:
    now: float


Event = Joined | Lost | Done | Tick


@dataclass(frozen=True)
class Form:
    """Tell the members of the world that it exists."""

    world: World


@dataclass(frozen=True)
class Break:
    """Tell the survivors that their world is broken, and by whose loss if that is known."""

    world: World
    lost: Member | None


@dataclass(frozen=True)
class Refuse:
    """Tell a worker that it comes too late: a newer group owns the run."""

    member_id: str
    reason: str


Command = Form | Break | Refuse


@dataclass(frozen=True)
class State:
    """Soft state: everything here can be learned again from workers that join.

    `gone` are the members of the group's worlds that were lost or are done, and never come back; a broken world's
    other members are awaited before the next one forms.
    """

    epoch: int
    min_workers: int
    settle_s: float = 2.0
    n: int = 0
    group: int = 0
    group_size: int = 0
    waiting: tuple[Member, ...] = ()
    last_join: float = 0.0
    world: World | None = None
    broken: bool = False
    gone: frozenset[str] = field(default_factory=frozenset)


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    """One decision."""
    if isinstance(event, Joined):
        return _joined(state, event)
    if isinstance(event, Done):
        return replace(state, gone=state.gone | {event.member_id}), []
    if isinstance(event, Lost):
        return _lost(state, event)
    return _form_if_possible(state, event.now)


def _joined(state: State, event: Joined) -> tuple[State, list[Command]]:
    member = event.member
    if member.group < state.group:
        return state, [Refuse(member.id, f"group {member.group} was replaced by group {state.group}")]
    if member.id in state.gone:
        return state, [Refuse(member.id, "it was lost or done, and its world went on without it")]
    if member.group > state.group:  # a new group: whatever the old one was, its workers are gone
        state = replace(state, group=member.group, waiting=(), world=None, broken=False, gone=frozenset())
    commands: list[Command] = []
    if state.world is not None and not state.broken and state.world.rank_of(member.id) is not None:
        state, commands = _break(state, None)
    others = tuple(m for m in state.waiting if m.id != member.id)
    state = replace(state, waiting=(*others, member), group_size=event.group_size, last_join=event.now)
    state, formed = _form_if_possible(state, event.now)
    return state, [*commands, *formed]


def _form_if_possible(state: State, now: float) -> tuple[State, list[Command]]:
    waiting = {m.id for m in state.waiting}
    if state.world is None:
        complete = len(waiting) >= state.group_size > 0
        settled = now - state.last_join >= state.settle_s
        ready = complete or (settled and len(waiting) >= state.min_workers)
    else:
        awaited = {m.id for m in state.world.members} - state.gone
        ready = state.broken and awaited <= waiting and len(waiting) >= state.min_workers
    if not ready or not waiting:
        return state, []
    nodes = sorted({m.node for m in state.waiting})
    members = sorted(state.waiting, key=lambda m: (nodes.index(m.node), m.local_index, m.id))
    world = World(Generation(state.epoch, state.n + 1), tuple(members))
    state = replace(state, n=state.n + 1, world=world, waiting=(), broken=False)
    return state, [Form(world)]


def _lost(state: State, event: Lost) -> tuple[State, list[Command]]:
    state = replace(state, waiting=tuple(m for m in state.waiting if m.id != event.member_id))
    world = state.world
    if world is None or event.member_id in state.gone or world.rank_of(event.member_id) is None:
        return state, []
    state = replace(state, gone=state.gone | {event.member_id})
    member = next(m for m in world.members if m.id == event.member_id)
    state, commands = _break(state, member)
    state, formed = _form_if_possible(state, event.now)
    return state, [*commands, *formed]


def _break(state: State, lost: Member | None) -> tuple[State, list[Command]]:
    assert state.world is not None
    return replace(state, broken=True), [Break(state.world, lost)]
