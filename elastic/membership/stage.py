"""Where a worker is: the stages of its work, in their order, and how patient others are with each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: Times longer that the stages of a process's first step may take: it builds and compiles things.
FIRST_STEP_PATIENCE = 10.0


class Stage(Enum):
    """One stage of a worker's work in a world.

    Args:
        order: within a step; a worker never goes back. Waiting for data belongs to the pass that it waits for.
        label: for people.
        patience: times longer than the hang time-out that the stage may take without anything being wrong. A sample may
            come from a cold object store, and whoever is given its microbatch instead has to fetch it as well.
        counts: the worker tells of everything that it does in this stage: standing still is not slowness alone.
    """

    def __init__(self, order: int, label: str, patience: float, counts: bool):
        self.order, self.label, self.patience, self.counts = order, label, patience, counts

    UNHEARD = (-2, "load", 10.0, False)  # it has said nothing in this world yet
    CONNECT = (-1, "connect", 10.0, True)
    LOAD = (0, "load", 10.0, False)  # it gets the state
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
        count: what it did within the stage: two for each pass (its forward pass, its loss), one for each batch of an
            evaluation, one for each second in which it waited for an upload.
        first: it is a stage of the first step of its process.
    """

    step: int
    stage: Stage
    count: int = 0
    first: bool = False

    @property
    def key(self) -> tuple[int, int, int]:
        """Only grows within a world."""
        return (self.step, self.stage.order, self.count)

    @property
    def patience(self) -> float:
        """Times longer than the hang time-out that it may take."""
        return FIRST_STEP_PATIENCE if self.first else self.stage.patience

    @property
    def label(self) -> str:
        """For people."""
        return "first step" if self.first else self.stage.label


UNHEARD = Position(-1, Stage.UNHEARD)
ENTERED = Position(-1, Stage.CONNECT)
