"""What became of a run so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """What became of a run so far. Changed on the keeper's thread only.

    Args:
        started: when it began, in seconds since 1970.
        closed: nothing of the run is written any more.
        end: what everyone hears who asks how it ended.
    """

    started: float
    status: str = "running"
    message: str = ""
    closed: bool = False
    end: dict[str, Any] | None = None
