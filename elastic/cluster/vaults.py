"""Vaults on Ray: an actor on each node that has workers, which keeps copies of their state while they come and go."""

from __future__ import annotations

from typing import Any

import ray

from elastic.snapshot.vault import VaultServer

START_S = 60.0


class VaultActor:
    """Hosts a vault. Owned by the controller of the workers, so that it outlives them, and ends with the run."""

    def __init__(self, token: str):
        self._server = VaultServer(token, ray.util.get_node_ip_address())
        self._url = self._server.start()

    def url(self) -> str:
        return self._url


class Vaults:
    """The vaults that a controller keeps. Does not wait for them.

    Args:
        prefix: of the actors' names; workers of the same run look for them there.
    """

    def __init__(self, prefix: str, token: str):
        self._prefix, self._token = prefix, token
        self._actors: dict[str, Any] = {}

    def have(self, node: str) -> None:
        """Have one on this node, if there is none that lives."""
        name = _name(self._prefix, node)
        if node in self._actors and _lives(name):
            return
        options = {"num_cpus": 0, "label_selector": {"ray.io/node-id": node}, "name": name}
        self._actors[node] = ray.remote(VaultActor).options(**options).remote(self._token)

    def close(self) -> None:
        """End them all."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors = {}


def vault_url(prefix: str, node: str) -> str:
    """The URL of a node's vault, waiting for it to start; asked by a worker of that node.

    Raises:
        ray.exceptions.RayError: it could not start, or did not within START_S.
    """
    return str(ray.get(ray.get_actor(_name(prefix, node)).url.remote(), timeout=START_S))


def _lives(name: str) -> bool:
    try:
        ray.get_actor(name)
    except ValueError:  # Ray's answer for one that is dead
        return False
    return True


def _name(prefix: str, node: str) -> str:
    return f"{prefix}vault/{node}"
