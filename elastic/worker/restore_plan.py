"""What a new world does with the states that its members bring along. A pure decision, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What a worker brings into a new world.

    Args:
        applied: updates in its state, -1 where it holds none.
        ready: it has the next update in hand, prepared but not applied; 0 or 1.
        epoch, n: the generation of the newest world whose members agreed on this state, or on one from which this
            worker came to it in that world; -1 before its first.
    """

    applied: int
    ready: int
    epoch: int
    n: int


@dataclass(frozen=True)
class Plan:
    """What becomes of the states.

    Args:
        applies: of each rank, whether it applies the update that it has in hand; the others drop theirs.
        held: updates in the state of each rank after that, -1 where it holds none.
        outdated: these states count for nothing, since a newer checkpoint was committed. Those who hold them waited
            while others went on, and were lost.
    """

    applies: tuple[bool, ...]
    held: tuple[int, ...]
    outdated: bool

    @property
    def applied(self) -> tuple[int, ...]:
        """Updates in the state of each rank from which the world goes on, -1 where it is to get one."""
        return (-1,) * len(self.held) if self.outdated else self.held

    @property
    def newest(self) -> int:
        """Updates in the newest state that a member holds, -1 where none holds any."""
        return max(self.applied)

    @property
    def moves(self) -> bool:
        """Whether some member gets a state that it did not hold before."""
        return min(self.applied) != self.newest or self.newest < 0

    def is_newcomer(self, rank: int) -> bool:
        """Whether the rank holds nothing, and others do."""
        return self.held[rank] < 0 <= max(self.held)


def decide(standings: Sequence[Standing], committed: int, *, fenced: bool) -> Plan:
    """How the members of a new world come to one state.

    Args:
        standings: what each rank brings along.
        committed: the step of the newest committed checkpoint, -1 where there is none.
        fenced: every step has a fence. Else each worker holds all of the state.
    """
    apply = tuple(_applies(standing, standings) for standing in standings)
    held = tuple(s.applied + does for s, does in zip(standings, apply, strict=True))
    if not fenced:
        held = _of_one_world(held, standings)
    return Plan(apply, held, outdated=0 <= max(held) < committed)


def _of_one_world(held: Sequence[int], everyone: Sequence[Standing]) -> tuple[int, ...]:
    """Without fences two worlds may have made the newest step: one member applied it, and the others went on without
    it and made it again. In `fast` their last bits differ. The newer world's counts, as do its rows."""
    newest = max(held)
    world = max((s.epoch, s.n) for s, step in zip(everyone, held, strict=True) if step == newest)
    return tuple(
        -1 if step == newest and (s.epoch, s.n) != world else step for s, step in zip(everyone, held, strict=True)
    )


def _applies(mine: Standing, everyone: Sequence[Standing]) -> bool:
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
