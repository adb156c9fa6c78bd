"""The uploader process as its worker sees it: starts it, gives it packs, watches it, and ends it if it stands still."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from elastic.checkpoint.uploader import TELL_S, UploadJob

# An uploader that moves no bytes for so many seconds is replaced. A disk's last sync of a large pack takes time too.
HANG_TIMEOUT_S = 60.0
START_S = 60.0  # for the imports of the process, on a busy machine
CALLED_OFF_S = 5.0  # for the end of an upload that was called off
_SLOWEST = 16 << 20  # bytes per second of a disk's sync


class UploaderLost(Exception):
    """The uploader process died, or stood still and was ended; the message says which."""


class Uploader:
    """A running uploader process. It ends with the thread that made it.

    Args:
        storage_url: where it uploads to.
        memory: the file descriptor of the shared memory.
        hang_timeout_s: a process that moves no bytes for so many seconds (and those in which its pack may be synced) is
            ended.
    """

    def __init__(self, storage_url: str, memory: int, hang_timeout_s: float = HANG_TIMEOUT_S):
        command = [sys.executable, "-m", "elastic.checkpoint.uploader", storage_url, str(memory), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory], env=environment
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._hang_timeout_s, self._patience_s, self._read, self._began = hang_timeout_s, hang_timeout_s, b"", False
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the process is dead, `answer` raises.

        Raises:
            UploaderLost: the process does not read, and was ended.
        """
        data = json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._write(self._process.stdin.fileno(), memoryview(data))

    def _write(self, fd: int, data: memoryview) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_WRITE)
            while data:
                if not selector.select(self._hang_timeout_s):
                    raise self._stood_still(self._hang_timeout_s)
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(fd, data) :]

    def start(self, job: UploadJob, memory_size: int) -> None:
        """Have a pack uploaded.

        Args:
            memory_size: of the shared memory, in bytes.

        Raises:
            UploaderLost: as `send`.
        """
        self._patience_s = self._hang_timeout_s + job.size / _SLOWEST
        self.send({"do": "upload", "job": asdict(job), "memory": memory_size})

    def answer(self, cancelled: threading.Event) -> dict[str, Any]:
        """Wait until the upload has ended, and return what `perform` returned, or `error`.

        Args:
            cancelled: set when the upload is called off: then the process must end it within CALLED_OFF_S.

        Raises:
            UploaderLost: the process died, or stood still and was ended.
        """
        assert self._process.stdout is not None
        fd, moved, off = self._process.stdout.fileno(), time.monotonic(), False
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while True:
                while b"\n" in self._read:
                    line, _, self._read = self._read.partition(b"\n")
                    found: dict[str, Any] = json.loads(line)
                    if "moved" not in found:
                        return found
                    moved, self._began = time.monotonic(), True
                if cancelled.is_set() and not off:
                    off, moved = True, time.monotonic()
                patience_s = self._patience_s if self._began else max(self._patience_s, START_S)
                patience_s = min(patience_s, CALLED_OFF_S) if off else patience_s
                left = moved + patience_s - time.monotonic()
                if left <= 0:
                    raise self._stood_still(patience_s)
                if selector.select(min(left, TELL_S)):
                    piece = os.read(fd, 1 << 16)
                    if not piece:
                        raise UploaderLost(f"the uploader process {self._ended()}")
                    self._read += piece

    def _ended(self) -> str:
        code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def _stood_still(self, seconds: float) -> UploaderLost:
        self.kill()
        return UploaderLost(f"the uploader process stood still for {seconds:.0f} s")

    def kill(self) -> None:
        """End the process, whatever it does; a thread that waits for an answer gets UploaderLost. Safe from any
        thread."""
        self._process.kill()

    def close(self) -> None:
        """End the process and close its pipes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
