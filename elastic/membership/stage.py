"""Where a worker is: the stages of its work, in their order, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: Times longer that the stages of a process's first step may take: it builds and compiles things then.
FIRST_STEP_PATIENCE = 10.0


class Stage(Enum):
    """One stage of a worker's work in a world.

    Args:
        order: within a step; a worker never goes back. Waiting for data belongs to the pass that needs it.
        label: the name shown to people.
        patience: times the hang time-out that the stage may take without anything being wrong. A sample may come from a
            cold object store, and another worker that gets its microbatch instead has to fetch it as well.
        counts: the worker reports everything that it does in this stage, so that standing still is not mere slowness.
    """

    def __init__(self, order: int, label: str, patience: float, counts: bool):
        self.order, self.label, self.patience, self.counts = order, label, patience, counts

    UNHEARD = (-2, "load", 10.0, False)  # it has sent nothing in this world yet
    CONNECT = (-1, "connect", 10.0, True)
    LOAD = (0, "load", 10.0, False)  # it receives or reads the state
    PASS = (1, "step", 1.0, True)
    DATA = (1, "data", 60.0, True)
    REDUCE = (2, "step", 1.0, True)
    FENCE = (3, "step", 1.0, True)
    APPLIED = (4, "step", 1.0, True)
    EVALUATE = (5, "eval", 10.0, True)
    CHECKPOINT = (6, "checkpoint", 10.0, False)
    HELD = (7, "held", 1.0, False)  # it waits until the driver lets it go on


#: The stages in which a step is computed and applied.
OF_A_STEP = frozenset({Stage.PASS, Stage.REDUCE, Stage.FENCE, Stage.APPLIED})


@dataclass(frozen=True)
class Position:
    """How far a worker is in its world.

    Args:
        step: from 0; -1 before the first.
        count: events within the stage: two for each pass (its forward pass, its loss), one for each batch of an
            evaluation, one for each second of waiting for an upload.
        first: whether this is the first step of its process.
    """

    step: int
    stage: Stage
    count: int = 0
    first: bool = False

    @property
    def key(self) -> tuple[int, int, int]:
        """Orders positions; only grows within a world."""
        return (self.step, self.stage.order, self.count)

    @property
    def patience(self) -> float:
        """Times the hang time-out that it may stay here."""
        return FIRST_STEP_PATIENCE if self.first else self.stage.patience

    @property
    def label(self) -> str:
        """The name shown to people."""
        return "first step" if self.first else self.stage.label


UNHEARD = Position(-1, Stage.UNHEARD)
ENTERED = Position(-1, Stage.CONNECT)
