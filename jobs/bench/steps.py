"""Samples/s and peak memory of the main job's steps: here, and in a bare loop under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from elastic.config import (
    BatchOptions,
    ObserveOptions,
    OptimOptions,
    ParallelOptions,
    RunOptions,
    ScalingOptions,
    TrainConfig,
)
from elastic.observe.ledger import METRICS, read_records
from elastic.run.prepare import prepare
from elastic.worker.local import LocalRun
from jobs.bench.report import PeakMemory, median
from jobs.codegpt import CodeGPT

BLOCK = 128
WARM_STEPS = 5


class StepsAlone(CodeGPT):
    """The main job without evaluation."""

    def eval_data(self) -> None:
        return None


def torchrun(module: str, workers: int, *arguments: str, timeout_s: float = 600) -> None:
    """Run a module in so many processes of torchrun, each with one thread.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    subprocess.run(
        [*command, "-m", module, *arguments],
        check=True,
        timeout=timeout_s,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def bare(folder: Path, module: str, workers: int, *, global_size: int, **options: int | str) -> dict[str, float]:
    """Return samples/s and peak MiB of a bare loop. `options` are the module's."""
    out = folder / "bare.json"
    named = {"global_size": global_size, "block": BLOCK, "out": out, **options}
    torchrun(module, workers, *(t for k, v in named.items() for t in ("--" + k.replace("_", "-"), str(v))))
    found = json.loads(out.read_text())
    return {"rate": rate(found["times"], global_size), "peak_mib": found["peak_mib"]}


def here(
    folder: Path,
    workers: int,
    *,
    steps: int,
    size: str,
    global_size: int,
    microbatches: int,
    exactness: str,
    strategy: str = "ddp",
    tensor: int = 1,
    pipeline: int = 1,
    workers_per_node: int | None = None,
) -> dict[str, float]:
    """Return samples/s and peak MiB of a run here, in plain processes like the bare loop."""
    config = TrainConfig(
        run=RunOptions(storage=str(folder), duration=f"{steps}st", exactness=exactness),  # type: ignore[arg-type]
        batch=BatchOptions(global_size=global_size, microbatches=microbatches),
        optim=OptimOptions(clip_norm=1.0),
        parallel=ParallelOptions(strategy=strategy, tensor=tensor, pipeline=pipeline),  # type: ignore[arg-type]
        scaling=ScalingOptions(max_workers=workers, workers_per_node=workers_per_node),
        observe=ObserveOptions(tensorboard=False),
    )
    run = prepare(StepsAlone(size=size, block=BLOCK, tied=pipeline == 1), config)
    with LocalRun(run, workers, environment={"OMP_NUM_THREADS": "1"}) as local:
        memory = PeakMemory(lambda: [p.pid for p in local.processes])
        local.wait(600)
        peak = memory.close()
    rows = read_records(run.folder.storage, METRICS)
    return {"rate": rate([r["time"] for r in rows if "sample_hash" in r], global_size), "peak_mib": peak}


def rate(times: list[float], global_size: int) -> float:
    """Return the samples/s of the median step after warm-up, from the times of steps in seconds."""
    gaps = [b - a for a, b in zip(times[WARM_STEPS:], times[WARM_STEPS + 1 :], strict=False)]
    return global_size / median(gaps)
