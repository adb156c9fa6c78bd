"""What may be asked of a run by HTTP: a checked dataclass for each request. Pure.

A request that is not as it should be is refused in one sentence, and changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from elastic.membership.access import GRANT_ID

T = TypeVar("T")

_MOST_WORKERS = 1_000_000
_LONGEST_S = 1e18  # a deadline may be as good as never
_SHOWN = 60


class Refused(Exception):
    """A request that is not as it should be; one sentence."""


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 1 << 53


def _workers(value: Any) -> bool:
    return _whole(value) and value <= _MOST_WORKERS


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= _LONGEST_S


def _text(value: Any) -> bool:
    return type(value) is str


def _texts(value: Any) -> bool:
    return type(value) is list and all(map(_text, value))


def _is(what: str, check: Callable[[Any], bool]) -> dict[str, Any]:
    return {"what": what, "check": check}


@dataclass(frozen=True)
class Wish:
    """To be acted on at a step boundary."""

    wish: str = field(metadata=_is("stop or save", lambda value: value in ("stop", "save")))
    detail: str = field(metadata=_is("a text", _text), default="")


@dataclass(frozen=True)
class Allow:
    """A run that holds after its evaluations may go up to this step."""

    step: int = field(metadata=_is("a step", _whole))


@dataclass(frozen=True)
class Close:
    """The driver knows that no worker will go on."""

    status: str = field(metadata=_is("stopped or failed", lambda value: value in ("stopped", "failed")))
    message: str = field(metadata=_is("a text", _text), default="")


@dataclass(frozen=True)
class Damaged:
    """A checkpoint was found damaged."""

    step: int = field(metadata=_is("a step", _whole))
    attempt: str = field(metadata=_is("the name of an attempt", _text))
    problem: str = field(metadata=_is("a text", _text))


@dataclass(frozen=True)
class Gone:
    """Workers that are gone; whether their processes are known to have ended, and how."""

    ids: list[str] = field(metadata=_is("a list of ids", _texts))
    ended: bool = field(metadata=_is("true or false", lambda value: type(value) is bool))
    detail: str | None = field(metadata=_is("a text", lambda value: value is None or _text(value)), default=None)


@dataclass(frozen=True)
class Note:
    """An event, for the ledger."""

    kind: str = field(metadata=_is("a text", _text))
    detail: Any = field(metadata=_is("a text or an object", lambda value: type(value) in (str, dict)))


@dataclass(frozen=True)
class Leaving:
    """A node goes away."""

    node: str = field(metadata=_is("a node", _text))
    remaining_s: float = field(metadata=_is("seconds", _seconds))


@dataclass(frozen=True)
class Yield:
    """Keep no more workers than these, as other runs of the cluster need theirs."""

    max_workers: int | None = field(
        metadata=_is("a number of workers or null", lambda value: value is None or _workers(value))
    )
    to: list[str] = field(metadata=_is("a list of runs", _texts))


@dataclass(frozen=True)
class Existing:
    """After a restart: the workers that exist."""

    ids: list[str] = field(metadata=_is("a list of ids", _texts))


@dataclass(frozen=True)
class Grant:
    """The secret whose hash is in the run's folder."""

    id: str = field(
        metadata=_is("32 hexadecimal digits", lambda value: _text(value) and GRANT_ID.fullmatch(value) is not None)
    )
    secret: str = field(metadata=_is("a text", _text))


@dataclass(frozen=True)
class Scale:
    """Another number of workers."""

    max_workers: int = field(metadata=_is("a number of workers", _workers))
    by: str = field(metadata=_is("who asks", _text))


@dataclass(frozen=True)
class Drain:
    """A worker, by its id or the beginning of it, hands over and ends."""

    worker: str = field(metadata=_is("the id of a worker", _text))
    seconds: float = field(metadata=_is("seconds", _seconds))
    by: str = field(metadata=_is("who asks", _text))


@dataclass(frozen=True)
class Kept:
    """What of a run's retention is changed."""

    last: int | None = field(metadata=_is("a number of checkpoints", _whole), default=None)
    every: int | None = field(metadata=_is("steps", lambda value: _whole(value) and value > 0), default=None)
    best: int | None = field(metadata=_is("a number of checkpoints", _whole), default=None)
    metric: str | None = field(metadata=_is("a metric", _text), default=None)
    mode: str | None = field(metadata=_is("min or max", lambda value: value in ("min", "max")), default=None)


@dataclass(frozen=True)
class Prune:
    """Checkpoints that the run's retention, changed so, does not keep."""

    policy: dict[str, Any] = field(metadata=_is("an object", lambda value: type(value) is dict))
    yes: bool = field(metadata=_is("true or false", lambda value: type(value) is bool))

    def changes(self) -> dict[str, Any]:
        """What of the policy is given.

        Raises:
            Refused: it is not as it should be.
        """
        kept = parse(Kept, self.policy)
        return {name: value for name, value in vars(kept).items() if value is not None}


def parse(kind: type[T], body: Any) -> T:
    """A request of this kind from what JSON says.

    Raises:
        Refused: it is none.
    """
    if type(body) is not dict:
        raise Refused(f"the request is {_shown(body)}; give a JSON object")
    values = {}
    for one in fields(kind):  # type: ignore[arg-type]
        what = one.metadata["what"]
        if one.name not in body:
            if one.default is MISSING:
                raise Refused(f"{one.name} is missing; give {what}")
            continue
        if not one.metadata["check"](body[one.name]):
            raise Refused(f"{one.name} is {_shown(body[one.name])}; give {what}")
        values[one.name] = body[one.name]
    return kind(**values)


def read(kind: type[T], text: bytes) -> T:
    """A request of this kind from its text.

    Raises:
        Refused: it is none.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is no JSON ({type(error).__name__}); give a JSON object") from error
    return parse(kind, body)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
