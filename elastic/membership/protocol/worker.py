"""What a worker says to the host of the run: for itself, and as a member of a world under its generation. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from elastic.membership.failure import Failure
from elastic.membership.protocol.fields import Natural, Row, Step
from elastic.membership.stage import Position
from elastic.membership.world import Generation, Member

# ---- for itself ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whereabouts:
    """How far a worker is in the world `generation`.

    Args:
        where: the place, for people.
        samples: that it waits for.
    """

    generation: Generation
    position: Position
    where: str = ""
    samples: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Join:
    """A warm worker asks for a world.

    Args:
        applied: updates in the state that it holds, -1 for none.
        failure: its own error that made it leave its world.
        why: it left its world to have another made, and nobody failed.
        broke: what of its world failed, if that made it leave.
        warm_s: seconds that it took to get ready, `warm_parts` what they went into.
    """

    kind: ClassVar[str] = "join"
    member: Member
    applied: int
    failure: Failure | None
    why: str
    broke: str
    warm_s: float
    warm_parts: dict[str, Any]


@dataclass(frozen=True)
class Hello:
    """A worker that is in the midst of a world has connected again, maybe to a server that was restarted."""

    kind: ClassVar[str] = "hello"
    member: Member
    rank: Natural
    size: Natural
    at: Whereabouts


@dataclass(frozen=True)
class Beat:
    """A worker lives; `sent` is its own clock, which the answer says back. `at` in a world."""

    kind: ClassVar[str] = "beat"
    sent: float
    at: Whereabouts | None = None


@dataclass(frozen=True)
class Unfit:
    """A worker cannot get ready, or could not take part."""

    kind: ClassVar[str] = "unfit"
    message: str


@dataclass(frozen=True)
class Acknowledge:
    """A worker's watcher has seen that the world is broken."""

    kind: ClassVar[str] = "ack"
    generation: Generation


@dataclass(frozen=True)
class Stacks:
    """The stacks of all threads of a worker, which were asked for."""

    kind: ClassVar[str] = "stacks"
    text: str


@dataclass(frozen=True)
class Report:
    """What the connections of a worker's world know of where all its members are; it comes after the stacks."""

    kind: ClassVar[str] = "report"
    text: str


# ---- as a member of a world, under its generation ------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows for the ledger."""

    kind: ClassVar[str] = "rows"
    rows: list[Row]


@dataclass(frozen=True)
class LedgerEvent:
    """An event for the ledger."""

    kind: ClassVar[str] = "event"
    event: str
    step: int | None = None
    seconds: float | None = None
    detail: Any = None


@dataclass(frozen=True)
class Disconnected:
    """The connections of a worker's world have failed: nobody waits for them in vain any more. Who is to blame for it
    they do not know."""

    kind: ClassVar[str] = "disconnected"
    message: str


@dataclass(frozen=True)
class Share:
    """A worker's part of a checkpoint is durable, or is not.

    Args:
        shares: that make the checkpoint whole.
        index: where its tensors lie in its pack.
        header: what only the first rank adds: the manifest's values.
        no_room: the storage is full.
        facts: what it took: seconds, bytes, requests.
    """

    kind: ClassVar[str] = "pack"
    step: Step
    attempt: str
    shares: Natural
    index: dict[str, Any] | None
    header: dict[str, Any] | None
    error: str | None
    no_room: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class Unloadable:
    """A checkpoint cannot be loaded; `damaged`: it has other bytes than were written."""

    kind: ClassVar[str] = "unloadable"
    step: Step
    attempt: str
    problem: str
    damaged: bool


@dataclass(frozen=True)
class Failed:
    """An exception ended a member's part: of the whole run, or of a worker that has done no step yet (`fresh`) only
    its own. `final`: it would be so for any worker."""

    kind: ClassVar[str] = "failed"
    message: str
    fresh: bool
    final: bool


@dataclass(frozen=True)
class SavedAlone:
    """The worker did as it was told by `SaveAlone`."""

    kind: ClassVar[str] = "saved alone"


@dataclass(frozen=True)
class Done:
    """A member is done: the run is over when all are. The lowest rank's result is the run's."""

    kind: ClassVar[str] = "done"
    rank: Natural
    status: str
    message: str
    result: dict[str, Any]


WorkerMessage = Join | Hello | Beat | Unfit | Acknowledge | Stacks | Report
MemberMessage = Rows | LedgerEvent | Disconnected | Share | Unloadable | Failed | SavedAlone | Done
