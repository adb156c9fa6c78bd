"""`elastic doctor --address`: runs the tests of `elastic.tools.machine` on every node of a cluster, and further ones
between all pairs of nodes."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from elastic.cluster.autoscaler import failures, known_reasons, reported, unserved
from elastic.cluster.embedded import check_answers, running_cluster
from elastic.cluster.gcs import take_own_token
from elastic.compat.ray import Autoscaling, session_folder
from elastic.errors import ConfigError
from elastic.tools.machine import (
    REDUCE_S,
    START_S,
    Finding,
    Prober,
    Unanswered,
    examine_computing,
    facts,
    free_port,
    judge_clock,
    judge_machine,
    judge_reduce,
    judge_versions,
)
from elastic.tools.storing import examine_storage
from elastic.worker.sockets import interface_of

REACH_S = 5.0
MOST_PAIRED = 32  # nodes; in larger clusters only the sum over all nodes is tested


class Examiner:
    """Runs on each node: examines it, and takes part in the tests between nodes."""

    def __init__(self, gpus: int):
        self._gpus = gpus
        self._address = ray.util.get_node_ip_address()
        self._prober = Prober({"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))})
        self._listening: socket.socket | None = None

    def facts(self) -> dict[str, Any]:
        return facts()

    def clock(self) -> float:
        return time.time()

    def compute(self, where: str) -> list[Finding]:
        return examine_computing(where, self._prober, self._gpus)

    def storage(self, url: str) -> list[Finding]:
        return examine_storage(url)

    def listen(self) -> tuple[str, int]:
        """Open a port for the other nodes to reach; returns its host and port."""
        self._listening = socket.create_server((self._address, 0))
        return self._address, self._listening.getsockname()[1]

    def reach(self, host: str, port: int) -> str | None:
        """Why this node cannot reach that port; None if it can."""
        try:
            socket.create_connection((host, port), REACH_S).close()
        except OSError as error:
            return f"{host}:{port}: {error or type(error).__name__}"
        return None

    def store(self) -> tuple[str, int]:
        """Host and port for a rendezvous store on this node."""
        return self._address, free_port(self._address)

    def reduce(self, rank: int, size: int, store: tuple[str, int]) -> dict[str, Any]:
        """Take part in a sum over nodes; returns the prober's answer, or `error`."""
        interface = interface_of(self._address)
        try:
            return self._prober.ask(
                START_S + REDUCE_S,
                do="reduce",
                rank=rank,
                size=size,
                store=store,
                interface=interface or "",
                timeout_s=REDUCE_S,
            )
        except Unanswered as why:
            return {"error": str(why)}

    def close(self) -> None:
        """End the prober."""
        if self._listening is not None:
            self._listening.close()
        self._prober.__exit__(None, None, None)


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """All pairs of names, in the fewest rounds in which no name is in two pairs (circle method)."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    half, found = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return [pairs for pairs in found if pairs]


def examine_cluster(address: str, storage: Sequence[str]) -> list[Finding]:
    """Examine every living node of the cluster at `address`.

    Raises:
        ConfigError: no cluster answers there.
    """
    ours = not ray.is_initialized()
    if ours:
        if address == "auto":
            address = running_cluster(None) or ""
            if not address:
                raise ConfigError("--address is 'auto', but no Ray cluster runs on this machine; give that of its head")
            take_own_token()
        check_answers(address, option="--address")
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--address is {address!r}, where no cluster answers ({error}); give that of a running one"
            ) from error
    examination = _Examination()
    try:
        return examination.run(storage)
    finally:
        examination.close()
        if ours:
            ray.shutdown()


def judge_autoscaler(where: str, report: Autoscaling, reasons: Mapping[str, str]) -> list[Finding]:
    """Findings about nodes that the autoscaler could not start lately, and about requests that it can never serve."""
    do = "see monitor.log in Ray's folder on the head; docs/clusters.md lists the permissions that it needs"
    found = [Finding("autoscaler", where, "fail", why, do) for why in failures(report, reasons)]
    do = "give the cluster a larger type of node, or more nodes; or have the run, or whatever asks, ask for less"
    return [*found, *(Finding("autoscaler", where, "warn", what, do) for what in unserved(report))]


class _Examination:
    """The examiners of a cluster, by a readable name of their node, and their findings."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._found: list[Finding] = []
        self._home = ""

    def run(self, storage: Sequence[str]) -> list[Finding]:
        head = ray.get_runtime_context().gcs_address
        self._found += judge_autoscaler(head, reported(head), known_reasons(session_folder()))
        seen = self._start()
        self._found += judge_versions({where: s["versions"] for where, s in seen.items()})
        for where, s in seen.items():
            self._found += judge_machine(where, s)
            self._found.append(self._clock_of(where))
        self._reach()
        for findings in self._ask_all(lambda where, actor: actor.compute.remote(where), 2 * START_S).values():
            self._found += findings
        for round_ in rounds(list(self._actors)) if len(self._actors) <= MOST_PAIRED else ():
            self._reduce(round_)
        if len(self._actors) > 2:
            self._reduce([tuple(self._actors)])
        for url in storage:
            self._store(url)
        return self._found

    def _start(self) -> dict[str, dict[str, Any]]:
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["Alive"]:
                name = f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}"
                selector = {"ray.io/node-id": node["NodeID"]}
                actor: Any = ray.remote(num_cpus=0, label_selector=selector)(Examiner)
                self._actors[name] = actor.remote(int(node["Resources"].get("GPU", 0)))
                self._home = name if node["NodeID"] == here else self._home
        return self._ask_all(lambda _, actor: actor.facts.remote(), START_S)

    def _ask_all(self, ask: Callable[[str, Any], Any], timeout_s: float) -> dict[str, Any]:
        """The answers of all nodes by name. A node that does not answer is a finding, and is not asked again."""
        asked = {where: ask(where, actor) for where, actor in self._actors.items()}
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
        answers = {}
        for where, answer in asked.items():
            try:
                if answer not in ready:
                    raise TimeoutError(f"no answer within {timeout_s:g} s")
                answers[where] = ray.get(answer)
            except (ray.exceptions.RayError, TimeoutError) as error:
                words = " ".join(str(error).split())[-300:]
                do = (
                    "give all nodes one image with the same elastic-train, ray and torch (cluster.yaml: setup_commands)"
                )
                self._found.append(Finding("node", where, "fail", f"cannot be examined: {words}", do))
                ray.kill(self._actors.pop(where))
        return answers

    def _clock_of(self, where: str) -> Finding:
        began = time.time()
        then = ray.get(self._actors[where].clock.remote(), timeout=START_S)
        ended = time.time()
        return judge_clock(where, then - (began + ended) / 2, (ended - began) / 2)

    def _reach(self) -> None:
        """Test that every node reaches a port of the driver's node, where the run's server will be."""
        if self._home not in self._actors:
            return  # it could not be examined, which is a finding already
        host, port = ray.get(self._actors[self._home].listen.remote(), timeout=START_S)
        for where, problem in self._ask_all(lambda _, actor: actor.reach.remote(host, port), START_S).items():
            do = f"open all TCP ports of {host} to the nodes of the cluster" if problem else ""
            state: Any = "fail" if problem else "ok"
            self._found.append(Finding("ports", where, state, problem or f"reaches the driver's node {host}", do))

    def _store(self, url: str) -> None:
        for where, findings in self._ask_all(lambda _, actor: actor.storage.remote(url), START_S).items():
            self._found += [replace(f, where=f"{where}: {f.where}") for f in findings]

    def _reduce(self, groups: Sequence[tuple[str, ...]]) -> None:
        """Run a sum over each of these groups, all at the same time."""
        asked = []
        for names in groups:
            store = ray.get(self._actors[names[0]].store.remote(), timeout=START_S)
            asked.append([self._actors[n].reduce.remote(rank, len(names), store) for rank, n in enumerate(names)])
        for names, pending in zip(groups, asked, strict=True):
            where = " - ".join(names) if len(names) == 2 else f"all {len(names)} nodes"
            try:
                answers = ray.get(pending, timeout=START_S + 2 * REDUCE_S)
                failed = [a["error"] for a in answers if "error" in a]
            except ray.exceptions.RayError as error:  # a time-out is a RayError too
                answers, failed = [], [" ".join(str(error).split())[-300:]]
            self._found.append(judge_reduce(where, answers, failed))

    def close(self) -> None:
        """End all examiners and their probers."""
        endings = [actor.close.remote() for actor in self._actors.values()]
        if endings:
            ray.wait(endings, num_returns=len(endings), timeout=REDUCE_S)
        for actor in self._actors.values():
            ray.kill(actor)
