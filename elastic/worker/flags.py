"""What the members of a world agree on in a step, at its fence or with its record: they all get the largest of each
number. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

NEUTRAL = (-(1 << 62), -(1 << 62))  # the update of a spare, which applies none


class Stop(IntEnum):
    """How a world stops: as `--run.stop-after` planned, or because a stop was requested, which saves first."""

    NO = 0
    PAUSE = 1
    AT_ONCE = 2


@dataclass(frozen=True)
class Flags:
    """The flags of one member, or those that all agreed on.

    Args:
        update: a fingerprint of the update, and its negative: updates are equal if the largest of both still match.
        stop: this session of the run is to end.
        save: a checkpoint was requested.
        leave: the members are to leave the world together.
        busy: a save is going on.
        snapshot: how far this member's part of a snapshot is, and the steps between two; empty if none are taken.
    """

    update: tuple[int, int] = NEUTRAL
    stop: Stop = Stop.NO
    save: bool = False
    leave: bool = False
    busy: bool = False
    snapshot: tuple[int, ...] = ()

    def pack(self) -> list[int]:
        """As 64-bit integers, of which the members compute the largest."""
        return [*self.update, int(self.stop), int(self.save), int(self.leave), int(self.busy), *self.snapshot]

    @staticmethod
    def unpack(numbers: Sequence[int]) -> Flags:
        """The flags that all agreed on."""
        first, second, stop, save, leave, busy, *snapshot = numbers
        return Flags((first, second), Stop(stop), bool(save), bool(leave), bool(busy), tuple(snapshot))
