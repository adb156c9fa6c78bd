"""What the members of a world agree on at the fence of a step: the largest of each number counts for all. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

NEUTRAL = (-(1 << 62), -(1 << 62))  # the update of a spare, which applies nothing


class Stop(IntEnum):
    """How a world stops: where `--run.stop-after` said so, or because somebody asked; the latter saves first."""

    NO = 0
    PAUSE = 1
    AT_ONCE = 2


@dataclass(frozen=True)
class Flags:
    """What one member says, or what all agreed on.

    Args:
        update: a number that equal updates have in common, and its negative: they agree if the largest of both do.
        stop: this part of the run is to end.
        save: a checkpoint is wished for.
        leave: the members are to leave the world together.
        busy: a save is still under way.
        snapshot: how far this member's part of a snapshot is, and the steps between two; empty where none are taken.
    """

    update: tuple[int, int] = NEUTRAL
    stop: Stop = Stop.NO
    save: bool = False
    leave: bool = False
    busy: bool = False
    snapshot: tuple[int, ...] = ()

    def pack(self) -> list[int]:
        """As integers of 64 bits, of which the members find the largest."""
        return [*self.update, int(self.stop), int(self.save), int(self.leave), int(self.busy), *self.snapshot]

    @staticmethod
    def unpack(numbers: Sequence[int]) -> Flags:
        """What all agreed on."""
        first, second, stop, save, leave, busy, *snapshot = numbers
        return Flags((first, second), Stop(stop), bool(save), bool(leave), bool(busy), tuple(snapshot))
