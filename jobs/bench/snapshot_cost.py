"""What snapshots cost in steps without a fault, within one run: blocks of steps with them and without, in turns."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic.config import (
    BatchOptions,
    ObserveOptions,
    ParallelOptions,
    RecoveryOptions,
    RunOptions,
    ScalingOptions,
    TrainConfig,
)
from elastic.observe.ledger import EVENTS, read_records
from elastic.run.prepare import prepare
from elastic.worker.local import LocalRun
from jobs.bench.report import median
from jobs.bench.steady import CONFIG, Steady
from jobs.codegpt import CodeGPT

BLOCK_STEPS = 40
WARM_BLOCKS = 2
WORKERS = 2  # on nodes of their own
WIDTH = 1500  # 30 MB of state


def alternate(times: str) -> None:
    """Make this worker take snapshots in every other block of steps only.

    Each step's end, and whether snapshots are taken, goes to a file of rank 0; so does the number of steps between
    them, which `auto` finds.
    """
    from elastic.worker.flags import Flags
    from elastic.worker.snapshots import Snapshots
    from elastic.worker.world import World

    taking, step_of = Snapshots._take_if_due, World.take_step
    file = open(times, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def on(step: int) -> bool:
        return step // BLOCK_STEPS % 2 == 1

    def take(self: Any, step: int, seconds: float) -> None:
        if on(step):
            taking(self, step, seconds)
        else:
            self._meter.step(seconds, under_way=self._attempt is not None)

    def step(world: World) -> Flags:
        found = step_of(world)
        if world.group.rank == 0:
            file.write(f"{world.step} {time.perf_counter()} {world.worker.snapshots._agreed_every}\n")
        return found

    Snapshots._take_if_due, World.take_step = take, step  # type: ignore[method-assign]


@dataclass
class Computing(CodeGPT):
    """The main job without evaluation: its steps keep every core busy."""

    times: str = field(default="", metadata={"help": "file for the time of each step"})

    def eval_data(self) -> None:
        return None

    def model(self) -> Any:
        alternate(self.times)
        return super().model()


@dataclass
class Waiting(Steady):
    """Steps that mostly wait, as steps on an accelerator do: what is added to them is time, not work."""

    times: str = field(default="", metadata={"help": "file for the time of each step"})

    def model(self) -> Any:
        alternate(self.times)
        return super().model()


def measure(kind: str, every: str, pairs: int) -> dict[str, Any]:
    """Seconds a step without snapshots, and by what share a block with them is slower than the one before, in each
    pair of blocks."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        times = Path(name) / "times"
        steps = BLOCK_STEPS * (WARM_BLOCKS + 2 * pairs) + 1
        job: Any = Waiting(pause=0.02, width=WIDTH, times=str(times))
        config = replace(CONFIG, batch=BatchOptions(global_size=24, microbatches=4))
        if kind == "computing":
            job = Computing(size="0.5M", block=128, times=str(times))
            config = TrainConfig(batch=BatchOptions(global_size=8, microbatches=2))
        config = replace(
            config,
            run=RunOptions(storage=name, duration=f"{steps}st"),
            observe=ObserveOptions(tensorboard=False),
            parallel=ParallelOptions(strategy="fsdp"),
            recovery=RecoveryOptions(snapshot_every=every),
            scaling=ScalingOptions(max_workers=WORKERS, workers_per_node=1),
        )
        run = prepare(job, config)
        with LocalRun(run, WORKERS, environment={"OMP_NUM_THREADS": "1"}) as local:
            local.wait(1200)
        rows = [line.split() for line in times.read_text().splitlines()]
        planned = next(e for e in read_records(run.folder.storage, EVENTS) if e["kind"] == "snapshots_planned")
        skipped = [e for e in read_records(run.folder.storage, EVENTS) if e["kind"] == "snapshot_skipped"]
    end = {int(step): float(at) for step, at, _ in rows}
    last = {int(step): int(k) for step, _, k in rows}
    blocks = [end[(b + 1) * BLOCK_STEPS] - end[b * BLOCK_STEPS] for b in range(WARM_BLOCKS, WARM_BLOCKS + 2 * pairs)]
    shares = [on / off - 1 for off, on in zip(blocks[::2], blocks[1::2], strict=True)]
    return {
        "step_s": median(blocks[::2]) / BLOCK_STEPS,
        "every": last[max(last)],
        "shares": shares,
        "node_mib": max(planned["detail"]["bytes"].values()) / 2**20,
        "skipped": len(skipped),
    }
