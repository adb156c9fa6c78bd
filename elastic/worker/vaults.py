"""The vaults of a run in plain processes: one process for each node that workers are said to be on."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from urllib.parse import urlsplit

from elastic.errors import RunFailed
from elastic.worker.hosting import ended_how

START_S = 30.0
AGAIN_S = 1.0  # between two starts
END_S = 10.0
STILL_S = 30.0
_LOOK_S = 1.0  # the most that one look counts: this process may have been stopped itself


class VaultProcess:
    """A vault in a process of its own, which ends with this one.

    Args:
        environment: further environment variables of the process.
        still_s: one that says nothing for so long is ended and started again.
    """

    def __init__(self, token: str, host: str, environment: dict[str, str], still_s: float = STILL_S):
        self._token, self._host, self._environment, self._still_s = token, host, environment, still_s
        self.url, self._gone = "", False
        self._start(0)

    def _start(self, port: int) -> None:
        self._since = self._looked = time.monotonic()
        self._silent_s = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elastic.snapshot"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **self._environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"token": self._token, "host": self._host, "port": port}).encode() + b"\n")
        self.process.stdin.flush()

    def wait(self) -> str:
        """Wait until it serves; returns its URL.

        Raises:
            RunFailed: it ended, or did not start in time.
        """
        self.url = self.url or self._read_url()
        return self.url

    def _read_url(self) -> str:
        assert self.process.stdout is not None
        deadline, found = time.monotonic() + START_S, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                piece = b""
                if selector.select(max(0.0, deadline - time.monotonic())):
                    piece = os.read(self.process.stdout.fileno(), 4096)
                if not piece:
                    raise RunFailed(f"a vault did not start within {START_S:.0f} s (exit code {self.process.poll()})")
                found += piece
        return found.decode().strip()

    def keep(self) -> str | None:
        """If it ended by itself, or stands still, start it again: empty, and at the same address, by which workers know
        it. Returns what became of it, if it was."""
        port = urlsplit(self.url).port
        if port is None or self._gone:
            return None
        if self.process.poll() is None:
            self._listen()
            if self._silent_s <= self._still_s:
                return None
            why = f"it stood still for {self._still_s:.0f} s"
            self.process.kill()
        elif not self._rested():
            return None
        else:
            why = f"it ended: {ended_how(self.process.poll() or 0)}"
        self._close()
        self._start(port)
        return why

    def _listen(self) -> None:
        """Take in what it says, which is only that it lives."""
        assert self.process.stdout is not None
        now = time.monotonic()
        self._silent_s += min(now - self._looked, _LOOK_S)
        self._looked = now
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while selector.select(0) and os.read(self.process.stdout.fileno(), 4096):
                self._silent_s = 0.0

    def _rested(self) -> bool:
        return time.monotonic() - self._since > AGAIN_S

    def kill(self) -> None:
        """As its node would be lost."""
        self.process.kill()
        self.stop()

    def stop(self) -> None:
        """End it; what it kept is gone."""
        self._gone = True
        self._close()

    def _close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
