"""The parts of snapshots that one vault has in memory."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass, field

from elastic.placement import Part
from elastic.snapshot.adopted import WorkerMemory
from elastic.snapshot.holdings import SnapshotId, to_free
from elastic.snapshot.memory import available_bytes


@dataclass(eq=False)
class Kept:
    """One part: its JSON, and the memory of which the first `size` bytes are those of its tensors."""

    head: bytes
    memory: mmap.mmap
    size: int
    readers: int = 0
    whole: bool = False
    owner: WorkerMemory | None = None  # the worker's memory that `memory` maps; None if the vault allocated it


Key = tuple[SnapshotId, Part]


@dataclass
class Store:
    """The parts of one vault. All methods may be called from any thread."""

    _parts: dict[Key, Kept] = field(default_factory=dict)
    _free: list[mmap.mmap] = field(default_factory=list)
    _dropped: list[Kept] = field(default_factory=list)  # adopted parts that are being read
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, key: Key, head: bytes, size: int, keep: SnapshotId | None) -> Kept:
        """Make memory for a part; readers do not see it before it is complete.

        Raises:
            MemoryError: not enough is available.
            OSError: a part of a newer snapshot is here.
        """
        with self._lock:
            if self._make_way(key, keep):
                self._free = []  # pieces that the last snapshot did not use
            fits = [piece for piece in self._free if size <= len(piece) <= 2 * size]
            memory = min(fits, key=len, default=None)
            if memory is not None:
                self._free.remove(memory)
            else:
                self._free = []  # parts have other sizes now, so these pieces fit none
                left = available_bytes()
                if size > left:
                    raise MemoryError(f"a part of {size} bytes does not fit into {left} bytes that are left")
                memory = mmap.mmap(-1, max(1, size))
            kept = self._parts[key] = Kept(head, memory, size)
            return kept

    def adopt(self, key: Key, head: bytes, memory: WorkerMemory, keep: SnapshotId | None) -> None:
        """Keep a part whose bytes are in a worker's memory, without a copy of them.

        Raises:
            OSError: this process cannot map that memory, or a part of a newer snapshot is here.
        """
        try:
            mapped = memory.map()
        except OSError as error:
            raise OSError(f"cannot map the worker's memory: {error}") from error
        with self._lock:
            self._make_way(key, keep)
            self._parts[key] = Kept(head, mapped, memory.size, whole=True, owner=memory)

    def release(self, memory: WorkerMemory) -> bool:
        """Drop the parts in a worker's memory; returns whether no reader uses them, so that it may be written to."""
        with self._lock:
            self._drop([key for key, kept in self._parts.items() if kept.owner == memory])
            return all(kept.owner != memory for kept in self._dropped)

    def end(self, key: Key, kept: Kept, *, whole: bool) -> None:
        """A part arrived completely, or will not any more."""
        with self._lock:
            if self._parts.get(key) is kept:
                kept.whole = whole
                if not whole:
                    self._drop([key])

    def whole(self) -> list[list[str]]:
        """[snapshot, part] of each complete part."""
        with self._lock:
            return [[str(id), part.key] for id, part in sorted(self._parts) if self._parts[id, part].whole]

    def open(self, key: Key) -> Kept | None:
        """A complete part to read from; its memory is not reused before `close`."""
        with self._lock:
            kept = self._parts.get(key)
            if kept is None or not kept.whole:
                return None
            kept.readers += 1
            return kept

    def close(self, kept: Kept) -> None:
        """A reader of this part is done."""
        with self._lock:
            kept.readers -= 1
            if kept in self._dropped and not kept.readers:
                self._dropped.remove(kept)

    def forget(self, after: int, before: SnapshotId) -> None:
        """Drop snapshots that are older than `before` and of later steps than `after`."""
        with self._lock:
            self._drop([key for key in self._parts if key[0].step > after and key[0] < before])

    def held_bytes(self) -> int:
        """Bytes of memory that this vault uses."""
        with self._lock:
            return sum(len(p.memory) for p in (*self._parts.values(), *self._dropped)) + sum(map(len, self._free))

    def _make_way(self, key: Key, keep: SnapshotId | None) -> bool:
        """Drop what a new part replaces. Returns whether a snapshot went."""
        newest = max((id for id, _ in self._parts), default=key[0])
        if newest > key[0]:  # its worker has given up sending it, and another world has begun
            raise OSError(f"a part of snapshot {key[0]} came after one of {newest}")
        gone = to_free([known for known, _ in self._parts], key[0], keep)
        self._drop([known for known in self._parts if known[0] in gone or known == key])
        return bool(gone)

    def _drop(self, keys: list[Key]) -> None:
        for key in keys:
            part = self._parts.pop(key)
            if part.owner is not None:
                if part.readers:
                    self._dropped.append(part)
            elif part.whole and not part.readers:  # otherwise a connection still writes or reads it
                self._free.append(part.memory)
