"""Every message between a worker, the host of the run, its driver, its controller and control commands. Pure.

A worker and the host exchange messages over a WebSocket, one JSON object each: its `kind`, the fields of that kind's
class, and, if a member of a world sends it, its `generation` (`worker`, `host`). Drivers, controllers and commands POST
a request to its path (`requests`). Every sender gives the version of these modules that it uses; another version is
refused before anything else happens. This module has the registry of all kinds, and turns messages into text and back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from elastic.membership.protocol.fields import *  # noqa: F403
from elastic.membership.protocol.host import *  # noqa: F403
from elastic.membership.protocol.host import HostMessage
from elastic.membership.protocol.requests import *  # noqa: F403
from elastic.membership.protocol.requests import Request
from elastic.membership.protocol.worker import *  # noqa: F403
from elastic.membership.protocol.worker import MemberMessage, WorkerMessage
from elastic.membership.wire import Refused, loads, parse, plain
from elastic.membership.world import Generation

VERSION = 1  # of these modules: to be raised with every change that older code would misread
VERSION_HEADER = "Elastic-Protocol"

BEAT_S = 1.0
SILENT_S = 5.0
LATELY_S = 3.0  # a worker that sent nothing for this long is not taken into a world if there are others
STACKS_S = 1.0
BEATS_A_SECOND = 1024  # of all workers together: a beat and its answer cost a server about 0.15 ms of processor time
MAX_MESSAGE_BYTES = 256 << 20
REFUSED_CODE = 1008  # closes the WebSocket of a worker that sent an invalid message; the close reason says why

R = TypeVar("R")


def _by_kind(kinds: Any) -> dict[str, Any]:
    return {kind.kind: kind for kind in get_args(kinds)}


FROM_WORKER: Mapping[str, type[WorkerMessage]] = _by_kind(WorkerMessage)
FROM_MEMBER: Mapping[str, type[MemberMessage]] = _by_kind(MemberMessage)
FROM_HOST: Mapping[str, type[HostMessage]] = _by_kind(HostMessage)
_FROM_ALL: Mapping[str, Any] = {**FROM_WORKER, **FROM_MEMBER}
REQUESTS: tuple[type[Request], ...] = get_args(Request)


def beat_s(workers: int, lease_s: float) -> float:
    """Seconds between two beats of one worker: longer where workers are many, so that beats do not fill the server's
    time, but never so long that a lease would end because one was late."""
    return max(BEAT_S, min(workers / BEATS_A_SECOND * BEAT_S, lease_s / 4))


def dumps(message: WorkerMessage | MemberMessage | HostMessage, generation: Generation | None = None) -> str:
    """A message as text. `generation`: that of the sender, if it sends as a member of a world."""
    under = {} if generation is None else {"generation": str(generation)}
    return json.dumps({"kind": message.kind, **under, **plain(message)})


def from_worker(text: str) -> tuple[WorkerMessage | MemberMessage, Generation | None]:
    """A worker's message, and the generation under which it was sent if a member of a world sent it.

    Raises:
        Refused: the text is no valid message.
    """
    body = loads(text)
    kind = _kind_of(body, _FROM_ALL)
    if kind in FROM_WORKER:
        return parse(FROM_WORKER[kind], body), None
    generation = parse(_Under, body).generation
    return parse(FROM_MEMBER[kind], body), generation


def from_host(text: str) -> HostMessage:
    """The host's message to a worker.

    Raises:
        Refused: the text is no valid message.
    """
    body = loads(text)
    return parse(FROM_HOST[_kind_of(body, FROM_HOST)], body)


def read(kind: type[R], text: bytes) -> R:
    """The request of this kind that `text` holds.

    Raises:
        Refused: the text is no valid request of this kind.
    """
    return parse(kind, loads(text))


def check_version(version: str | None, sender: str) -> None:
    """Refuse a sender with another version of these messages; one that gives no version is not checked.

    Raises:
        Refused: the versions differ.
    """
    if version is not None and version != str(VERSION):
        raise Refused(
            f"{sender} speaks version {version[:20]!r} of the protocol, the host of the run version {VERSION}; use the "
            "version of elastic that the run was started with"
        )


@dataclass(frozen=True)
class _Under:
    generation: Generation


def _kind_of(body: Any, known: Mapping[str, Any]) -> str:
    kind = body.get("kind") if type(body) is dict else None
    if type(kind) is str and kind in known:
        return kind
    kind = parse(_Kind, body).kind
    raise Refused(f"the kind of message is {kind[:60]!r}; give one of {', '.join(known)}")


@dataclass(frozen=True)
class _Kind:
    kind: str
