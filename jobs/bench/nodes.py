"""Ray clusters of several nodes on this machine, and commands run against them: for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

OBJECT_STORE_BYTES = 100 * 1024 * 1024
REPOSITORY = Path(__file__).parent.parent.parent


class LocalCluster:
    """A head without work, and worker nodes that can be killed, drained and added.

    Args:
        of_nodes: what else Ray is told of each node, by the names of its `RayParams`.
    """

    def __init__(
        self, nodes: int = 3, cpus: int = 2, *, dashboard: bool = False, of_nodes: Mapping[str, Any] | None = None
    ):
        from elastic.compat.ray import local_cluster

        self._cpus = cpus
        self._of_nodes = {"object_store_memory": OBJECT_STORE_BYTES, **(of_nodes or {})}
        self._cluster = local_cluster(num_cpus=0, include_dashboard=dashboard, **self._of_nodes)
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add_node()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def session_folder(self) -> str:
        """Where Ray keeps the files of this cluster."""
        return str(self._cluster.head_node.get_session_dir_path())

    def add_node(self, gpus: int = 0) -> Any:
        """A new node; its GPUs, if any, are only counted."""
        node = self._cluster.add_node(num_cpus=self._cpus, num_gpus=gpus, **self._of_nodes)
        self.nodes.append(node)
        return node

    def kill_node(self, node: Any) -> None:
        """SIGKILL of the raylet; its workers die with it."""
        self.kill_nodes([node])

    def kill_nodes(self, nodes: list[Any]) -> None:
        """The same, of several nodes at one moment."""
        for node in nodes:
            self.nodes.remove(node)
            os.kill(raylet_pid(node), signal.SIGKILL)
        for node in nodes:
            self._cluster.remove_node(node, allow_graceful=False)

    def wait_until_known_dead(self, nodes: list[Any], timeout_s: float = 60.0) -> None:
        """Until the cluster no longer counts what these nodes had; it finds a killed one by its missing heartbeats."""
        ids, deadline = {node.node_id for node in nodes}, time.monotonic() + timeout_s
        while ids & {node["NodeID"] for node in self._cluster.global_state.node_table() if node["Alive"]}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout_s:g} s the cluster still counts nodes that were killed")
            time.sleep(0.1)

    def workers_of(self, node: Any) -> list[int]:
        """The pids of the processes that the node's raylet started."""
        return list(map(int, Path(f"/proc/{raylet_pid(node)}/task/{raylet_pid(node)}/children").read_text().split()))

    def drain_node(self, node: Any, deadline_s: int) -> None:
        """What a cloud's notice becomes: the node is to go away at the deadline."""
        self.nodes.remove(node)
        subprocess.run(
            [
                "ray",
                "drain-node",
                "--address",
                self.address,
                "--node-id",
                node.node_id,
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message",
                "test",
                "--deadline-remaining-seconds",
                str(deadline_s),
            ],
            check=True,
            timeout=60,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )

    def close(self) -> None:
        self._cluster.shutdown()


def raylet_pid(node: Any) -> int:
    (entry,) = node.all_processes["raylet"]
    return int(entry.process.pid)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Command:
    """A command under way, whose lines can be waited for."""

    started: ClassVar[list[Command]] = []  # for whoever cleans up after a failure

    def __init__(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        show: bool = False,
        under: Sequence[str] = (),
        cwd: Path = REPOSITORY,
    ):
        """Start it. `show`: also print its lines; `under`: a command that runs it, in its own process."""
        self.lines: list[str] = []
        self._show = show
        self._changed, self._ended = threading.Condition(), False
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.process = self.start([*under, sys.executable, *arguments], cwd, variables)
        Command.started.append(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, command: list[str], cwd: Path, environment: dict[str, str]) -> Any:
        """The process, as `subprocess.Popen` makes it."""
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment
        )

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                if self._show:
                    print(self.lines[-1], flush=True)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, condition: Callable[[str], bool], timeout_s: float = 180.0) -> str:
        """The first line that fulfils the condition."""
        with self._changed:
            self._changed.wait_for(lambda: any(map(condition, self.lines)) or self._ended, timeout_s)
            line = next(filter(condition, self.lines), None)
        assert line is not None, f"the line never came in:\n{self.output}"
        return line

    def wait_for_step(self, step: int, timeout_s: float = 180.0) -> str:
        return self.wait_for(
            lambda line: line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step, timeout_s
        )

    def end(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 180.0) -> int:
        """The exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"did not end within {timeout_s} s:\n{self.output}") from None
        self._reader.join(10)
        return code


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())
