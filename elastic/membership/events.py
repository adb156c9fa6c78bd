"""The events that the membership's decisions take: what happens to a run's workers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.membership.failure import Failure
from elastic.membership.world import Generation, Member


@dataclass(frozen=True)
class Joined:
    """A warm worker asks for a world. `applied`: number of updates in the state it holds, -1 if it holds none. It left
    its last world because of its own `failure`, or because something of that world failed (`broke` says what), or to
    have another world formed (`why`)."""

    member: Member
    now: float
    applied: int = -1
    failure: Failure | None = None
    why: str = ""
    broke: str = ""


@dataclass(frozen=True)
class Registered:
    """After a restart of the server: a worker reports the world that it is in."""

    member: Member
    generation: Generation
    rank: int
    size: int
    now: float


@dataclass(frozen=True)
class Acknowledged:
    """A worker's watcher has received that its world is broken: the worker lives, however long its step still takes."""

    member_id: str
    now: float


@dataclass(frozen=True)
class Lost:
    """A worker is lost, or is to be treated so. `dead`: it applies no update any more, since its process or its lease
    ended. `died`: its process or connection ended by itself; nobody gave it up. `silent`: it only sent nothing; if it
    sends something before the others went on, it was not lost."""

    member_id: str
    now: float
    reason: str = "connection lost"
    dead: bool = False
    died: bool = False
    silent: bool = False


@dataclass(frozen=True)
class Done:
    """A worker reported that it is done: its leaving is no loss."""

    member_id: str


@dataclass(frozen=True)
class Arrived:
    """A worker has connected, perhaps not for the first time."""

    member_id: str


@dataclass(frozen=True)
class Recorded:
    """The ledger has a row of this step."""

    step: int


@dataclass(frozen=True)
class Unfit:
    """A worker could not get ready: the others go on without it, if they are enough."""

    member_id: str
    message: str
    now: float


@dataclass(frozen=True)
class Unable:
    """A member met an exception that it cannot train after. That ends the run, unless the worker has done no step yet
    (`fresh`): then it ends that worker only. `final`: any worker would meet the same exception."""

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
    """A worker is to hand over and end; until `deadline` the run waits for another worker to replace it."""

    member_id: str
    deadline: float
    now: float


@dataclass(frozen=True)
class Scaled:
    """The most workers of a world are another number from now on; spares are kept in addition to them."""

    max_workers: int
    now: float


@dataclass(frozen=True)
class Yielded:
    """The run keeps at most `most` workers, since other runs need them more, or with None as many as before. With 0 a
    parked run lets all its workers go, after saving the state that they hold."""

    most: int | None
    now: float


@dataclass(frozen=True)
class SavedAlone:
    """A parked worker carried out `SaveAlone`; the newest committed checkpoint is of `step`."""

    step: int
    now: float


@dataclass(frozen=True)
class Stopped:
    """The run is to be saved and to end: a running world at its next step boundary, a parked run at once."""

    message: str
    now: float


@dataclass(frozen=True)
class Expected:
    """The workers that the controller knows to exist; a restarted server waits for these."""

    member_ids: frozenset[str]
    now: float


@dataclass(frozen=True)
class Stalled:
    """No member of the world makes progress, or the others wait for one that does not answer: form another world.
    `final`: that was tried already or would not help, so the run is saved and ends for this reason."""

    reason: str
    now: float
    final: bool = False


@dataclass(frozen=True)
class Stuck:
    """The last member that holds the state never comes back from its broken world, though its process lives."""

    reason: str
    now: float


@dataclass(frozen=True)
class Quiet:
    """The waiting workers that sent nothing lately: as far as is known they live, but may be stopped or cut off."""

    member_ids: frozenset[str]
    now: float


@dataclass(frozen=True)
class Slept:
    """The server itself was suspended or behind: it has yet to read messages that arrived meanwhile."""

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
