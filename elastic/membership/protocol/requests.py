"""What drivers, controllers and control commands ask of the host: each is POSTed as JSON to its path. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from elastic.membership.protocol.fields import (
    Attempt,
    Checkpoints,
    Detail,
    GrantId,
    Metric,
    Node,
    Seconds,
    Step,
    Steps,
    WorkerId,
    Workers,
)


@dataclass(frozen=True)
class Wish:
    """Stop or save, at the next step boundary."""

    path: ClassVar[str] = "/wish"
    wish: Literal["stop", "save"]
    detail: str = ""


@dataclass(frozen=True)
class Allow:
    """A run that holds after its evaluations may go up to this step."""

    path: ClassVar[str] = "/allow"
    step: Step


@dataclass(frozen=True)
class Close:
    """The driver knows that no worker will go on."""

    path: ClassVar[str] = "/close"
    status: Literal["stopped", "failed"]
    message: str = ""


@dataclass(frozen=True)
class Damaged:
    """A checkpoint was found damaged."""

    path: ClassVar[str] = "/damaged"
    step: Step
    attempt: Attempt
    problem: str


@dataclass(frozen=True)
class Gone:
    """Workers that are gone; whether their processes are known to have ended, and how."""

    path: ClassVar[str] = "/lost"
    ids: list[str]
    ended: bool
    detail: str | None = None


@dataclass(frozen=True)
class Note:
    """An event, for the ledger."""

    path: ClassVar[str] = "/event"
    kind: str
    detail: Detail


@dataclass(frozen=True)
class Leaving:
    """A node goes away."""

    path: ClassVar[str] = "/notice"
    node: Node
    remaining_s: Seconds


@dataclass(frozen=True)
class Yield:
    """Keep no more workers than these, as other runs of the cluster need theirs; None gives them back."""

    path: ClassVar[str] = "/yield"
    max_workers: Workers | None
    to: list[str]


@dataclass(frozen=True)
class Existing:
    """After a restart of the server: the workers that exist."""

    path: ClassVar[str] = "/expected"
    ids: list[str]


@dataclass(frozen=True)
class Grant:
    """The secret whose hash is in the run's folder."""

    path: ClassVar[str] = "/grant"
    id: GrantId
    secret: str


@dataclass(frozen=True)
class Scale:
    """Another number of workers."""

    path: ClassVar[str] = "/scale"
    max_workers: Workers
    by: str


@dataclass(frozen=True)
class Drain:
    """A worker, by its id or the beginning of it, hands over and ends."""

    path: ClassVar[str] = "/drain"
    worker: WorkerId
    seconds: Seconds
    by: str


@dataclass(frozen=True)
class Kept:
    """What of a run's retention is changed."""

    last: Checkpoints | None = None
    every: Steps | None = None
    best: Checkpoints | None = None
    metric: Metric | None = None
    mode: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class Prune:
    """Checkpoints that the run's retention, changed so, does not keep; they are removed where `yes` is given."""

    path: ClassVar[str] = "/prune"
    policy: Kept
    yes: bool

    def changes(self) -> dict[str, Any]:
        """What of the policy is given."""
        return {name: value for name, value in vars(self.policy).items() if value is not None}


Request = Wish | Allow | Close | Damaged | Gone | Note | Leaving | Yield | Existing | Grant | Scale | Drain | Prune
