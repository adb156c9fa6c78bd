"""Where a run in plain processes is hosted: here, or in a process of its own that is started again when it dies."""

from __future__ import annotations

import json
import os
import signal
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
from elastic.membership.protocol import Existing
from elastic.run.host import HostSettings, RunHost
from elastic.run.keeper_options import KeeperOptions

START_S = 60.0
POLL_S = 0.05
MAX_RESTARTS = 20
LOOKS = 5  # that must fail, one after the other, before a host that lives is said to stand still


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
    """The host of a run in a process of its own. When that dies, another one serves at the same address; one that does
    not answer for a third of the lease is ended, so that workers keep their part.

    Args:
        living: ids of the workers whose processes live; a restarted server forms nothing before it knows.
        environment: further environment variables of the process.
    """

    def __init__(
        self,
        folder_url: str,
        options: KeeperOptions,
        settings: HostSettings,
        detail: dict[str, Any],
        *,
        living: Callable[[], list[str]],
        environment: dict[str, str],
    ):
        self._settings = replace(settings, port=_free_port(settings.host))
        self._specification = {"folder_url": folder_url, "options": asdict(options)}
        self._detail = detail
        self._living, self._environment = living, environment
        self.url = f"http://{settings.host}:{self._settings.port}"
        self._link = DriverLink(self.url, settings.token)
        self._look_s = max(1.0, settings.limits.lease_s / 3 / LOOKS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="host-supervisor", daemon=True)
        self.restarts = 0

    def start(self) -> str:
        """Returns the URL.

        Raises:
            RunFailed: the process ended, or did not answer in time.
        """
        self.process = self._spawn()
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

    def _spawn(self, why: str = "") -> subprocess.Popen[bytes]:
        """`why` the one before was replaced."""
        environment = {**os.environ, **self._environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen([sys.executable, "-m", "elastic.run"], stdin=subprocess.PIPE, env=environment)
        settings = asdict(replace(self._settings, restarted=bool(why)))
        detail = {**self._detail, **({"restarted": True, "why": why} if why else {})}
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
        rebuilding, why = False, ""
        next_look, missed = time.monotonic() + self._look_s, 0
        while not self._stopping.wait(POLL_S):
            code = self.process.poll()
            if code is not None and self.restarts < MAX_RESTARTS:
                assert self.process.stdin is not None
                self.process.stdin.close()
                self.restarts += 1
                self.process, rebuilding = self._spawn(why or f"the host of the run ended: {ended_how(code)}"), True
                why, missed, next_look = "", 0, time.monotonic() + START_S  # or once it has answered
            elif code is None and time.monotonic() >= next_look:
                missed = 0 if self._answers() else missed + 1
                next_look = time.monotonic() + (0.0 if missed else self._look_s)
                if missed == LOOKS:  # counted, not timed: this process may have been stopped itself
                    why = f"the host of the run did not answer for {LOOKS * self._look_s:.0f} s and was ended"
                    self.process.kill()
            if rebuilding:
                try:
                    rebuilding = self._link.request("/group")["phase"] == "rebuilding"
                    if rebuilding:
                        self._link.request(Existing(self._living()))
                    next_look = min(next_look, time.monotonic() + self._look_s)
                except OSError:
                    continue  # not there yet, or dead again

    def _answers(self) -> bool:
        began = time.monotonic()
        try:
            self._link.request("/group", timeout_s=self._look_s)
        except OSError:
            self._stopping.wait(began + self._look_s - time.monotonic())  # a refusal comes at once
            return False
        return True


def ended_how(returncode: int) -> str:
    """How a process ended, for people."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
        return f"killed by {name}" + (", perhaps since memory ran out (see dmesg)" if name == "SIGKILL" else "")
    except ValueError:
        return f"killed by signal {-returncode}"


def _free_port(host: str) -> int:
    """A port that is free now: the host listens on it again when it is restarted."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
