"""Vaults on Ray: an actor on each node that has workers, which keeps copies of their state while they come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray

from elastic.snapshot.vault import VaultServer

START_S = 60.0


class VaultActor:
    """Hosts a vault. Owned by the controller of the workers, so that it outlives them, and ends with the run."""

    def __init__(self, token: str, port: int):
        self._server = VaultServer(token, ray.util.get_node_ip_address(), port)
        self._url = self._server.start()

    def url(self) -> str:
        return self._url

    def held(self) -> None:
        """Never returns: the call fails when this process has ended."""
        threading.Event().wait()


@dataclass
class _Vault:
    actor: Any
    url: Any  # refs
    held: Any
    missed: bool = False


class Vaults:
    """The vaults that a controller keeps. Does not wait for them.

    Args:
        prefix: of the actors' names; workers of the same run look for them there.
    """

    def __init__(self, prefix: str, token: str):
        self._prefix, self._token = prefix, token
        self._vaults: dict[str, _Vault] = {}  # by node

    def have(self, node: str) -> None:
        """Have one on this node."""
        if node not in self._vaults:
            self._start(node, 0)

    def keep(self, nodes: Iterable[str]) -> None:
        """Start those of these nodes again that died alone, empty and at the same address. To be called again and
        again: one that ended since the last call may have ended with its node, so it is left until the next."""
        ended = [node for node in set(nodes) & set(self._vaults) if self._ended(node)]
        again = [node for node in ended if self._vaults[node].missed]
        living = {n["NodeID"] for n in ray.nodes() if n["Alive"]} if again else set()
        for node in ended:
            self._vaults[node].missed = True
            if node in living:
                port = self._port(node)
                ray.kill(self._vaults[node].actor)  # who made an actor takes its name for taken until then
                self._start(node, port)

    def close(self) -> None:
        """End them all."""
        for vault in self._vaults.values():
            ray.kill(vault.actor)
        self._vaults = {}

    def _start(self, node: str, port: int) -> None:
        actor: Any = ray.remote(VaultActor).options(
            num_cpus=0, label_selector={"ray.io/node-id": node}, name=_name(self._prefix, node), max_concurrency=2
        ).remote(self._token, port)  # fmt: skip
        self._vaults[node] = _Vault(actor, actor.url.remote(), actor.held.remote())

    def _ended(self, node: str) -> bool:
        ready, _ = ray.wait([self._vaults[node].held], timeout=0)
        return bool(ready)

    def _port(self, node: str) -> int:
        """Where it listened: workers know it by that."""
        try:
            return urlsplit(ray.get(self._vaults[node].url, timeout=0)).port or 0
        except ray.exceptions.RayError:  # it died before it could say
            return 0


def vault_url(prefix: str, node: str) -> str:
    """The URL of a node's vault, waiting for it to start; asked by a worker of that node.

    Raises:
        ray.exceptions.RayError: it could not start, or did not within START_S.
    """
    return str(ray.get(ray.get_actor(_name(prefix, node)).url.remote(), timeout=START_S))


def _name(prefix: str, node: str) -> str:
    return f"{prefix}vault/{node}"
