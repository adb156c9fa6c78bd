"""Host memory that a worker and its uploader share: one buffer, grown when needed, used again for every save."""

from __future__ import annotations

import mmap
import os

import torch


class StagingBuffer:
    """A memfd: no name, no file, and gone with the last process that has it; /dev/shm may be small. Pinned for CUDA."""

    def __init__(self, *, pinned: bool):
        self.fd = os.memfd_create("elastic-staging")
        self.size = 0
        self._pinned = pinned
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Have room for `size` bytes. What was in it may be lost; nobody may be reading it."""
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
        """A view, as uint8."""
        return self._bytes[start:end]

    def view(self) -> memoryview:
        """All of it."""
        assert self._map is not None
        return memoryview(self._map)

    def _release(self) -> None:
        if self._map is not None and self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._map, self.size = None, 0  # unmapped when its last view is gone

    def close(self) -> None:
        """Give the memory back."""
        self._release()
        os.close(self.fd)
