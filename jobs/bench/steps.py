"""Samples/s and peak memory of the main job's steps: here, and in a bare loop under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


CPU_FOLDER = "ELASTIC_BENCH_CPU_FOLDER"  # where workers note their processors' seconds after each step


class StepsAlone(CodeGPT):
    """The main job without evaluation."""

    def eval_data(self) -> None:
        return None

    def after_step(self, model: Any, step: int) -> None:
        if folder := os.environ.get(CPU_FOLDER):
            with (Path(folder) / str(os.getpid())).open("a") as notes:
                notes.write(f"{time.process_time()}\n")


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
    cpu_s = a_step(found["cpu"]) if "cpu" in found else float("nan")
    return {"rate": rate(found["times"], global_size), "peak_mib": found["peak_mib"], "cpu_s": cpu_s}


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
    notes = Path(tempfile.mkdtemp(prefix="cpu-", dir=folder))
    with LocalRun(run, workers, environment={"OMP_NUM_THREADS": "1", CPU_FOLDER: str(notes)}) as local:
        memory = PeakMemory(lambda: [p.pid for p in local.processes])
        local.wait(600)
        peak = memory.close()
    rows = read_records(run.folder.storage, METRICS)
    cpu_s = median(a_step([float(line) for line in one.read_text().split()]) for one in notes.iterdir())
    times = [r["time"] for r in rows if "sample_hash" in r]
    return {"rate": rate(times, global_size), "peak_mib": peak, "cpu_s": cpu_s}


def a_step(seconds: list[float]) -> float:
    """Return the mean of what each step after warm-up added to a count of seconds."""
    return (seconds[-1] - seconds[WARM_STEPS]) / (len(seconds) - 1 - WARM_STEPS)


def rate(times: list[float], global_size: int) -> float:
    """Return the samples/s of the median step after warm-up, from the times of steps in seconds."""
    gaps = [b - a for a, b in zip(times[WARM_STEPS:], times[WARM_STEPS + 1 :], strict=False)]
    return global_size / median(gaps)
