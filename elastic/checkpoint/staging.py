"""Host memory that a worker and its uploader share: one buffer that is reused for every save and grows when needed."""

from __future__ import annotations

import mmap
import os

import torch


class StagingBuffer:
    """A buffer in a memfd, which has no name and is freed with the last process that holds it; /dev/shm may be too
    small.

    Args:
        pinned: whether to pin the memory, which copies from a CUDA device need.
    """

    def __init__(self, *, pinned: bool):
        self.fd = os.memfd_create("elastic-staging")
        self.size = 0
        self._pinned = pinned
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Make the buffer at least `size` bytes long. Its contents may be lost, so nobody may be reading it.

        Raises:
            MemoryError: CUDA could not pin the memory.
        """
        if size <= self.size:
            return
        self._release()
        os.ftruncate(self.fd, 0)  # give the old pages back before asking for new ones
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.size = size
        if self._pinned:
            result = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0)
            if int(result) != 0:
                raise MemoryError(f"CUDA could not pin {size} bytes for staging (error {int(result)})")

    def bytes(self, start: int, end: int) -> torch.Tensor:
        """Return a view of the bytes, uint8 [end - start]."""
        return self._bytes[start:end]

    def view(self) -> memoryview:
        """Return a view of the whole buffer."""
        assert self._map is not None
        return memoryview(self._map)

    def _release(self) -> None:
        if self._map is not None and self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._map, self.size = None, 0  # the memory is unmapped when its last view is freed

    def close(self) -> None:
        """Free the memory."""
        self._release()
        os.close(self.fd)
