"""The memory that a worker copies its parts of snapshots to. The vault of its node maps it, so that a part is in the
node's memory once, not as the worker's copy and as the vault's."""

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

RELEASE_S = 1.0  # copying the next part may wait for this


@dataclass(eq=False)
class Buffer:
    """One part's bytes. `lent` is set while the vault may map them."""

    staging: StagingBuffer
    holds: SnapshotId | None = None
    lent: WorkerMemory | None = None


class Buffers:
    """As a rule two: one has the newest complete snapshot, the other is free or being written. From any thread.

    Args:
        url: of the vault of this worker's node.
        pinned: for copies from a CUDA device.
    """

    def __init__(self, url: str, token: str, *, pinned: bool):
        self._url, self._token, self._pinned = url, token, pinned
        self._buffers: list[Buffer] = []
        self._lock = threading.Lock()

    def take(self, id: SnapshotId, size: int) -> Buffer:
        """A buffer for `size` bytes that nobody reads.

        Raises:
            MemoryError, OSError: there is no memory for it.
        """
        with self._lock:
            free = [b for b in self._buffers if b.holds is None]
            fits = [b for b in free if size <= b.staging.size <= 2 * size]
            if fits:
                taken = min(fits, key=lambda b: b.staging.size)
            else:
                for buffer in free:  # parts have another size now
                    self._drop(buffer)
                left = available_bytes()
                if size > left:
                    raise MemoryError(f"a part of {size} bytes does not fit into {left} bytes that are left")
                taken = Buffer(StagingBuffer(pinned=self._pinned))
                taken.staging.reserve(max(1, size))
                self._buffers.append(taken)
            taken.holds = id
            return taken

    def lend(self, buffer: Buffer, size: int) -> WorkerMemory:
        """The first `size` bytes of a buffer as the vault maps them. Nothing is written to it until it is reclaimed."""
        with self._lock:
            buffer.lent = WorkerMemory.of(buffer.staging.fd, max(1, size))
            return buffer.lent

    def end(self, buffer: Buffer) -> None:
        """Its upload has ended. What was only sent from it, or never lent, is in use no more."""
        with self._lock:
            if buffer.lent is None:
                buffer.holds = None

    def reclaim(self, keep: Set[SnapshotId]) -> None:
        """Free the buffers of all snapshots but these. Waits for the vault, RELEASE_S at most for each."""
        with self._lock:
            gone = [b for b in self._buffers if b.holds is not None and b.holds not in keep]
        released = [buffer for buffer in gone if self._release(buffer)]
        with self._lock:
            for buffer in gone:
                if buffer in released:
                    buffer.holds = buffer.lent = None
                else:  # the vault may still map it: the memory goes with the vault's copy
                    self._drop(buffer)
            for buffer in [b for b in self._buffers if b.holds is None][1:]:
                self._drop(buffer)

    def close(self) -> None:
        """Give the memory back; what the vault maps stays with the vault."""
        with self._lock:
            for buffer in list(self._buffers):
                self._drop(buffer)

    def _release(self, buffer: Buffer) -> bool:
        if buffer.lent is None:
            return True
        vault = VaultClient(self._url, self._token, RELEASE_S)
        try:
            vault.release(buffer.lent)
        except SnapshotError:
            return False
        finally:
            vault.close()
        return True

    def _drop(self, buffer: Buffer) -> None:
        self._buffers.remove(buffer)
        buffer.staging.close()
