"""Reading ranges of objects straight into the caller's memory, with retries after errors that may pass."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from typing import Any

from elastic.checkpoint.patience import patiently
from elastic.checkpoint.s3get import DirectReads
from elastic.errors import DamagedCheckpoint
from elastic.storage import Storage

_SLICE = 1 << 18


class ShortRead(Exception):
    """An object ends before the end of the range that was requested."""


class RangeReader:
    """Reads ranges of objects into memory. May be called from any thread; must be closed."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._direct = DirectReads(storage.fs) if storage.is_s3 else None

    def read(self, name: str, start: int, views: Sequence[memoryview]) -> None:
        """Fill `views`, one after the other, with the bytes of the object `name` from `start`.

        Raises:
            DamagedCheckpoint: there is no such object, or it ends too early.
            Exception: the storage's error, if it cannot pass or did not pass in time.
        """
        try:
            patiently(lambda: self._once(name, start, views))
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{name} is missing") from error
        except ShortRead as error:
            raise DamagedCheckpoint(
                f"{name} is too short: it has no byte {start + sum(map(len, views)) - 1}"
            ) from error

    def _once(self, name: str, start: int, views: Sequence[memoryview]) -> None:
        if self._storage.local:
            fd = self._open(name)
            for view in views:
                while view:
                    count = os.preadv(fd, [view], start)
                    if not count:
                        raise ShortRead
                    view, start = view[count:], start + count
            return
        size = sum(map(len, views))
        if self._direct is not None:
            from fsspec.asyn import sync

            if self._direct.read(self._storage.path(name), start, size, views):
                return
            sync(self._storage.fs.loop, _stream_s3, self._storage.fs, self._storage.path(name), start, size, views)
            return
        data = memoryview(self._storage.read(name, start, start + size))
        if len(data) != size:
            raise ShortRead
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self._storage.path(name), os.O_RDONLY)
            return self._files[name]

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        if self._direct is not None:
            self._direct.close()


async def _stream_s3(fs: Any, path: str, start: int, size: int, views: Sequence[memoryview]) -> None:
    bucket, key, _ = fs.split_path(path)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{start + size - 1}")
    except OSError as error:
        if "InvalidRange" in str(error) or "416" in str(error) or "not satisfiable" in str(error):
            raise ShortRead from error
        raise
    body = answer["Body"]
    try:
        left, view = list(views), memoryview(b"")
        while data := memoryview(await body.read(_SLICE)):
            while data:
                if not view:
                    if not left:
                        raise OSError(errno.EIO, f"{path} answered with more bytes than were asked for")
                    view = left.pop(0)
                count = min(len(view), len(data))
                view[:count] = data[:count]
                view, data = view[count:], data[count:]
        if view or any(left):
            total = int((answer.get("ContentRange") or "/0").rpartition("/")[2] or 0)
            if total < start + size:
                raise ShortRead
            raise ConnectionResetError(f"{path} was cut off while it was read")
    finally:
        body.close()
