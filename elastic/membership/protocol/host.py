"""What the host of the run says to a worker. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from elastic.membership.protocol.fields import RowKey
from elastic.membership.world import Generation


@dataclass(frozen=True)
class RestorePoint:
    """Where state comes from when nobody holds any: the checkpoint of `step`; None is a fresh start."""

    step: int | None = None
    attempt: str = ""

    @property
    def newest(self) -> int:
        """The step of the checkpoint; -1 where there is none."""
        return -1 if self.step is None else self.step


@dataclass(frozen=True)
class BeatHeard:
    """The answer to a beat: the lease counts from when that was `sent`."""

    kind: ClassVar[str] = "beat"
    sent: float


@dataclass(frozen=True)
class Assignment:
    """A world as one of its members sees it.

    Args:
        store: host and port of the rendezvous store.
        restore: where state comes from when nobody holds any.
        claim_step: where this claim began.
        failing: the error that ends the run: the members save, and end.
        parting: a member will be left out: all save, since it holds a part of the state, and leave.
        allowed: up to which step a run that holds after evaluations may go.
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
    """Commit the state without a world, and say so."""

    kind: ClassVar[str] = "save alone"


@dataclass(frozen=True)
class Resume:
    """The server knows that the worker is in this world: it may say what it has to say."""

    kind: ClassVar[str] = "resume"
    generation: Generation


@dataclass(frozen=True)
class Broken:
    """The world is broken: whoever is blocked in it is to be freed."""

    kind: ClassVar[str] = "broken"
    generation: Generation


@dataclass(frozen=True)
class Wished:
    """To be agreed on at the next step boundary; `detail` says why."""

    kind: ClassVar[str] = "wish"
    wish: Literal["stop", "save", "leave"]
    detail: str = ""


@dataclass(frozen=True)
class Allowed:
    """A run that holds after its evaluations may go up to this step."""

    kind: ClassVar[str] = "allowed"
    step: int


@dataclass(frozen=True)
class Recorded:
    """The ledger has these rows."""

    kind: ClassVar[str] = "recorded"
    rows: list[RowKey]


@dataclass(frozen=True)
class Commit:
    """What became of a checkpoint; step -1 is all that there were. `anew`: the next one is to refer to nothing."""

    kind: ClassVar[str] = "commit"
    step: int
    attempt: str
    error: str | None = None
    anew: bool = False


@dataclass(frozen=True)
class Fenced:
    """The run is another claim's, or cannot be written any more: end, for this reason."""

    kind: ClassVar[str] = "fenced"
    reason: str


@dataclass(frozen=True)
class Out:
    """The run goes on without this worker, for this reason."""

    kind: ClassVar[str] = "refused"
    reason: str


@dataclass(frozen=True)
class Over:
    """The run ended, or this worker's part in it; `status` says how."""

    kind: ClassVar[str] = "over"
    status: str


@dataclass(frozen=True)
class Dump:
    """Say the stacks of all threads."""

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
