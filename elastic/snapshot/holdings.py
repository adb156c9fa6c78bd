"""Which snapshots there are, from what the vaults say that they hold. Pure.

A snapshot is complete when every part of it is whole in some vault. Its members have that agreed at a fence before
anybody frees the room of the one before, so there is always one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
    shard: int
    shards: int
    url: str


@dataclass(frozen=True)
class Complete:
    """A snapshot of which every part is there: for each part, the vaults that have it."""

    id: SnapshotId
    urls: tuple[tuple[str, ...], ...]


def complete(holdings: Sequence[Holding]) -> list[Complete]:
    """The complete snapshots, newest first."""
    found = []
    for id, shards in sorted({(h.id, h.shards) for h in holdings}, reverse=True):
        here = [h for h in holdings if (h.id, h.shards) == (id, shards)]
        urls = tuple(tuple(sorted({h.url for h in here if h.shard == s})) for s in range(shards))
        if all(urls):
            found.append(Complete(id, urls))
    return found


def lost_parts(holdings: Sequence[Holding]) -> str:
    """For people: why the newest snapshot that anything is left of cannot be used; empty if there is none."""
    if not holdings:
        return ""
    id, shards = max((h.id, h.shards) for h in holdings)
    missing = sorted(set(range(shards)) - {h.shard for h in holdings if (h.id, h.shards) == (id, shards)})
    return f"the snapshot of step {id.step} lost shard {', '.join(map(str, missing))} of {shards} in every vault"


def to_free(held: Iterable[SnapshotId], new: SnapshotId, keep: SnapshotId | None) -> set[SnapshotId]:
    """Snapshots whose room a vault may use again when a part of `new` comes, of which `keep` is the newest that is
    complete."""
    return set(held) - {new} - ({keep} if keep is not None else set())
