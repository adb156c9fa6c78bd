"""What tests on Ray share: commands with faults, the worlds that a run's console tells of, and a run's actors."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from elastic.config import TrainConfig
from elastic.job import Job
from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, read_records
from elastic.options import parse
from elastic.storage import Storage
from jobs.bench.nodes import Command, LocalCluster, raylet_pid, result
from tests import forked_actor, leaks
from tests.forked import train
from tests.forked_command import ForkedCommand
from tests.slow_job import CONFIG, Slow

SLOW_BATCH = 32  # of tests.slow_job


def slow_job(
    cluster: LocalCluster,
    storage: Path,
    name: str,
    *options: str,
    pause_s: float = 0.04,
    faults: Any = (),
    sick_node: str = "",
) -> Command:
    """A run of tests.slow_job in `bitwise`, whose workers have these faults planned, and fail on the sick node."""
    # its workers get them from Ray's runtime environment, as those of a submitted job do
    variables = {"SLOW_JOB_PAUSE_S": str(pause_s), "ELASTIC_FAULTS": json.dumps(list(faults))}
    variables |= {"SLOW_JOB_SICK_NODE": sick_node} if sick_node else {}
    return ForkedCommand(
        "-m",
        "tests.slow_job",
        "--cluster.address",
        cluster.address,
        "--run.storage",
        str(storage),
        "--run.name",
        name,
        "--run.exactness",
        "bitwise",
        "--observe.log-every",
        "0.05",
        *options,
        environment={**variables, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": variables}})},
    )


@contextmanager
def _small_agents() -> Iterator[None]:
    """The agents of nodes that start inside, for a dashboard, which there is not, are those of a Ray without one: the
    whole one takes two seconds of CPU time more, and a fiftieth of a CPU afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.utils.get_dashboard_dependency_error", ImportError)
        yield


class ForkingCluster(LocalCluster):
    """A cluster whose workers are forked from the server of `tests.forked`, so that each starts in a quarter of a
    second instead of several. Those of other clusters start as ever: tests.own_cluster.

    Args:
        folder: an empty one, for which worker is of which node.
    """

    def __init__(self, nodes: int, folder: Path):
        self._folder = folder
        address = forkserver._forkserver._forkserver_address
        variables = {forked_actor.SERVER: str(address), forked_actor.FOLDER: str(folder)}
        with _small_agents():
            super().__init__(nodes, of_nodes={"setup_worker_path": forked_actor.__file__, "env_vars": variables})

    def add_node(self, gpus: int = 0) -> Any:
        with _small_agents():
            return super().add_node(gpus)

    def workers_of(self, node: Any) -> list[int]:
        raylet = str(raylet_pid(node))
        return [int(file.name) for file in self._folder.iterdir() if file.name.isdigit() and file.read_text() == raylet]


def watcher(cluster: LocalCluster, node: Any, *options: str) -> Command:
    """`elastic node-watch` of a node that will not be there any more at the end."""
    cluster.nodes.remove(node)
    watch = ForkedCommand(
        "-m",
        "elastic.cli",
        "node-watch",
        "--address",
        cluster.address,
        "--node-id",
        node.node_id,
        "--poll",
        "0.2s",
        *options,
    )
    watch.wait_for(lambda line: "watching node" in line)
    return watch


class Story:
    """Reads a run's console: worlds as they are formed, with the process ids of their members."""

    def __init__(self, run: Command, epoch: int = 1):
        self.run, self._epoch, self._seen = run, epoch, 0

    @property
    def generation(self) -> str:
        """That of the newest world seen."""
        return f"{self._epoch}-{self._seen}"

    def next_world(self, *sizes: int) -> list[int]:
        """The pids of the next world of one of these sizes, by rank."""

        def parse(line: str) -> re.Match[str] | None:
            match = re.search(rf"world formed world {self._epoch}-(\d+) size=(\d+) pids=\[(.*?)\]", line)
            return match if match and int(match[1]) > self._seen and int(match[2]) in sizes else None

        match = parse(self.run.wait_for(lambda line: parse(line) is not None))
        assert match is not None
        self._seen = int(match[1])
        return list(map(int, match[3].split(",")))


def actor_pids(name: str) -> list[int]:
    """Living actor processes of this class on clusters that these tests started."""
    return [pid for pid, line in leaks.descendants(os.getpid()).items() if line.startswith(f"ray::{name}")]


def step_of(run: Command) -> int:
    """The newest step on the run's console."""
    steps = [line for line in run.output.splitlines() if line.startswith("step ")]
    return int(steps[-1].split()[1].split("/")[0])


def stop(run: Command, step: int, by: signal.Signals = signal.SIGINT) -> None:
    """Pause the run, with its state saved, after at least this step."""
    run.wait_for_step(step)
    run.signal(by)
    assert run.wait() == 130, run.output


def wait_until(condition: Callable[[], bool], timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.05)


def undisturbed(
    job_class: type[Job], defaults: TrainConfig, storage: Path, name: str, *options: str, steps: int
) -> str:
    """The hash of the same run in one plain process, or one cell, that nothing happens to, after so many steps."""
    job, config = parse(job_class, defaults, (*options, "--run.exactness", "bitwise", "--run.stop-after", f"{steps}st"))
    config = replace(
        config,
        run=replace(config.run, storage=str(storage), name=name),
        scaling=replace(config.scaling, min_workers=1),
        observe=replace(config.observe, tensorboard=False),
    )
    ran = train(job, config, workers=config.parallel.tensor, wait_s=120, beside_ray=True)
    assert ran.failure is None
    return ran.sha


def check_bits_and_samples(storage: Path, name: str, *options: str, redone: bool = False) -> list[dict[str, Any]]:
    """The stopped run has the hash of a plain process that nothing happened to, and each sample once; its events.

    Args:
        redone: its state was lost, so that steps since the newest checkpoint were done again.
    """
    found = result(storage / name)
    assert found["weights_sha256"] == undisturbed(Slow, CONFIG, storage / "twin", name, *options, steps=found["steps"])
    folder = Storage(str(storage / name))
    rows = read_records(folder, METRICS)
    assert gaps_and_doubles(rows, SLOW_BATCH) == []
    steps = [r["step"] for r in rows if "sample_hash" in r]
    assert redone or len(steps) == len(set(steps)), "a step was applied twice"
    return read_records(folder, EVENTS)
