"""The messages of a worker to the run's host: for itself, and as a member of a world under its generation. Pure."""

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
        where: the place in words.
        samples: ids of the samples that it waits for.
    """

    generation: Generation
    position: Position
    where: str = ""
    samples: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Join:
    """A warm worker asks for a world.

    Args:
        applied: number of updates in the state that it holds, -1 if it holds none.
        failure: its own error, if that made it leave its world.
        why: reason to have another world formed, if nobody failed.
        broke: what failed in its world, if that made it leave.
        warm_s: seconds that getting ready took; `warm_parts`: how they divide, by name.
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
    """A worker that is in a world has connected again, perhaps to a server that was restarted."""

    kind: ClassVar[str] = "hello"
    member: Member
    rank: Natural
    size: Natural
    at: Whereabouts


@dataclass(frozen=True)
class Beat:
    """A worker lives.

    Args:
        sent: time of its own clock, which the answer repeats.
        at: where it is, if in a world.
        memory_bytes: resident memory of its process.
        device_memory: the largest share of its device's memory that tensors took; None on CPU.
    """

    kind: ClassVar[str] = "beat"
    sent: float
    at: Whereabouts | None = None
    memory_bytes: Natural | None = None
    device_memory: float | None = None


@dataclass(frozen=True)
class Unfit:
    """A worker could not get ready, or could not take part."""

    kind: ClassVar[str] = "unfit"
    message: str


@dataclass(frozen=True)
class Acknowledge:
    """A worker's watcher has received that the world is broken."""

    kind: ClassVar[str] = "ack"
    generation: Generation


@dataclass(frozen=True)
class Stacks:
    """The stacks of all threads of a worker, as `Dump` asked."""

    kind: ClassVar[str] = "stacks"
    text: str


@dataclass(frozen=True)
class Report:
    """What the connections of a worker's world know about where its members are; sent after the stacks."""

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
    """The connections of a worker's world have failed, which freed all that waited on them. They do not know which
    member caused it."""

    kind: ClassVar[str] = "disconnected"
    message: str


@dataclass(frozen=True)
class Share:
    """A worker's share of a checkpoint is durable, or could not be made so (`error`).

    Args:
        shares: number of shares that make the checkpoint complete.
        index: where its tensors lie in its pack.
        header: from the first rank only: the manifest's values.
        no_room: the storage is full.
        facts: the seconds, bytes and requests that it took.
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
    """A checkpoint cannot be loaded; `damaged`: its bytes differ from those that were written."""

    kind: ClassVar[str] = "unloadable"
    step: Step
    attempt: str
    problem: str
    damaged: bool


@dataclass(frozen=True)
class Failed:
    """A member met an exception that it cannot train after. That ends the run, unless the worker has done no step yet
    (`fresh`): then it ends that worker only. `final`: any worker would meet the same exception."""

    kind: ClassVar[str] = "failed"
    message: str
    fresh: bool
    final: bool


@dataclass(frozen=True)
class SavedAlone:
    """The worker carried out `SaveAlone`."""

    kind: ClassVar[str] = "saved alone"


@dataclass(frozen=True)
class Done:
    """A member is done; the run is over when all are. The run's result is that of the lowest rank."""

    kind: ClassVar[str] = "done"
    rank: Natural
    status: str
    message: str
    result: dict[str, Any]


WorkerMessage = Join | Hello | Beat | Unfit | Acknowledge | Stacks | Report
MemberMessage = Rows | LedgerEvent | Disconnected | Share | Unloadable | Failed | SavedAlone | Done
