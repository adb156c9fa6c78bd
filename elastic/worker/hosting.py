"""Where a run in plain processes is hosted: here, or in a process of its own that is started again when it dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from elastic.errors import RunFailed
from elastic.membership.driver import DriverLink
from elastic.run.host import HostSettings, RunHost
from elastic.run.keeper import KeeperOptions

START_S = 60.0
POLL_S = 0.05
MAX_RESTARTS = 20


class HostHere:
    """The host of a run in this process."""

    def __init__(self, folder_url: str, options: KeeperOptions, settings: HostSettings, detail: dict[str, Any]):
        self._host, self._detail = RunHost(folder_url, options, settings), detail

    def start(self) -> str:
        """Returns the URL."""
        return self._host.start(self._detail)

    def stop(self) -> None:
        """Write out everything and stop serving."""
        self._host.stop()


class HostProcess:
    """The host of a run in a process of its own. When that dies, another one serves at the same address.

    Args:
        living: ids of the workers whose processes live; a restarted server forms nothing before it knows.
        environment: further environment variables of the process.
    """

    def __init__(
        self, folder_url: str, options: KeeperOptions, settings: HostSettings, detail: dict[str, Any], *,
        living: Callable[[], list[str]], environment: dict[str, str],
    ):  # fmt: skip
        self._settings = replace(settings, port=_free_port(settings.host))
        self._specification = {"folder_url": folder_url, "options": asdict(options)}
        self._detail = detail
        self._living, self._environment = living, environment
        self.url = f"http://{settings.host}:{self._settings.port}"
        self._link = DriverLink(self.url, settings.token)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="host-supervisor", daemon=True)
        self.restarts = 0

    def start(self) -> str:
        """Returns the URL.

        Raises:
            RunFailed: the process ended, or did not answer in time.
        """
        self.process = self._spawn(restarted=False)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._link.request("/status")
                break
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self._end()
                    raise RunFailed(
                        f"the host of the run did not answer at {self.url} within {START_S:.0f} s "
                        f"(exit code {self.process.poll()})"
                    ) from error
            time.sleep(POLL_S)
        self._thread.start()
        return self.url

    def stop(self) -> None:
        """Let it write out everything and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(START_S)
        self._end()

    def _spawn(self, *, restarted: bool) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self._environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen([sys.executable, "-m", "elastic.run"], stdin=subprocess.PIPE, env=environment)
        settings = asdict(replace(self._settings, restarted=restarted))
        detail = {**self._detail, **({"restarted": True} if restarted else {})}
        assert process.stdin is not None
        process.stdin.write(
            json.dumps({**self._specification, "settings": settings, "detail": detail}).encode() + b"\n"
        )
        process.stdin.flush()
        return process

    def _end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _supervise(self) -> None:
        rebuilding = False
        while not self._stopping.wait(POLL_S):
            if self.process.poll() is not None and self.restarts < MAX_RESTARTS:
                assert self.process.stdin is not None
                self.process.stdin.close()
                self.restarts += 1
                self.process, rebuilding = self._spawn(restarted=True), True
            if rebuilding:
                try:
                    rebuilding = self._link.request("/group")["phase"] == "rebuilding"
                    if rebuilding:
                        self._link.request("/expected", {"ids": self._living()})
                except OSError:
                    continue  # not there yet, or dead again


def _free_port(host: str) -> int:
    """A port that is free now: the host listens on it again when it is restarted."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
