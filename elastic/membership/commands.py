"""What the membership's decisions want done: their output, which the server carries out. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.membership.failure import Failure
from elastic.membership.world import Generation, Member, World


@dataclass(frozen=True)
class Form:
    """Tell the members of the world that it exists. With `failing`, the error that ends the run, it only saves; with
    `parting` it does too, and is left then, since a member that is left out holds a part of the state."""

    world: World
    failing: str | None = None
    parting: bool = False


@dataclass(frozen=True)
class Rebuilt:
    """After a restart of the server: the world that its members were in. They may say what they have to say."""

    world: World


@dataclass(frozen=True)
class Welcome:
    """A member of a world that only lost its connection may say what it has to say; `broken`: its world is."""

    member_id: str
    generation: Generation
    broken: bool


@dataclass(frozen=True)
class Break:
    """Tell everyone in the world that it is broken, so that blocked ones are freed."""

    world: World
    lost: Member | None
    reason: str
    planned: bool = False  # a member left to have another world made; nobody failed


@dataclass(frozen=True)
class Failed:
    """A worker's error is to be told; `world`: which it left for it."""

    member: Member
    failure: Failure
    world: World | None = None


@dataclass(frozen=True)
class Leave:
    """Ask the members to leave the world together at their next step boundary and to join again."""

    world: World
    why: str


@dataclass(frozen=True)
class LeftBehind:
    """The others go on without a member of theirs that is connected but has not answered; it may join when it does."""

    member: Member


@dataclass(frozen=True)
class Dropped:
    """A worker outside of any world is gone for good: to be recorded, so that a restarted server knows it too."""

    member: Member
    reason: str


@dataclass(frozen=True)
class Refuse:
    """Tell a worker that it has no part in the run any more."""

    member_id: str
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A worker waits outside because its device, data, options, model or optimizer differs, or since only it fails."""

    member: Member
    reason: str


@dataclass(frozen=True)
class HandOver:
    """A worker that is to go, or one too many, is in no world; it can end."""

    member: Member


@dataclass(frozen=True)
class SaveNow:
    """A node goes away and its workers cannot be spared: make the state durable at the next boundary."""

    world: World


@dataclass(frozen=True)
class Park:
    """Too few workers for a world: `have` of the `need` that it takes at least."""

    have: int
    need: int


@dataclass(frozen=True)
class SaveAlone:
    """The parked run is to let its workers go: `saver`, who holds the newest state, commits it first."""

    saver: Member


@dataclass(frozen=True)
class GiveUp:
    """Parked for too long, or stopped while parked: `saver` (if anyone holds state) commits it, then the run ends with
    `status`."""

    saver: Member | None
    message: str
    status: str = "failed"


@dataclass(frozen=True)
class Fail:
    """The same error came too often, and there is nothing to save, or saving met it too."""

    message: str


Command = (
    Form
    | Rebuilt
    | Welcome
    | Break
    | Failed
    | Leave
    | LeftBehind
    | Dropped
    | Refuse
    | LeftOut
    | HandOver
    | SaveNow
    | Park
    | SaveAlone
    | GiveUp
    | Fail
)
