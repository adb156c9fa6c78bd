"""An error that made a worker leave its world, as workers report it and decisions count it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 16  # samples that are named, where there may be many


@dataclass(frozen=True)
class Failure:
    """An error that made a worker leave its world; the same kind at the same place is replayed only so often.

    Args:
        step, microbatch: from 0; -1 where the error is not of one microbatch.
        message: its first line says who, where and what, the rest how it came to that.
        fatal: it would be so again, and ends the run as soon as the state is saved.
        samples: that were worked on.
    """

    kind: str
    step: int
    microbatch: int
    message: str
    fatal: bool = False
    samples: tuple[int, ...] = ()

    @property
    def summary(self) -> str:
        """Who, where, and the exception in one line."""
        return self.message.partition("\n")[0]


def named(samples: Sequence[int]) -> str:
    """Samples, for people: the first few of them."""
    shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
    return f"sample{'s' if len(samples) > 1 else ''} {shown}"
