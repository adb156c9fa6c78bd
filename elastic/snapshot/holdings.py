"""Which snapshots exist, from the vaults' lists of what they hold. Pure.

A snapshot is complete when each of its parts is completely in some vault. The members agree on that at a fence before
any of them frees the memory of the snapshot before, so there is always a complete one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from elastic.placement import Part


@dataclass(frozen=True, order=True)
class SnapshotId:
    """The world that took a snapshot (epoch and number), and the step. A snapshot of a newer world is newer whatever
    its
    step: steps of older worlds may have been undone since."""

    epoch: int
    n: int
    step: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}-{self.step}"

    @staticmethod
    def parse(text: str) -> SnapshotId:
        """The inverse of str().

        Raises:
            ValueError: the text is no snapshot id.
        """
        epoch, n, step = map(int, text.split("-"))
        return SnapshotId(epoch, n, step)


@dataclass(frozen=True)
class Holding:
    """A part that a vault has completely."""

    id: SnapshotId
    part: Part
    url: str


@dataclass(frozen=True)
class Complete:
    """A snapshot of which every part exists, with the URLs of the vaults that have each part."""

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
    """Why the newest snapshot cannot be used, as a text for people; empty if the vaults hold nothing."""
    if not holdings:
        return ""
    id, parts = max((h.id, h.part.siblings) for h in holdings)
    missing = [str(part) for part in parts if part not in {h.part for h in holdings if h.id == id}]
    return f"the snapshot of step {id.step} lost {', '.join(missing)} in every vault"


def to_free(held: Iterable[SnapshotId], new: SnapshotId, keep: SnapshotId | None) -> set[SnapshotId]:
    """The snapshots whose memory a vault may reuse when a part of `new` arrives; `keep` is the newest complete one."""
    return set(held) - {new} - ({keep} if keep is not None else set())
