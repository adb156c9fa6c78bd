"""Whether an update that a broken world had in hand is applied in the next one. A pure decision, on all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What a worker brings into a new world.

    Args:
        applied: updates in its state, -1 where it holds none.
        ready: it has the next update in hand, prepared but not applied; 0 or 1.
        epoch, n: the generation of the world in which it began its newest step, -1 before its first.
    """

    applied: int
    ready: int
    epoch: int
    n: int


def applies(mine: Standing, everyone: Sequence[Standing]) -> bool:
    """Whether a worker applies the update that it has in hand.

    Where one passed the fence, everyone of its world had prepared the update. Where nobody did, it is applied if all
    who hold the newest state have it: who passed may be lost by now, with its row in the ledger, or come later. Who
    holds that state from an older world, which went on without it, has no say in this.
    """
    newest = max(s.applied for s in everyone)
    holders = [s for s in everyone if s.applied == newest]
    if not mine.ready or newest < 0:
        return False
    if mine.applied == newest:
        world = max((s.epoch, s.n) for s in holders)
        return (mine.epoch, mine.n) == world and all(s.ready for s in holders if (s.epoch, s.n) == world)
    return mine.applied == newest - 1 and any((s.epoch, s.n) == (mine.epoch, mine.n) for s in holders)
