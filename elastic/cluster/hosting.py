"""The host of a run as an actor on the driver's node. Ray starts it again if it dies."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from elastic.cluster.actors import HostActor
from elastic.cluster.forks import Forks
from elastic.errors import one_line
from elastic.membership.driver import DriverLink
from elastic.run.host import HostSettings
from elastic.run.keeper_options import KeeperOptions
from elastic.run.lookout import LOOKS, Lookout, host_answers

AGAIN_S = 0.5  # between two starts
START_S = 60.0
END_S = 30.0


class HostOnRay:
    """Keeps one host serving. If it stops answering it is ended, and another one serves at the same address.

    Args:
        on_loss: called with the reason if no host could be started again.
        forks: how it is a fork on a standing cluster.
    """

    def __init__(
        self,
        folder_url: str,
        options: KeeperOptions,
        settings: HostSettings,
        detail: dict[str, Any],
        on_loss: Callable[[str], None],
        forks: Forks | None,
    ):
        self._host: Any = None
        self._coming: Any = None
        self._lookout: Lookout | None = None
        self._settings, self._detail, self._on_loss = replace(settings, port=_free_port()), detail, on_loss
        node = ray.get_runtime_context().get_node_id()
        here = {"label_selector": {"ray.io/node-id": node}, **(forks.options(node) if forks is not None else {})}
        actor_class: Any = ray.remote(num_cpus=0, max_restarts=-1, **here)(HostActor)
        self._make = partial(actor_class.remote, folder_url, options)

    def begin(self) -> str:
        """Begin to start the host, and return the URL at which it will serve: workers may start meanwhile, and try
        again until it does."""
        self._host = self._make(self._settings, self._detail)
        self._coming = self._host.url.remote()
        return self._settings.url

    def wait(self) -> None:
        """Wait until the host serves.

        Raises:
            ray.exceptions.RayError: it failed to start, or took longer than START_S.
        """
        ray.get(self._coming, timeout=START_S)
        look_s = max(1.0, self._settings.limits.lease_s / 3 / LOOKS)
        answers = partial(host_answers, DriverLink(self._settings.url, self._settings.token))
        self._lookout = Lookout("the host of the run", look_s, answers, self._replace).__enter__()

    def stop(self) -> None:
        """Let the host write everything and end. The run is over by then, so a host that does not end only warns."""
        if self._lookout is not None:
            self._lookout.__exit__()
        if self._host is None:
            return
        try:
            ray.get(self._host.stop.remote(), timeout=END_S)
        except ray.exceptions.RayError as error:
            print(f"warning: the host of the run was ended: {one_line(error)}", file=sys.stderr)
        finally:
            ray.kill(self._host)

    def _replace(self, why: str) -> None:
        assert self._lookout is not None, "it is what calls this"
        ray.kill(self._host)
        settings, detail = replace(self._settings, restarted=True), {**self._detail, "why": why}
        deadline = time.monotonic() + START_S
        while not self._lookout.stopping.wait(AGAIN_S):
            self._host = self._make(settings, detail)
            try:
                ray.get(self._host.url.remote(), timeout=START_S)
                return
            except ray.exceptions.RayError as error:  # the address of the last host may not be free yet
                ray.kill(self._host)
                if time.monotonic() > deadline:
                    self._on_loss(f"{why}, and another one did not start: {one_line(error)}")
                    return


def _free_port() -> int:
    """A port that is free now. It is fixed, so that a restarted host listens on it again."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
