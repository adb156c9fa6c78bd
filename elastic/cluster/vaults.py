"""Vaults on Ray: an actor on each node that has workers. It keeps copies of their state while workers come and go."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import ray

from elastic.child import yield_to_training
from elastic.cluster.references import is_ready
from elastic.snapshot.vault import VaultServer

START_S = 60.0
FREE_S = 20.0  # Ray takes some seconds to end a process that does not respond, which keeps its address until then
_LOOK_S = 2.0  # the most silence that one look counts: this process itself may have been stopped


class VaultActor:
    """Hosts a vault. The controller of the workers owns it, so that it outlives them and ends with the run."""

    def __init__(self, token: str, port: int):
        yield_to_training()
        deadline = time.monotonic() + FREE_S
        while True:
            try:
                self._server = VaultServer(token, ray.util.get_node_ip_address(), port)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self._url = self._server.start()

    def url(self) -> str:
        return self._url

    def alive(self) -> None:
        """Answers."""

    def held(self) -> None:
        """Never returns: the call fails when this process has ended."""
        threading.Event().wait()


@dataclass
class _Vault:
    actor: Any
    port: int  # the port to listen on; 0 takes a free one
    url: Any  # this and the next two are object references
    held: Any
    alive: Any = None
    missed: bool = False
    silent_s: float = 0.0
    looked: float = field(default_factory=time.monotonic)

    def listen(self) -> None:
        """Count for how long it has not answered, from when it first served."""
        now = time.monotonic()
        if not is_ready(self.url):
            self.looked = now
            return
        self.silent_s += min(now - self.looked, _LOOK_S)
        self.looked = now
        if self.alive is None or is_ready(self.alive):
            self.alive, self.silent_s = self.actor.alive.remote(), 0.0


class Vaults:
    """The vaults of a run, kept by its controller. No method waits for them.

    Args:
        prefix: of the actors' names, by which workers of the run find them.
        hang_timeout_s: a vault that does not answer for so long is ended and started again.
        how: turns Ray's error text into how a process ended.
        options: more options of Ray for an actor on a node.
    """

    def __init__(
        self,
        prefix: str,
        token: str,
        hang_timeout_s: float,
        how: Callable[[str], str],
        options: Callable[[str], dict[str, Any]] = lambda node: {},
    ):
        self._prefix, self._token, self._hang_timeout_s, self._how = prefix, token, hang_timeout_s, how
        self._options = options
        self._vaults: dict[str, _Vault] = {}  # by node

    def ensure(self, node: str) -> None:
        """Start a vault on this node if it has none."""
        if node not in self._vaults:
            self._start(node, 0)

    def keep(self, nodes: Iterable[str]) -> list[tuple[str, str]]:
        """Start vaults of these nodes again that died or stopped answering, empty and at the same address. To be called
        again and again: a vault that ended since the last call may have ended with its node, so it waits for the next.

        Returns:
            (node, reason) for each that was started again.
        """
        again = {}
        for node in set(nodes) & set(self._vaults):
            vault = self._vaults[node]
            vault.listen()
            ended = self._ended(node)
            if ended is not None and vault.missed:
                again[node] = f"it ended: {ended}"
            elif ended is None and vault.silent_s > self._hang_timeout_s:
                again[node] = f"it did not answer for {self._hang_timeout_s:.0f} s and was ended"
            vault.missed = ended is not None
        living = {n["NodeID"] for n in ray.nodes() if n["Alive"]} if again else set()
        again = {node: why for node, why in again.items() if node in living}
        for node in again:
            port = self._port(node)
            ray.kill(self._vaults[node].actor)  # its name stays taken until then
            self._start(node, port)
        return list(again.items())

    def close(self) -> None:
        """End all vaults."""
        for vault in self._vaults.values():
            ray.kill(vault.actor)
        self._vaults = {}

    def _start(self, node: str, port: int) -> None:
        actor: Any = (
            ray.remote(VaultActor)
            .options(
                num_cpus=0,
                label_selector={"ray.io/node-id": node},
                name=_name(self._prefix, node),
                max_concurrency=2,
                **self._options(node),
            )
            .remote(self._token, port)
        )
        self._vaults[node] = _Vault(actor, port, actor.url.remote(), actor.held.remote())

    def _ended(self, node: str) -> str | None:
        """How its process ended; None if it lives."""
        held = self._vaults[node].held
        if not is_ready(held):
            return None
        try:
            ray.get(held)
        except ray.exceptions.RayError as error:
            return self._how(str(error))
        raise AssertionError("a vault dropped what it held")

    def _port(self, node: str) -> int:
        """The port it listened on, or was to listen on: workers know its address."""
        vault = self._vaults[node]
        try:
            return urlsplit(ray.get(vault.url, timeout=0)).port or 0
        except ray.exceptions.RayError:  # it died before it served
            return vault.port


def vault_url(prefix: str, node: str) -> str:
    """The URL of a node's vault, waiting for it to start; asked by a worker of that node.

    Raises:
        ray.exceptions.RayError: it could not start, or did not within START_S.
    """
    return str(ray.get(ray.get_actor(_name(prefix, node)).url.remote(), timeout=START_S))


def _name(prefix: str, node: str) -> str:
    return f"{prefix}vault/{node}"
