"""The terms that all modules share: generation, member, world."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, order=True)
class Generation:
    """(epoch of the claim, number of the world in it); only grows."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}"

    @staticmethod
    def parse(text: str) -> Generation:
        epoch, _, n = text.partition("-")
        return Generation(int(epoch), int(n))


@dataclass(frozen=True)
class Member:
    """A worker. `device` describes what its arithmetic depends on; in a bitwise world all devices are equal. `says`
    describes its data, options, model and optimizer, which must match in every world (`elastic.likeness`)."""

    id: str
    node: str
    local_index: int = 0
    pid: int = 0
    host: str = ""
    device: str = ""
    says: str = ""


@dataclass(frozen=True)
class World:
    """An immutable formed membership; a member's rank is its place in `members`."""

    generation: Generation
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return len(self.members)

    @cached_property
    def ids(self) -> frozenset[str]:
        return frozenset(m.id for m in self.members)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {m.id: rank for rank, m in enumerate(self.members)}

    def rank_of(self, member_id: str) -> int | None:
        return self._ranks.get(member_id)
