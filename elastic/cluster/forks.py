"""Which workers of a run on a standing cluster are forks of their node's server, and workers that wait for the next
run. A node is known to have a server when the run that started it has written so in the head's store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from elastic.cluster.references import is_ready
from elastic.cluster.standing import command, fingerprint, raylets_here, serve
from elastic.compat.ray import get_value, prestart_workers, put_value
from elastic.errors import one_line

AHEAD_S = 5.0  # for all nodes together: a node that was lost may not be known as such yet
_NAMESPACE = b"elastic-forks"
#: Parts of a job's runtime environment in which a fork can be what Ray would start.
_HARMLESS = ("working_dir", "excludes", "config", "env_vars")


@dataclass(frozen=True)
class Forks:
    """How a run uses fork servers.

    Args:
        code: the fingerprint of the run's code.
        idle_s: how long a server, or a worker that waits, stays without being used.
        ahead: workers may be started for the next run: this one's have no environment of their own.
        besides: the number of its other processes on the driver's node, for which some wait too.
    """

    code: str
    idle_s: float
    ahead: bool
    besides: int

    def options(self, node: str) -> dict[str, Any]:
        """Options of an actor on this node: with an environment if its process can be a fork."""
        known = get_value(self._key(node), _NAMESPACE) is not None
        return {"runtime_env": {"py_executable": command(self.code)}} if known else {}

    def has(self, nodes: Iterable[str]) -> bool:
        """Whether all these nodes have a server."""
        return all(self.options(node) for node in nodes)

    def publish(self, node: str) -> None:
        """This node has a server."""
        put_value(self._key(node), b"1", _NAMESPACE)

    def _key(self, node: str) -> bytes:
        return f"{node}/{self.code}/{command(self.code)}".encode()


def forks_here(idle_s: float, besides: int) -> Forks | None:
    """How the run of this driver uses fork servers, with one on its own node; None if its workers cannot be forks. For
    the arguments see `Forks`."""
    context = ray.get_runtime_context()
    job = {name: value for name, value in dict(context.runtime_env).items() if value}
    variables = job.get("env_vars", {})
    if not set(job) <= set(_HARMLESS) or any(not name.startswith("RAY_") for name in variables):
        return None
    forks, node = Forks(fingerprint(), idle_s, not job, besides), context.get_node_id()
    raylet = next((pid for pid, of in raylets_here(context.gcs_address).items() if of == node), None)
    if raylet is not None and serve(raylet, forks.code, idle_s):
        forks.publish(node)
    return forks


def serve_here(forks: Forks, asks: str) -> bool:
    """In a worker: have a server on this node; whether there is one for the run's code, and the command `asks` it."""
    raylet, code = os.environ.get("RAY_RAYLET_PID", ""), fingerprint()
    same = (code, command(code)) == (forks.code, asks)
    return same and raylet.isdigit() and serve(int(raylet), code, forks.idle_s)


class Keeper:
    """What the controller of a run does for later workers: servers on the nodes that it has come to, and at its end
    workers that wait for the next run.

    Args:
        vaults: each node has one.
    """

    def __init__(self, forks: Forks | None, *, vaults: bool):
        self._forks, self._vaults = forks, vaults
        self._asked: dict[str, Any] = {}  # node -> the answer of a worker there
        self._most: dict[str, int] = {}  # node -> the most workers that this run had there at one time

    def options(self, node: str) -> dict[str, Any]:
        """Options of an actor on this node."""
        return {} if self._forks is None else self._forks.options(node)

    def look(self, trained: Mapping[str, list[Any]]) -> None:
        """Have servers on these nodes, each with the actors of workers there that have trained."""
        if self._forks is None:
            return
        for node, actors in trained.items():
            self._most[node] = max(len(actors), self._most.get(node, 0))
            if node not in self._asked:
                # also where one is known: it may have ended since
                self._asked[node] = actors[0].serve_forks.remote(self._forks, command(self._forks.code))
            elif self._asked[node] is not None and is_ready(self._asked[node]):
                answer, self._asked[node] = self._asked[node], None
                try:
                    if ray.get(answer):
                        self._forks.publish(node)
                except ray.exceptions.RayError:
                    del self._asked[node]  # that worker has ended: another one is asked

    def close(self) -> None:
        """The workers of the run have ended: have as many that wait for the next one, and for its host and controller
        on this node."""
        if self._forks is None or not self._forks.ahead or not self._most:
            return
        try:
            self._start_ahead(self._forks, time.monotonic() + AHEAD_S)
        except (ray.exceptions.RayError, RuntimeError, OSError) as error:  # the run itself has its outcome already
            print(f"not all workers that could wait for the next run do: {one_line(error)}")

    def _start_ahead(self, forks: Forks, deadline: float) -> None:
        context = ray.get_runtime_context()
        here, is_fork = context.get_node_id(), "py_executable" in dict(context.runtime_env)
        for node in ray.nodes():
            name = node["NodeID"]
            workers = self._most.get(name, 0)
            others = forks.besides - (not is_fork) if name == here else 0  # no worker waits in vain for a controller
            count = workers + (self._vaults and workers > 0) + others
            left_s = deadline - time.monotonic()
            if node["Alive"] and count > 0 and left_s > 0 and (options := forks.options(name)):
                address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
                prestart_workers(address, options["runtime_env"], count, forks.idle_s, left_s)
