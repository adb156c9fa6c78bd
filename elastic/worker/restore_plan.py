"""Decides what a new world does with the states that its members bring along. Pure, and equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What a worker brings into a new world.

    Args:
        applied: the number of updates in its state; -1 if it holds none.
        ready: 1 if it has prepared the next update and not applied it, else 0.
        epoch, n: the generation of the newest world whose members agreed on this state, or on one from which this
            worker came to it in that world; -1 before its first world.
    """

    applied: int
    ready: int
    epoch: int
    n: int


@dataclass(frozen=True)
class Plan:
    """What becomes of the members' states.

    Args:
        applies: for each rank, whether it applies the update that it has prepared; the others drop theirs.
        held: for each rank, the number of updates in its state after that; -1 if it holds none.
        outdated: no state counts, since a newer checkpoint was committed: the members with these states waited while
            others went on, and those others were lost.
    """

    applies: tuple[bool, ...]
    held: tuple[int, ...]
    outdated: bool

    @property
    def applied(self) -> tuple[int, ...]:
        """For each rank, the updates in the state from which the world goes on; -1 if the rank is to receive one."""
        return (-1,) * len(self.held) if self.outdated else self.held

    @property
    def newest(self) -> int:
        """The updates in the newest state that a member holds; -1 if none holds any."""
        return max(self.applied)

    @property
    def moves(self) -> bool:
        """Whether some member gets a state that it did not hold before."""
        return min(self.applied) != self.newest or self.newest < 0

    def is_newcomer(self, rank: int) -> bool:
        """Return whether a rank holds nothing while others hold a state."""
        return self.held[rank] < 0 <= max(self.held)


def decide(standings: Sequence[Standing], committed: int, *, fenced: bool) -> Plan:
    """Decide how the members of a new world come to one state.

    Args:
        standings: what each rank brings along, by rank.
        committed: the step of the newest committed checkpoint; -1 if there is none.
        fenced: every step has a fence. If not, each worker holds all of the state.
    """
    apply = tuple(_applies(standing, standings) for standing in standings)
    held = tuple(s.applied + does for s, does in zip(standings, apply, strict=True))
    if not fenced:
        held = _of_one_world(held, standings)
    return Plan(apply, held, outdated=0 <= max(held) < committed)


def _of_one_world(held: Sequence[int], everyone: Sequence[Standing]) -> tuple[int, ...]:
    """Return `held` with -1 for ranks whose newest step was made again by a newer world.

    Without fences one member may apply an update while the others go on without it and make the same step again. In
    `fast` the two differ in their last bits. The step of the newer world counts, as its rows in the ledger do.
    """
    newest = max(held)
    world = max((s.epoch, s.n) for s, step in zip(everyone, held, strict=True) if step == newest)
    return tuple(
        -1 if step == newest and (s.epoch, s.n) != world else step for s, step in zip(everyone, held, strict=True)
    )


def _applies(mine: Standing, everyone: Sequence[Standing]) -> bool:
    """Return whether a worker applies the update that it has prepared.

    If one member of its world is past the fence, all members of that world had prepared the update, so it is applied.
    If none is, it is applied only if all members with the newest state have prepared it: a member that passed the fence
    may be lost by now, with its row in the ledger, or may come later. A member that has this state from an older world,
    which went on without it, has no say.
    """
    newest = max(s.applied for s in everyone)
    holders = [s for s in everyone if s.applied == newest]
    if not mine.ready or newest < 0:
        return False
    if mine.applied == newest:
        world = max((s.epoch, s.n) for s in holders)
        return (mine.epoch, mine.n) == world and all(s.ready for s in holders if (s.epoch, s.n) == world)
    return mine.applied == newest - 1 and any((s.epoch, s.n) == (mine.epoch, mine.n) for s in holders)
