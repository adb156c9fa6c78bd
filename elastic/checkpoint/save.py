"""One save that is under way, as the thread that trains and the saver's thread share it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.plan import Line, Write
from elastic.checkpoint.tensors import Shard

Key = tuple[str, tuple[int, ...], tuple[int, ...]]  # name of a tensor, offsets and sizes of a box


@dataclass
class Save:
    """One rank's part of a save.

    Args:
        lines, writes: what this rank writes, as `plan` decides.
        tail: the first byte of what an earlier checkpoint may have already; it is uploaded only if it changed.
        stall_s: seconds that training waited.
        index: what the rank tells about its pack, when the save has succeeded.
        error: why the save failed.
        no_room: it failed because storage is full.
        facts: bytes, seconds, requests and retries, for the ledger.
        staged: set when the state may be written to.
        ended: set when `index` or `error` is there.
        versions: of the tensors that are copied later, by index: a tensor that changes meanwhile spoils the save.
    """

    step: int
    attempt: str
    rank: int
    shards: list[Shard]
    lines: list[Line]
    writes: list[Write]
    tail: int
    stall_s: float = 0.0
    index: dict[str, Any] | None = None
    error: str | None = None
    no_room: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    staged: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of the pack."""
        return self.writes[-1].end if self.writes else 0

    @property
    def pack(self) -> str:
        """The name of the pack."""
        return f"rank-{self.rank:04d}.pack"

    def key(self, write: Write) -> Key:
        """Identify the box of a write across saves."""
        return self.shards[write.source].name, write.box.offsets, write.box.sizes
