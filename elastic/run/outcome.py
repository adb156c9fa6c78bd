"""The outcome of a run so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """The outcome of a run so far. Changed on the keeper's thread only.

    Args:
        started: when it began, in unix seconds.
        closed: nothing of the run is written any more.
        end: the answer to all who ask how the run ended.
    """

    started: float
    status: str = "running"
    message: str = ""
    closed: bool = False
    end: dict[str, Any] | None = None
