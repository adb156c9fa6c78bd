"""Where a run in plain processes is hosted: here, or in a process of its own that is started again when it dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from elastic.errors import RunFailed
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Existing
from elastic.run.host import HostSettings, RunHost
from elastic.run.keeper_options import KeeperOptions
from elastic.run.lookout import LOOKS, POLL_S, Lookout

START_S = 60.0
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
        look_s = max(1.0, settings.limits.lease_s / 3 / LOOKS)
        self._lookout = Lookout("the host of the run", look_s, self._answers, self._replace, self._ended)
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
        self._lookout.__enter__()
        return self.url

    def stop(self) -> None:
        """Let it write out everything and end."""
        self._lookout.__exit__()
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

    def _ended(self) -> str | None:
        code = self.process.poll()
        return None if code is None or self.restarts == MAX_RESTARTS else f"ended: {ended_how(code)}"

    def _answers(self, wait_s: float) -> bool:
        began = time.monotonic()
        try:
            self._link.request("/group", timeout_s=wait_s)
        except OSError:
            self._lookout.stopping.wait(began + wait_s - time.monotonic())  # a refusal comes at once
            return False
        return True

    def _replace(self, why: str) -> None:
        """Start another one, and tell it who lives, until it needs no more."""
        self.process.kill()
        self._end()
        if self.restarts == MAX_RESTARTS:
            return
        self.restarts += 1
        self.process, deadline = self._spawn(why), time.monotonic() + START_S
        while not self._lookout.stopping.wait(POLL_S) and self.process.poll() is None:
            try:
                if self._link.request("/group")["phase"] != "rebuilding":
                    return
                self._link.request(Existing(self._living()))
            except OSError:
                if time.monotonic() > deadline:  # it is not there yet, and will be found to stand still
                    return


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
