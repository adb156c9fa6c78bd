"""An error that made a worker leave its world, as workers report it and decisions count it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 16  # most samples that a text names


@dataclass(frozen=True)
class Failure:
    """An error that made a worker leave its world. The same kind at the same place is replayed a limited number of
    times.

    Args:
        step, microbatch: where it came, from 0; -1 if it does not belong to one microbatch.
        message: the first line says which worker failed, where and with what; the rest is the traceback.
        fatal: a replay would fail too, so it ends the run as soon as the state is saved.
        samples: ids of the samples that were being processed.
    """

    kind: str
    step: int
    microbatch: int
    message: str
    fatal: bool = False
    samples: tuple[int, ...] = ()

    @property
    def summary(self) -> str:
        """The worker, the place and the exception in one line."""
        return self.message.partition("\n")[0]


def named(samples: Sequence[int]) -> str:
    """The ids of the first few samples, as text for people."""
    shown = ", ".join(map(str, samples[:SHOWN])) + (", ..." if len(samples) > SHOWN else "")
    return f"sample{'s' if len(samples) > 1 else ''} {shown}"
