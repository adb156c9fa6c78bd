"""The requests of drivers, controllers and control commands to the host: each is POSTed as JSON to its path. Pure."""

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
    """Stop or save at the next step boundary."""

    path: ClassVar[str] = "/wish"
    wish: Literal["stop", "save"]
    detail: str = ""


@dataclass(frozen=True)
class Allow:
    """A run that pauses after its evaluations may go up to this step."""

    path: ClassVar[str] = "/allow"
    step: Step


@dataclass(frozen=True)
class Close:
    """End the run: the driver knows that no worker will go on."""

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
    """These workers are lost. `ended`: their processes are known to have ended; `detail`: how."""

    path: ClassVar[str] = "/lost"
    ids: list[str]
    ended: bool
    detail: str | None = None
    said: str = ""


@dataclass(frozen=True)
class Note:
    """Record an event in the ledger."""

    path: ClassVar[str] = "/event"
    kind: str
    detail: Detail


@dataclass(frozen=True)
class Leaving:
    """A node goes away in `remaining_s` seconds."""

    path: ClassVar[str] = "/notice"
    node: Node
    remaining_s: Seconds


@dataclass(frozen=True)
class Yield:
    """Keep at most `max_workers`, since the runs named in `to` need the others; None gives them back."""

    path: ClassVar[str] = "/yield"
    max_workers: Workers | None
    to: list[str]


@dataclass(frozen=True)
class Existing:
    """After a restart of the server: the ids of the workers that exist."""

    path: ClassVar[str] = "/expected"
    ids: list[str]


@dataclass(frozen=True)
class Grant:
    """Grant control to a secret whose hash is in the run's folder."""

    path: ClassVar[str] = "/grant"
    id: GrantId
    secret: str


@dataclass(frozen=True)
class Scale:
    """Change the most workers of a world."""

    path: ClassVar[str] = "/scale"
    max_workers: Workers
    by: str


@dataclass(frozen=True)
class Drain:
    """Have a worker, given by its id or the beginning of it, hand over and end."""

    path: ClassVar[str] = "/drain"
    worker: WorkerId
    seconds: Seconds
    by: str


@dataclass(frozen=True)
class Kept:
    """Changes to a run's retention; None leaves a value as it is."""

    last: Checkpoints | None = None
    every: Steps | None = None
    best: Checkpoints | None = None
    metric: Metric | None = None
    mode: Literal["min", "max"] | None = None


@dataclass(frozen=True)
class Prune:
    """List the checkpoints that the run's retention, changed by `policy`, does not keep; with `yes` remove them."""

    path: ClassVar[str] = "/prune"
    policy: Kept
    yes: bool

    def changes(self) -> dict[str, Any]:
        """The values of the policy that are given."""
        return {name: value for name, value in vars(self.policy).items() if value is not None}


Request = Wish | Allow | Close | Damaged | Gone | Note | Leaving | Yield | Existing | Grant | Scale | Drain | Prune
