"""The host of a run in plain processes: in this process, or in one of its own that is restarted when it dies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Existing
from elastic.run.host import HostSettings, RunHost
from elastic.run.keeper_options import KeeperOptions
from elastic.run.lookout import LOOKS, POLL_S
from elastic.worker.children import START_S, ChildServer

MAX_RESTARTS = 20


class HostHere:
    """The host of a run in this process."""

    def __init__(self, folder_url: str, options: KeeperOptions, settings: HostSettings, detail: dict[str, Any]):
        self._host, self._detail = RunHost(folder_url, options, settings), detail

    def start(self) -> str:
        """Start the host; returns its URL."""
        return self._host.start(self._detail)

    def begin(self) -> str:
        """Start the host; returns its URL."""
        return self.start()

    def wait(self) -> None:
        """Return at once: it serves."""

    def stop(self) -> None:
        """Write everything to storage, and stop serving."""
        self._host.stop()


class HostProcess(ChildServer):
    """The host of a run in a process of its own. If it does not answer for a third of the lease it is replaced, early
    enough for workers to go on.

    Args:
        living: returns the ids of workers whose processes live; a restarted server forms no world before it knows them.
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
        self._settings, self._detail, self._living = settings, detail, living
        self._of_run = {"folder_url": folder_url, "options": asdict(options)}
        look_s = max(1.0, settings.limits.lease_s / 3 / LOOKS)
        super().__init__("the host of the run", "elastic.run", settings.host, look_s, environment, MAX_RESTARTS)

    def start(self) -> str:
        """Wait until it serves; returns the URL. Raises what `wait` raises."""
        return self.wait()

    def specification(self, port: int, why: str) -> dict[str, Any]:
        """The JSON that `elastic.run` reads."""
        settings = asdict(replace(self._settings, port=port, restarted=bool(why)))
        detail = {**self._detail, **({"restarted": True, "why": why} if why else {})}
        return {**self._of_run, "settings": settings, "detail": detail}

    def ask(self, wait_s: float) -> None:
        """Ask for the state of its group."""
        DriverLink(self.url, self._settings.token).request("/group", timeout_s=wait_s)

    def replaced(self, why: str) -> None:
        """Tell the new server which workers live, until it has formed or found a world."""
        link, deadline = DriverLink(self.url, self._settings.token), time.monotonic() + START_S
        while not self._lookout.stopping.wait(POLL_S) and self.process.poll() is None:
            try:
                if link.request("/group")["phase"] != "rebuilding":
                    return
                link.request(Existing(self._living()))
            except OSError:
                if time.monotonic() > deadline:  # it is not there, which the lookout will find out
                    return
