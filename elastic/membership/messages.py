"""What happens (events) and what is to be done about it (commands): the language of the membership decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.membership.world import Generation, Member, World

SHOWN = 16  # samples that are named, where there may be many

# ---- events -----------------------------------------------------------------------------------------------------


def named(samples: Sequence[int]) -> str:
    """Samples, for people: the first few of them."""
    shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
    return f"sample{'s' if len(samples) > 1 else ''} {shown}"


@dataclass(frozen=True)
class Failure:
    """An error that made a worker leave its world; the same kind at the same place is replayed only so often.

    Args:
        step, microbatch: from 0; -1 where the error is not of one microbatch.
        message: its first line says who, where and what, the rest how it came to that.
        fatal: it would be so again, and ends the run as soon as the state is saved.
        samples: that were worked on.
    """

    kind: str
    step: int
    microbatch: int
    message: str
    fatal: bool = False
    samples: tuple[int, ...] = ()

    @property
    def summary(self) -> str:
        """Who, where, and the exception in one line."""
        return self.message.partition("\n")[0]


@dataclass(frozen=True)
class Joined:
    """A warm worker asks for a world. `applied`: updates in the state it holds, -1 for none. It left the one before
    because of its own `failure`, or since `broke` says what of that world failed, or to have another made (`why`)."""

    member: Member
    now: float
    applied: int = -1
    failure: Failure | None = None
    why: str = ""
    broke: str = ""


@dataclass(frozen=True)
class Registered:
    """After a restart of the server: a worker that is in the midst of a world says so."""

    member: Member
    generation: Generation
    rank: int
    size: int
    now: float


@dataclass(frozen=True)
class Acknowledged:
    """A worker's watcher has seen that its world is broken: it lives, however long its step still takes."""

    member_id: str
    now: float


@dataclass(frozen=True)
class Lost:
    """A worker is gone, or is to be treated so. `dead`: it applies nothing any more, since its process ended or its
    lease did. `died`: nobody gave it up, its process or its connection ended. `silent`: nothing was heard of it; if it
    is heard again before others went on, it was not lost."""

    member_id: str
    now: float
    reason: str = "connection lost"
    dead: bool = False
    died: bool = False
    silent: bool = False


@dataclass(frozen=True)
class Done:
    """A worker said that it is done: its leaving is no loss."""

    member_id: str


@dataclass(frozen=True)
class Arrived:
    """A worker has connected, maybe again."""

    member_id: str


@dataclass(frozen=True)
class Recorded:
    """The ledger has a row of this step."""

    step: int


@dataclass(frozen=True)
class Unfit:
    """A worker could not get ready: others go on without it, if they are enough."""

    member_id: str
    message: str
    now: float


@dataclass(frozen=True)
class Unable:
    """An exception that ends a member's part: of the whole run, or of a worker that has done no step yet (`fresh`)
    only its own. `final`: it would be so for any worker."""

    member_id: str
    message: str
    fresh: bool
    final: bool
    now: float


@dataclass(frozen=True)
class Notice:
    """A node will go away at `deadline`."""

    node: str
    deadline: float
    now: float


@dataclass(frozen=True)
class Drained:
    """A worker is to hand over and end: until `deadline` it is waited for another to take its place."""

    member_id: str
    deadline: float
    now: float


@dataclass(frozen=True)
class Scaled:
    """The most workers of a world are another number from now on; beyond it `spares` are kept."""

    max_workers: int
    now: float


@dataclass(frozen=True)
class Yielded:
    """The run keeps at most `most` workers, as others need theirs more, or (None) as many as before. With 0 it lets
    all go that it has while it is parked, after saving what they hold."""

    most: int | None
    now: float


@dataclass(frozen=True)
class SavedAlone:
    """A parked worker did as it was told by `SaveAlone`; the newest committed checkpoint is of `step`."""

    step: int
    now: float


@dataclass(frozen=True)
class Stopped:
    """The run is to be saved and to end. A running world does so at its next boundary; a parked run has none."""

    message: str
    now: float


@dataclass(frozen=True)
class Expected:
    """The workers that the controller knows to exist, told to a restarted server."""

    member_ids: frozenset[str]
    now: float


@dataclass(frozen=True)
class Stalled:
    """The world stands still, all of it or for one that does not answer: another one is made. `final`: that was tried,
    or would not help; the run is saved and ends for this reason."""

    reason: str
    now: float
    final: bool = False


@dataclass(frozen=True)
class Stuck:
    """The last who holds the state never comes back from its broken world, though its process lives."""

    reason: str
    now: float


@dataclass(frozen=True)
class Quiet:
    """Of those who wait these said nothing lately: they live, as far as is known, but may be stopped or cut off."""

    member_ids: frozenset[str]
    now: float


@dataclass(frozen=True)
class Slept:
    """The server itself was away, or behind: what was said to it meanwhile it has yet to read."""

    now: float


@dataclass(frozen=True)
class Tick:
    now: float


Event = (
    Joined
    | Registered
    | Acknowledged
    | Lost
    | Done
    | Arrived
    | Recorded
    | Unfit
    | Unable
    | Notice
    | Drained
    | Scaled
    | Yielded
    | SavedAlone
    | Stopped
    | Expected
    | Stalled
    | Stuck
    | Quiet
    | Slept
    | Tick
)

# ---- commands ---------------------------------------------------------------------------------------------------


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
    """Too few workers: `waiting` of them hold the state in memory."""

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
