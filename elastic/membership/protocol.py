"""Every message between a worker, the host of the run, its driver, its controller and control commands. Pure.

A worker and the host speak over a WebSocket, one JSON object a message: its `kind`, what the class of that kind has,
and, of a member of a world, the `generation` under which it speaks. Drivers, controllers and commands POST a request
to its path. Whoever speaks says which version of this file it goes by; another one is refused before anything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from elastic.membership.messages import Failure
from elastic.membership.stage import Position
from elastic.membership.wire import Check, Refused, is_whole, loads, parse, plain
from elastic.membership.world import Generation, Member

VERSION = 1  # of the messages below: another one for every change that older code would take for something else
VERSION_HEADER = "Elastic-Protocol"

BEAT_S = 1.0
SILENT_S = 5.0
LATELY_S = 3.0  # who said nothing for so long is not taken into a world where others can be
STACKS_S = 1.0
MAX_MESSAGE_BYTES = 256 << 20
REFUSED_CODE = 1008  # closes the WebSocket of a worker that said what is no message; the reason is the refusal

_MOST_WORKERS = 1_000_000
_LONGEST_S = 1e18  # a deadline may be as good as never
_GRANT_DIGITS = frozenset("0123456789abcdef")


def _is_natural(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _is_row(value: Any) -> bool:
    """Whether the ledger can take it: it is told apart by its generation and step."""
    if type(value) is not dict or type(value.get("generation")) is not str or not _is_natural(value.get("step")):
        return False
    return "step_s" not in value or type(value["step_s"]) in (int, float)


def _is_grant(value: Any) -> bool:
    return type(value) is str and len(value) == 32 and set(value) <= _GRANT_DIGITS


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= _LONGEST_S


def _text(what: str) -> Check:
    return Check(what, lambda value: type(value) is str)


Natural = Annotated[int, Check("a whole number from 0 on", _is_natural)]
Step = Annotated[int, Check("a step", _is_natural)]
Steps = Annotated[int, Check("steps", lambda value: _is_natural(value) and value > 0)]
Checkpoints = Annotated[int, Check("a number of checkpoints", _is_natural)]
Workers = Annotated[int, Check("a number of workers", lambda value: _is_natural(value) and value <= _MOST_WORKERS)]
Seconds = Annotated[float, Check("seconds", _is_seconds)]
Row = Annotated[dict[str, Any], Check("a row with its generation and step", _is_row)]
RowKey = tuple[str, int, bool]  # generation, step, whether it is an evaluation's
Attempt = Annotated[str, _text("the name of an attempt")]
Node = Annotated[str, _text("a node")]
WorkerId = Annotated[str, _text("the id of a worker")]
GrantId = Annotated[str, Check("32 hexadecimal digits", _is_grant)]
Metric = Annotated[str, _text("a metric")]
Detail = Annotated[Any, Check("a text or an object", lambda value: type(value) in (str, dict))]


@dataclass(frozen=True)
class RestorePoint:
    """Where state comes from when nobody holds any: the checkpoint of `step`; None is a fresh start."""

    step: int | None = None
    attempt: str = ""

    @property
    def newest(self) -> int:
        """The step of the checkpoint; -1 where there is none."""
        return -1 if self.step is None else self.step


# ---- a worker to the host ----------------------------------------------------------------------------------------


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


# ---- a member of a world to the host, under the generation of that world -------------------------------------------


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


WorkerMessage = Join | Hello | Beat | Unfit | Acknowledge | Stacks
MemberMessage = Rows | LedgerEvent | Share | Unloadable | Failed | SavedAlone | Done

# ---- the host to a worker ----------------------------------------------------------------------------------------


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

# ---- requests of drivers, controllers and commands -------------------------------------------------------------


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

# ---- the registry, and text ------------------------------------------------------------------------------------

R = TypeVar("R")


def _by_kind(*kinds: Any) -> dict[str, Any]:
    return {kind.kind: kind for kind in kinds}


FROM_WORKER: Mapping[str, type[WorkerMessage]] = _by_kind(Join, Hello, Beat, Unfit, Acknowledge, Stacks)
FROM_MEMBER: Mapping[str, type[MemberMessage]] = _by_kind(
    Rows, LedgerEvent, Share, Unloadable, Failed, SavedAlone, Done
)
FROM_HOST: Mapping[str, type[HostMessage]] = _by_kind(
    BeatHeard, Assignment, SaveAlone, Resume, Broken, Wished, Allowed, Recorded, Commit, Fenced, Out, Over, Dump
)
_FROM_ALL: Mapping[str, Any] = {**FROM_WORKER, **FROM_MEMBER}
REQUESTS: tuple[type[Request], ...] = (
    Wish,
    Allow,
    Close,
    Damaged,
    Gone,
    Note,
    Leaving,
    Yield,
    Existing,
    Grant,
    Scale,
    Drain,
    Prune,
)


def dumps(message: WorkerMessage | MemberMessage | HostMessage, generation: Generation | None = None) -> str:
    """A message as text; `generation`: under which a member of a world says it."""
    said = {} if generation is None else {"generation": str(generation)}
    return json.dumps({"kind": message.kind, **said, **plain(message)})


def from_worker(text: str) -> tuple[WorkerMessage | MemberMessage, Generation | None]:
    """What a worker said, and of a member of a world the generation under which it did.

    Raises:
        Refused: it is none of the messages.
    """
    body = loads(text)
    kind = _kind_of(body, _FROM_ALL)
    if kind in FROM_WORKER:
        return parse(FROM_WORKER[kind], body), None
    generation = parse(_Under, body).generation
    return parse(FROM_MEMBER[kind], body), generation


def from_host(text: str) -> HostMessage:
    """What the host said to a worker.

    Raises:
        Refused: it is none of the messages.
    """
    body = loads(text)
    return parse(FROM_HOST[_kind_of(body, FROM_HOST)], body)


def read(kind: type[R], text: bytes) -> R:
    """A request of this kind from its text.

    Raises:
        Refused: it is none.
    """
    return parse(kind, loads(text))


def check_version(said: str | None, who: str) -> None:
    """Refuse who goes by another version of these messages; who says none is not asked.

    Raises:
        Refused: in one sentence.
    """
    if said is not None and said != str(VERSION):
        raise Refused(
            f"{who} speaks version {said[:20]!r} of the protocol, the host of the run version {VERSION}; use the "
            "version of elastic that the run was started with"
        )


@dataclass(frozen=True)
class _Under:
    generation: Generation


def _kind_of(body: Any, known: Mapping[str, Any]) -> str:
    said = body.get("kind") if type(body) is dict else None
    if type(said) is str and said in known:
        return said
    said = parse(_Kind, body).kind
    raise Refused(f"the kind of message is {said[:60]!r}; give one of {', '.join(known)}")


@dataclass(frozen=True)
class _Kind:
    kind: str
