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

OTHERS_S = 5.0  # from the first workers that are ready: not beside the first steps
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
    """What the controller of a run does for later workers: servers on the nodes that it has come to, and workers that
    wait: for the next run's host and controller while this one trains, for its workers at the end of this one. A node
    starts as many at once as it has CPUs, and Ray drops the others.

    Args:
        vaults: each node has one.
    """

    def __init__(self, forks: Forks | None, *, vaults: bool):
        self._forks, self._vaults = forks, vaults
        self._asked: dict[str, Any] = {}  # node -> the answer of a worker there
        self._most: dict[str, int] = {}  # node -> the most workers that this run had there at one time
        self._first_at = 0.0  # when the first workers of the run were ready
        self._others_at: float | None = None  # when others than workers were started, to wait for the next run

    def options(self, node: str) -> dict[str, Any]:
        """Options of an actor on this node."""
        return {} if self._forks is None else self._forks.options(node)

    def look(self, trained: Mapping[str, list[Any]]) -> None:
        """Have servers on these nodes, each with the actors of workers there that have trained."""
        if self._forks is None:
            return
        self._first_at = self._first_at or (time.monotonic() if trained else 0.0)
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
        now, known = time.monotonic(), bool(self._asked) and not any(self._asked.values())
        if self._others_at is None and known and now > self._first_at + OTHERS_S:
            self._others_at = now
            self._try_to_start({})

    def close(self) -> None:
        """The workers of the run have ended: have as many that wait for the next one."""
        if self._forks is None or not self._most:
            return
        if self._others_at is not None and time.monotonic() - self._others_at > self._forks.idle_s:
            self._others_at = None  # they have not waited for so long
        self._try_to_start(self._most)

    def _try_to_start(self, most: Mapping[str, int]) -> None:
        """Start so many workers on each node that wait for the next run, and what it needs besides, unless done."""
        if self._forks is None or not self._forks.ahead:
            return
        try:
            self._start_ahead(self._forks, most, time.monotonic() + AHEAD_S)
        except (ray.exceptions.RayError, RuntimeError, OSError) as error:  # it is no fault of this run
            print(f"not all workers that could wait for the next run do: {one_line(error)}")

    def _start_ahead(self, forks: Forks, most: Mapping[str, int], deadline: float) -> None:
        here = ray.get_runtime_context().get_node_id()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        # so the next run's controller is a fork, and what it makes has its environment
        everywhere = forks.besides > 0 and forks.has(node["NodeID"] for node in nodes)
        besides = forks.besides - (not everywhere)  # no worker waits in vain for a controller
        for node in nodes:
            name = node["NodeID"]
            # how many, and whether the next run's controller makes them
            wanted = [(most[name] + self._vaults, everywhere)] if most.get(name) else []
            if name == here and besides > 0 and (not most or self._others_at is None):
                wanted.append((besides, False))
            if not wanted or not (options := forks.options(name)):
                continue
            address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
            for count, of_actors in wanted:
                if (left_s := deadline - time.monotonic()) <= 0:
                    return
                prestart_workers(address, options["runtime_env"], count, forks.idle_s, left_s, of_actors=of_actors)
