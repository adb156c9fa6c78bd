"""Which snapshots there are, from what the vaults say that they hold. Pure.

A snapshot is complete when every part of it is whole in some vault. Its members have that agreed at a fence before
anybody frees the room of the one before, so there is always one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from elastic.placement import Part


@dataclass(frozen=True, order=True)
class SnapshotId:
    """The world that took a snapshot (claim and number), and the step. A newer world's is newer, whatever the step:
    steps of older worlds may have been undone since."""

    epoch: int
    n: int
    step: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}-{self.step}"

    @staticmethod
    def parse(text: str) -> SnapshotId:
        """The inverse of str().

        Raises:
            ValueError: it is none.
        """
        epoch, n, step = map(int, text.split("-"))
        return SnapshotId(epoch, n, step)


@dataclass(frozen=True)
class Holding:
    """A part that a vault has whole."""

    id: SnapshotId
    part: Part
    url: str


@dataclass(frozen=True)
class Complete:
    """A snapshot of which every part is there: for each part, the vaults that have it."""

    id: SnapshotId
    urls: Mapping[Part, tuple[str, ...]]


def complete(holdings: Sequence[Holding]) -> list[Complete]:
    """The complete snapshots, newest first."""
    found = []
    for id, parts in sorted({(h.id, h.part.siblings) for h in holdings}, reverse=True):
        urls = {part: tuple(sorted({h.url for h in holdings if (h.id, h.part) == (id, part)})) for part in parts}
        if all(urls.values()):
            found.append(Complete(id, urls))
    return found


def lost_parts(holdings: Sequence[Holding]) -> str:
    """For people: why the newest snapshot that anything is left of cannot be used; empty if there is none."""
    if not holdings:
        return ""
    id, parts = max((h.id, h.part.siblings) for h in holdings)
    missing = [str(part) for part in parts if part not in {h.part for h in holdings if h.id == id}]
    return f"the snapshot of step {id.step} lost {', '.join(missing)} in every vault"


def to_free(held: Iterable[SnapshotId], new: SnapshotId, keep: SnapshotId | None) -> set[SnapshotId]:
    """Snapshots whose room a vault may use again when a part of `new` comes, of which `keep` is the newest that is
    complete."""
    return set(held) - {new} - ({keep} if keep is not None else set())
