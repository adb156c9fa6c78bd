"""The messages of the run's host to a worker. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from elastic.membership.protocol.fields import RowKey
from elastic.membership.world import Generation


@dataclass(frozen=True)
class RestorePoint:
    """Where state comes from when no worker holds any: the checkpoint of `step`, or with None a fresh start."""

    step: int | None = None
    attempt: str = ""

    @property
    def newest(self) -> int:
        """The step of the checkpoint, -1 if there is none."""
        return -1 if self.step is None else self.step


@dataclass(frozen=True)
class BeatHeard:
    """The answer to a beat that was `sent` at that time of the worker's clock: the lease counts from then.

    Args:
        next_s: after how many seconds the worker is to send the next one.
    """

    kind: ClassVar[str] = "beat"
    sent: float
    next_s: float = 1.0


@dataclass(frozen=True)
class Assignment:
    """A world as one of its members sees it.

    Args:
        store: host and port of the rendezvous store.
        restore: where state comes from when no member holds any.
        claim_step: the step at which this claim began.
        failing: the error that ends the run: the members save, and end.
        parting: a member will be left out: all save, since it holds a shard of the state, and leave the world.
        allowed: the step up to which a run that pauses after evaluations may go.
    """

    kind: ClassVar[str] = "world"
    generation: Generation
    rank: int
    size: int
    store: tuple[str, int]
    restore: RestorePoint
    claim_step: int
    failing: str | None = None
    parting: bool = False
    allowed: int = 0


@dataclass(frozen=True)
class SaveAlone:
    """Commit the state without a world, and answer with `SavedAlone`."""

    kind: ClassVar[str] = "save alone"


@dataclass(frozen=True)
class Resume:
    """The server knows that the worker is in this world: the worker may send its messages."""

    kind: ClassVar[str] = "resume"
    generation: Generation


@dataclass(frozen=True)
class Broken:
    """The world is broken: a thread that is blocked in it is to be freed."""

    kind: ClassVar[str] = "broken"
    generation: Generation


@dataclass(frozen=True)
class Wished:
    """A wish that the members agree on at the next step boundary; `detail` says why."""

    kind: ClassVar[str] = "wish"
    wish: Literal["stop", "save", "leave"]
    detail: str = ""


@dataclass(frozen=True)
class Allowed:
    """A run that pauses after its evaluations may go up to this step."""

    kind: ClassVar[str] = "allowed"
    step: int


@dataclass(frozen=True)
class Recorded:
    """The ledger has these rows."""

    kind: ClassVar[str] = "recorded"
    rows: list[RowKey]


@dataclass(frozen=True)
class Commit:
    """The outcome of an attempt to save; step -1 means all attempts. `anew`: the next checkpoint must write all
    bytes."""

    kind: ClassVar[str] = "commit"
    step: int
    attempt: str
    error: str | None = None
    anew: bool = False


@dataclass(frozen=True)
class Fenced:
    """The run belongs to another claim, or cannot be written any more: end, for this reason."""

    kind: ClassVar[str] = "fenced"
    reason: str


@dataclass(frozen=True)
class Out:
    """The run goes on without this worker, for this reason."""

    kind: ClassVar[str] = "refused"
    reason: str


@dataclass(frozen=True)
class Over:
    """The run ended, or this worker's task in it did; `status` says how."""

    kind: ClassVar[str] = "over"
    status: str


@dataclass(frozen=True)
class Dump:
    """Send the stacks of all threads."""

    kind: ClassVar[str] = "dump"


HostMessage = (
    BeatHeard
    | Assignment
    | SaveAlone
    | Resume
    | Broken
    | Wished
    | Allowed
    | Recorded
    | Commit
    | Fenced
    | Out
    | Over
    | Dump
)
