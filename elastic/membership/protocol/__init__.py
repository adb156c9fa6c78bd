"""Every message between a worker, the host of the run, its driver, its controller and control commands. Pure.

A worker and the host speak over a WebSocket, one JSON object a message: its `kind`, what the class of that kind has,
and, of a member of a world, the `generation` under which it speaks (`worker`, `host`). Drivers, controllers and
commands POST a request to its path (`requests`). Whoever speaks says which version of these modules it goes by; another
one is refused before anything else. Here is the registry of all kinds, and how they become text and come back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from elastic.membership.protocol.fields import RowKey
from elastic.membership.protocol.host import (
    Allowed,
    Assignment,
    BeatHeard,
    Broken,
    Commit,
    Dump,
    Fenced,
    HostMessage,
    Out,
    Over,
    Recorded,
    RestorePoint,
    Resume,
    SaveAlone,
    Wished,
)
from elastic.membership.protocol.requests import (
    Allow,
    Close,
    Damaged,
    Drain,
    Existing,
    Gone,
    Grant,
    Kept,
    Leaving,
    Note,
    Prune,
    Request,
    Scale,
    Wish,
    Yield,
)
from elastic.membership.protocol.worker import (
    Acknowledge,
    Beat,
    Disconnected,
    Done,
    Failed,
    Hello,
    Join,
    LedgerEvent,
    MemberMessage,
    Report,
    Rows,
    SavedAlone,
    Share,
    Stacks,
    Unfit,
    Unloadable,
    Whereabouts,
    WorkerMessage,
)
from elastic.membership.wire import Refused, loads, parse, plain
from elastic.membership.world import Generation

__all__ = [
    "BEAT_S",
    "FROM_HOST",
    "FROM_MEMBER",
    "FROM_WORKER",
    "LATELY_S",
    "MAX_MESSAGE_BYTES",
    "REFUSED_CODE",
    "REQUESTS",
    "SILENT_S",
    "STACKS_S",
    "VERSION",
    "VERSION_HEADER",
    "Acknowledge",
    "Allow",
    "Allowed",
    "Assignment",
    "Beat",
    "BeatHeard",
    "Broken",
    "Close",
    "Commit",
    "Damaged",
    "Disconnected",
    "Done",
    "Drain",
    "Dump",
    "Existing",
    "Failed",
    "Fenced",
    "Gone",
    "Grant",
    "Hello",
    "HostMessage",
    "Join",
    "Kept",
    "Leaving",
    "LedgerEvent",
    "MemberMessage",
    "Note",
    "Out",
    "Over",
    "Prune",
    "Recorded",
    "Report",
    "Request",
    "RestorePoint",
    "Resume",
    "RowKey",
    "Rows",
    "SaveAlone",
    "SavedAlone",
    "Scale",
    "Share",
    "Stacks",
    "Unfit",
    "Unloadable",
    "Whereabouts",
    "Wish",
    "Wished",
    "WorkerMessage",
    "Yield",
    "check_version",
    "dumps",
    "from_host",
    "from_worker",
    "read",
]

VERSION = 1  # of these modules: another one for every change that older code would take for something else
VERSION_HEADER = "Elastic-Protocol"

BEAT_S = 1.0
SILENT_S = 5.0
LATELY_S = 3.0  # who said nothing for so long is not taken into a world where others can be
STACKS_S = 1.0
MAX_MESSAGE_BYTES = 256 << 20
REFUSED_CODE = 1008  # closes the WebSocket of a worker that said what is no message; the reason is the refusal

R = TypeVar("R")


def _by_kind(*kinds: Any) -> dict[str, Any]:
    return {kind.kind: kind for kind in kinds}


FROM_WORKER: Mapping[str, type[WorkerMessage]] = _by_kind(Join, Hello, Beat, Unfit, Acknowledge, Stacks, Report)
FROM_MEMBER: Mapping[str, type[MemberMessage]] = _by_kind(
    Rows, LedgerEvent, Disconnected, Share, Unloadable, Failed, SavedAlone, Done
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
