"""Kills and joins of this trainer: on a Ray cluster of three nodes, and in plain processes.

A worker that was killed is replaced, so each kill is followed by a join, whose stall is measured too.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic.config import RunOptions, ScalingOptions
from elastic.run.prepare import prepare
from elastic.storage import Storage
from elastic.worker.local import LocalRun
from jobs.bench.nodes import Command, LocalCluster
from jobs.bench.peers.notes import PAUSE_S, WARM_STEPS, any_moment, children
from jobs.bench.stalls import Ledger
from jobs.bench.steady import CONFIG, WIDTH, Steady

WORKERS = 3
#: A worker of three runs a third of the microbatches, and waits in each.
MICROBATCH_PAUSE_S = PAUSE_S * WORKERS / (CONFIG.batch.microbatches or WORKERS)
_WORLD = re.compile(r"world formed world 1-(\d+) size=(\d+) pids=\[(.*?)\]")


@dataclass
class Found:
    """Recoveries by what was killed, and joins, as `stalls.Ledger` gives them; `normal_s` is a step of three."""

    process: list[dict[str, float]] = field(default_factory=list)
    node: list[dict[str, float]] = field(default_factory=list)
    join: list[dict[str, float]] = field(default_factory=list)
    normal_s: float = 0.0


def on_ray(folder: Path, kills: int, node_kills: int) -> Found:
    """Kill processes, then nodes, of one run; each time wait until three workers train again."""
    cluster = LocalCluster(nodes=WORKERS, cpus=1)
    killed: list[tuple[str, float, set[int]]] = []
    try:
        run = Command(
            "-m",
            "jobs.bench.steady",
            "--cluster.address",
            cluster.address,
            "--run.storage",
            str(folder),
            "--run.name",
            "here",
            "--run.duration",
            "1000000st",
            "--scaling.max-workers",
            str(WORKERS),
            "--run.exactness",
            "bitwise",
            "--job.pause",
            str(MICROBATCH_PAUSE_S),
            "--observe.log-every",
            "0.2",
        )
        number, pids = _next_world(run, WORKERS, 0)
        for i in range(kills + node_kills):
            run.wait_for_step(_step(run) + WARM_STEPS)
            any_moment(i)
            if i < kills:
                killed.append(("process", time.time(), {pids[i % WORKERS]}))
                os.kill(pids[i % WORKERS], signal.SIGKILL)
            else:
                node = cluster.nodes[0]
                on_node = {p for entry in node.all_processes["raylet"] for p in children(entry.process.pid)}
                killed.append(("node", time.time(), on_node & set(pids)))
                cluster.kill_node(node)
                at = _step(run)
                _next_world(run, WORKERS - 1, number)
                run.wait_for_step(at + WARM_STEPS)  # a node that starts takes the processors from the first step
                cluster.add_node()
            number, pids = _next_world(run, WORKERS, number)
        run.wait_for_step(_step(run) + WARM_STEPS)
        run.signal(signal.SIGINT)
        run.wait()
    finally:
        cluster.close()
    return _found(Storage(str(folder / "here")), killed)


def _found(storage: Storage, killed: list[tuple[str, float, set[int]]]) -> Found:
    ledger = Ledger(storage)
    found = Found(join=ledger.joins(WORKERS), normal_s=ledger.normal_s(WORKERS))
    for kind, at, dead in killed:
        getattr(found, kind).append(ledger.recovery(at, dead, WORKERS))
    return found


def _next_world(run: Command, size: int, after: int) -> tuple[int, list[int]]:
    """Number and process ids of the first world of this size that is newer."""

    def parsed(line: str) -> tuple[int, list[int]] | None:
        match = _WORLD.search(line)
        fits = match and int(match[1]) > after and int(match[2]) == size
        return (int(match[1]), [int(p) for p in match[3].split(",")]) if match and fits else None

    world = parsed(run.wait_for(lambda line: parsed(line) is not None, 120))
    assert world is not None
    return world


def _step(run: Command) -> int:
    lines = [line for line in list(run.lines) if line.startswith("step ")]
    return int(lines[-1].split()[1].split("/")[0]) if lines else 0


class _Follow:
    """The worlds of a run and how many steps each has applied, as they come."""

    def __init__(self) -> None:
        self._worlds: dict[int, list[int]] = {}
        self._steps: Counter[int] = Counter()
        self.step_s = PAUSE_S  # of the newest step
        self._came = threading.Condition()

    def __call__(self, record: dict[str, Any]) -> None:
        with self._came:
            if "sample_hash" in record:
                self._steps[_number(record)] += 1
                self.step_s = record["step_s"]
            elif record.get("kind") == "world_formed":
                self._worlds[_number(record)] = record["detail"]["pids"]
            self._came.notify_all()

    def world(self, size: int, steps: int) -> list[int]:
        """Wait until the newest world has this size and has applied so many steps; its process ids."""

        def there() -> bool:
            newest = max(self._worlds, default=0)
            return len(self._worlds.get(newest, ())) == size and self._steps[newest] >= steps

        with self._came:
            if not self._came.wait_for(there, 300):
                raise TimeoutError(f"waited 300 s for {steps} steps of a world of {size}")
            return self._worlds[max(self._worlds)]


def _number(record: dict[str, Any]) -> int:
    return int(record["generation"].split("-")[1])


def in_processes(
    folder: Path, kills: int, *, width: int = WIDTH, exactness: str = "bitwise", steps: int = WARM_STEPS
) -> Found:
    """Kill one of three plain processes and start another, `kills` times.

    Args:
        width: of the model, which makes the size of its state.
        steps: of each world, before the next kill or join.
    """
    config = replace(
        CONFIG,
        run=RunOptions(storage=str(folder), duration="1000000st", exactness=exactness),  # type: ignore[arg-type]
        scaling=ScalingOptions(max_workers=WORKERS),
    )
    run, follow = prepare(Steady(pause=MICROBATCH_PAUSE_S, width=width), config), _Follow()
    killed: list[tuple[str, float, set[int]]] = []
    with LocalRun(run, WORKERS, on_record=follow, environment={"OMP_NUM_THREADS": "1"}) as local:
        for i in range(kills):
            pid = follow.world(WORKERS, steps)[i % WORKERS]
            any_moment(i, follow.step_s)
            killed.append(("process", time.time(), {pid}))
            os.kill(pid, signal.SIGKILL)
            follow.world(WORKERS - 1, steps)
            local.add_worker()
        follow.world(WORKERS, steps)
        local.stop()
        local.wait(120)
    return _found(run.folder.storage, killed)
