"""The memory to which a worker copies its parts of snapshots. The vault of the node maps this memory, so the node
holds a part once instead of twice (a copy of the worker and one of the vault)."""

from __future__ import annotations

import threading
from collections.abc import Set
from dataclasses import dataclass

from elastic.checkpoint.staging import StagingBuffer
from elastic.errors import SnapshotError
from elastic.snapshot.adopted import WorkerMemory
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import SnapshotId
from elastic.snapshot.memory import available_bytes

RELEASE_S = 1.0  # kept short, because copying the next part may wait for it


@dataclass(eq=False)
class Buffer:
    """The bytes of one part. `holds` is the snapshot they belong to, None for a free buffer; `lent` is set while the
    vault may map them."""

    staging: StagingBuffer
    holds: SnapshotId | None = None
    lent: WorkerMemory | None = None


class Buffers:
    """The buffers of one worker, two as a rule: one holds the newest complete snapshot, the other is free or being
    written. `reclaim` is called from one thread, the other methods from any.

    Args:
        url: the URL of the vault on this worker's node.
        pinned: whether to pin the memory, which copies from a CUDA device need.
    """

    def __init__(self, url: str, token: str, *, pinned: bool):
        self._vault, self._pinned = VaultClient(url, token, RELEASE_S), pinned
        self._buffers: list[Buffer] = []
        self._lock = threading.Lock()

    def take(self, id: SnapshotId, size: int) -> Buffer:
        """Return a buffer of at least `size` bytes that nobody reads.

        Raises:
            MemoryError, OSError: the node has too little memory left.
        """
        with self._lock:
            free = [b for b in self._buffers if b.holds is None]
            fits = [b for b in free if size <= b.staging.size <= 2 * size]
            if fits:
                buffer = min(fits, key=lambda b: b.staging.size)
            else:
                for unfit in free:  # the size of the parts has changed
                    self._drop(unfit)
                left = available_bytes()
                if size > left:
                    raise MemoryError(f"a part of {size} bytes does not fit into {left} bytes that are left")
                buffer = Buffer(StagingBuffer(pinned=self._pinned))
                buffer.staging.reserve(max(1, size))
                self._buffers.append(buffer)
            buffer.holds = id
            return buffer

    def lend(self, buffer: Buffer, size: int) -> WorkerMemory:
        """Return the first `size` bytes of a buffer for the vault to map. Nothing is written to the buffer until it is
        reclaimed."""
        with self._lock:
            buffer.lent = WorkerMemory.of(buffer.staging.fd, max(1, size))
            return buffer.lent

    def end(self, id: SnapshotId) -> None:
        """Note that the upload of a snapshot has ended. Its buffer is free again unless the vault may map it."""
        with self._lock:
            for buffer in self._buffers:
                if buffer.holds == id and buffer.lent is None:
                    buffer.holds = None

    def reclaim(self, keep: Set[SnapshotId]) -> None:
        """Free the buffers of all snapshots except those in `keep`. This waits at most RELEASE_S per buffer for the
        vault to release it."""
        with self._lock:
            gone = [b for b in self._buffers if b.holds is not None and b.holds not in keep]
        released = [buffer for buffer in gone if self._release(buffer)]
        with self._lock:
            for buffer in gone:
                if buffer in released:
                    buffer.holds = buffer.lent = None
                else:  # the vault may map it yet; the memory is freed when the vault unmaps it
                    self._drop(buffer)
            for buffer in [b for b in self._buffers if b.holds is None][1:]:
                self._drop(buffer)

    def close(self) -> None:
        """Free the memory. The vault keeps what it has mapped."""
        with self._lock:
            for buffer in list(self._buffers):
                self._drop(buffer)
        self._vault.close()

    def _release(self, buffer: Buffer) -> bool:
        if buffer.lent is None:
            return True
        try:
            self._vault.release(buffer.lent)
        except SnapshotError:
            return False
        return True

    def _drop(self, buffer: Buffer) -> None:
        self._buffers.remove(buffer)
        buffer.staging.close()
