"""Which checkpoints to keep."""

from __future__ import annotations

from elastic.checkpoint.format import step_folder
from elastic.checkpoint.reader import newest_first
from elastic.storage import Storage


def to_remove(committed: list[int], attempted: list[int], keep_last: int) -> list[int]:
    """Steps whose folders can go: all but the newest `keep_last` committed ones, and nothing newer than those.

    Folders without a commit go once a newer step is committed: nobody writes to them any more.
    """
    kept = set(sorted(set(committed), reverse=True)[: max(1, keep_last)])
    if not kept:
        return []
    return [s for s in attempted if s not in kept and s < max(kept)]


def prune(storage: Storage, attempted: list[int], keep_last: int) -> list[int]:
    """Remove what `to_remove` names; returns the steps removed. Only the keeper of a live run calls this."""
    committed = [c.step for c in newest_first(storage)]
    gone = to_remove(committed, attempted, keep_last)
    for step in gone:
        storage.remove(step_folder(step))
    return gone
