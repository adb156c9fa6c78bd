"""Writes objects that exist whole or not at all: streamed in parts, in parallel, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from elastic import fault
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.uploads import Upload, open_upload
from elastic.errors import ConfigError
from elastic.storage import Storage, sync_folder
from elastic.tools.progress import held_back

PART_BYTES = 16 << 20
IN_FLIGHT = 8
_MOST_PARTS = 10_000  # S3 takes no more parts of one object
_RETRY_S = 120.0


class Stream:
    """Writes one object of a known size from its beginning. Use as a context manager; an exception leaves nothing
    behind."""

    def __init__(self, storage: Storage, name: str, size: int):
        self._size, self._at, self._number = size, 0, 0
        self._part = max(PART_BYTES, -(-size // _MOST_PARTS))
        self._upload: Upload = open_upload(storage, name, size, self._part)
        self._pool = ThreadPoolExecutor(IN_FLIGHT if self._upload.parallel else 1, "output-part")
        self._waiting: deque[Future[None]] = deque()
        self._buffer, self._filled = bytearray(min(self._part, size)), 0
        self._cancelled = threading.Event()

    def write(self, data: memoryview) -> None:
        """Append bytes, which are copied."""
        while data:
            count = min(len(data), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled, data = self._filled + count, data[count:]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        piece, start = memoryview(self._buffer)[: self._filled], self._at
        while len(self._waiting) >= IN_FLIGHT:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._put, self._number, start, piece))
        self._number, self._at = self._number + 1, start + len(piece)
        self._buffer, self._filled = bytearray(min(self._part, max(self._size - self._at, 0))), 0

    def _put(self, number: int, start: int, piece: memoryview) -> None:
        retry_s = _RETRY_S if self._upload.parallel else 0.0
        patiently(self._upload.put, number, start, piece, cancelled=self._cancelled, retry_s=retry_s)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._at == self._size, f"{self._at} of {self._size} bytes were written"
                while self._waiting:
                    self._waiting.popleft().result()
                self._pool.shutdown()
                fault.point("output.before_complete", -1, 0)
                patiently(self._upload.complete)
                return
        except BaseException:
            self._give_up()
            raise
        self._give_up()

    def _give_up(self) -> None:
        self._cancelled.set()
        with held_back():  # an impatient second Ctrl-C would leave a part behind
            self._pool.shutdown(cancel_futures=True)
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._upload.abort()


class Output:
    """A file or a folder that a tool makes. Use as a context manager; an exception or an interruption removes it.

    A local folder is made under another name and then renamed. Object storage cannot rename, so there the caller must
    write last the object that makes the others count.

    Raises:
        ConfigError: the file or folder exists already.
    """

    def __init__(self, url: str, *, folder: bool, option: str):
        self._written: list[str] = []
        self._folder, self.name = folder, ""
        if folder:
            self.storage = Storage(url, option=option)
            if self.storage.names() or (self.storage.local and os.path.isfile(self.storage.root)):
                raise ConfigError(f"{option} is {url!r}, which exists and is left as it is; give another name")
            self._final = self.storage.root
            if self.storage.local:
                above, name = os.path.split(self._final)
                self.storage = Storage(f"{above}/.tmp-{name}-{uuid.uuid4().hex[:8]}", option=option)
            return
        above, _, self.name = url.rpartition("/")
        self.storage = Storage(above or ("/" if url.startswith("/") else "."), option=option)
        if self.storage.exists(self.name):
            raise ConfigError(f"{option} is {url!r}, which exists and is left as it is; give another name")

    def stream(self, name: str, size: int) -> Stream:
        """Return a stream that writes an object of `size` bytes; the object exists when its context ends."""
        fault.point("output.file", -1, len(self._written))
        self._written.append(name)
        return Stream(self.storage, name, size)

    def put(self, name: str, data: bytes) -> None:
        """Write a small object."""
        with self.stream(name, len(data)) as stream:
            stream.write(memoryview(data))

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._folder and self.storage.local:
                    os.rename(self.storage.root, self._final)
                    sync_folder(os.path.dirname(self._final))
                return
        except BaseException:
            self._remove()
            raise
        self._remove()

    def _remove(self) -> None:
        with held_back():
            if self._folder and self.storage.local:
                shutil.rmtree(self.storage.root, ignore_errors=True)
                return
            for name in self._written:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self.storage.remove(name)


def write_file(path: str, make: Callable[[], bytes], option: str) -> str:
    """Write a local file for a person, with the folders above it, and return its path.

    Raises:
        ConfigError: it cannot be written.
    """
    data = make()
    try:
        if folder := os.path.dirname(path):
            os.makedirs(folder, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{option} is {path!r}, which cannot be written ({error.strerror}); give another") from error
    return path
