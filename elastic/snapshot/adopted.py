"""Memory that a worker made and the vault of its node maps, so that both have one copy of a snapshot's part."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LINK = "/memfd:"  # what the kernel calls memory that has no name in any file system


@dataclass(frozen=True)
class WorkerMemory:
    """A memfd of a process on this machine. Its inode tells it from a file that the same number was given to later."""

    pid: int
    fd: int
    inode: int
    size: int

    @staticmethod
    def of(fd: int, size: int) -> WorkerMemory:
        """The first `size` bytes of a memfd of this process."""
        return WorkerMemory(os.getpid(), fd, os.fstat(fd).st_ino, size)

    @staticmethod
    def parse(text: str) -> WorkerMemory:
        """The inverse of str().

        Raises:
            ValueError: `text` names no memory.
        """
        pid, fd, inode, size = map(int, text.split("-"))
        return WorkerMemory(pid, fd, inode, size)

    def __str__(self) -> str:
        return f"{self.pid}-{self.fd}-{self.inode}-{self.size}"

    def map(self) -> mmap.mmap:
        """The bytes, to read. They stay when the worker has ended.

        Raises:
            OSError: this process does not see the worker (another container or user), or it has closed that memory.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        if not os.readlink(path).startswith(_LINK):
            raise OSError(f"{path} is no memory")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.fstat(fd)
            if there.st_ino != self.inode or there.st_size < self.size:
                raise OSError(f"{path} is other memory than was named")
            return mmap.mmap(fd, self.size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def is_here(self) -> bool:
        """Whether this process can map it."""
        try:
            self.map().close()
        except OSError:
            return False
        return True


@contextmanager
def a_byte() -> Iterator[WorkerMemory]:
    """A byte of this process's memory, for asking a vault whether it can map such."""
    fd = os.memfd_create("elastic-probe")
    try:
        os.ftruncate(fd, 1)
        yield WorkerMemory.of(fd, 1)
    finally:
        os.close(fd)
