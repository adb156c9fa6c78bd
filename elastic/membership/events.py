"""What happens to a run's membership: the input of its decisions. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.membership.failure import Failure
from elastic.membership.world import Generation, Member


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
