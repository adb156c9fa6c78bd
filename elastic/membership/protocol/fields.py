"""Types of message fields that are narrower than Python's: amounts, names, rows."""

from __future__ import annotations

import math
from typing import Annotated, Any

from elastic.membership.wire import Check, is_whole

_MOST_WORKERS = 1_000_000
_LONGEST_S = 1e18  # a deadline may mean "never"
_GRANT_DIGITS = frozenset("0123456789abcdef")


def _is_natural(value: Any) -> bool:
    return is_whole(value) and value >= 0


def _is_row(value: Any) -> bool:
    """Whether the ledger can take this row: generation and step identify it."""
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
