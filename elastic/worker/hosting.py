"""Where a run in plain processes is hosted: here, or in a process of its own that is started again when it dies."""

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
        """Returns the URL."""
        return self._host.start(self._detail)

    def stop(self) -> None:
        """Write out everything and stop serving."""
        self._host.stop()


class HostProcess(ChildServer):
    """The host of a run in a process of its own. One that does not answer for a third of the lease is replaced, so that
    workers keep their part.

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
        self._settings, self._detail, self._living = settings, detail, living
        self._of_run = {"folder_url": folder_url, "options": asdict(options)}
        look_s = max(1.0, settings.limits.lease_s / 3 / LOOKS)
        super().__init__("the host of the run", "elastic.run", settings.host, look_s, environment, MAX_RESTARTS)

    def start(self) -> str:
        """Wait until it serves; returns the URL. Raises what `wait` raises."""
        return self.wait()

    def specification(self, port: int, why: str) -> dict[str, Any]:
        """What `elastic.run` reads."""
        settings = asdict(replace(self._settings, port=port, restarted=bool(why)))
        detail = {**self._detail, **({"restarted": True, "why": why} if why else {})}
        return {**self._of_run, "settings": settings, "detail": detail}

    def ask(self, wait_s: float) -> None:
        """How its group is."""
        DriverLink(self.url, self._settings.token).request("/group", timeout_s=wait_s)

    def replaced(self, why: str) -> None:
        """Tell the new one who lives, until it needs no more."""
        link, deadline = DriverLink(self.url, self._settings.token), time.monotonic() + START_S
        while not self._lookout.stopping.wait(POLL_S) and self.process.poll() is None:
            try:
                if link.request("/group")["phase"] != "rebuilding":
                    return
                link.request(Existing(self._living()))
            except OSError:
                if time.monotonic() > deadline:  # it is not there yet, and will be found to stand still
                    return
