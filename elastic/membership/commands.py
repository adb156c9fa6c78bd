"""The commands that the membership's decisions return and that the server carries out. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.membership.failure import Failure
from elastic.membership.world import Generation, Member, World


@dataclass(frozen=True)
class Form:
    """Send the members of the world their assignments. With `failing`, the error that ends the run, the world only
    saves. With `parting` it also only saves and then breaks up: a member that is to be left out holds a shard."""

    world: World
    failing: str | None = None
    parting: bool = False


@dataclass(frozen=True)
class Rebuilt:
    """After a restart of the server: the world that its members are in is known again; they may send their messages."""

    world: World


@dataclass(frozen=True)
class Welcome:
    """A member of a world that only lost its connection may send its messages; `broken`: its world is broken."""

    member_id: str
    generation: Generation
    broken: bool


@dataclass(frozen=True)
class Break:
    """Tell all members of the world that it is broken, so that blocked ones are freed."""

    world: World
    lost: Member | None
    reason: str
    planned: bool = False  # a member left so that another world is formed; nobody failed


@dataclass(frozen=True)
class Failed:
    """Record a worker's error; `world`: the world that the worker left because of it."""

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
    """The others go on without a member that is connected but does not answer; it may join again when it does."""

    member: Member


@dataclass(frozen=True)
class Dropped:
    """A worker outside of any world is lost. Recorded, so that a restarted server knows it too."""

    member: Member
    reason: str


@dataclass(frozen=True)
class Refuse:
    """Tell a worker that it does not belong to the run any more."""

    member_id: str
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A worker stays outside of the worlds: its device, data, options, model or optimizer differs, or only it fails."""

    member: Member
    reason: str


@dataclass(frozen=True)
class HandOver:
    """A worker that is to leave, or that is one too many, is in no world and can end."""

    member: Member


@dataclass(frozen=True)
class SaveNow:
    """A node goes away and the world cannot do without its workers: save a checkpoint at the next step boundary."""

    world: World


@dataclass(frozen=True)
class Park:
    """Too few workers for a world: `have` fill cells, and it takes at least `need`.

    Args:
        cell_size: workers of a cell, which are on one node.
    """

    have: int
    need: int
    cell_size: int = 1

    @property
    def what(self) -> str:
        """What there are too few of, as a text."""
        return "workers" if self.cell_size == 1 else f"workers in cells of {self.cell_size} on one node"


@dataclass(frozen=True)
class SaveAlone:
    """The parked run is to let its workers go: `saver` holds the newest state and commits it first."""

    saver: Member


@dataclass(frozen=True)
class GiveUp:
    """The run was parked for too long, or was stopped while parked. `saver` commits the newest state (None if nobody
    holds any); then the run ends with `status`."""

    saver: Member | None
    message: str
    status: str = "failed"


@dataclass(frozen=True)
class Fail:
    """End the run with this error: it came too often, and there is nothing to save or saving failed with it too."""

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
