"""From the command to the first step, and from the last step to the prompt: here and in stock Ray Train, by phase, and
the CPU time by process.

    python -m jobs.bench.start [--pairs 3] [--standing] [--alone] [--json FILE]

The runs alternate. Wall time says little on a machine that does other work; CPU time up to the first step does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.storage import Storage
from jobs.bench.cpu import CpuTimes
from jobs.bench.nodes import OBJECT_STORE_BYTES, raylet_pid
from jobs.bench.report import median, table, write_json

WORKERS = 2
RUNS = 3  # on one standing cluster, of which the first finds no process of ours
SETTLE_S = 15.0  # then nothing of the last run is under way
SHORT_STEPS = 3
STANDING_STEPS = 100  # some 10 s: what the next run needs is started ahead after some seconds of a run
PARTS = ("import_s", "data_s", "model_s")


def start_here(folder: Path, address: str | None, standing: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase, and CPU seconds by process up to the first applied step."""
    name = f"start-{os.urandom(3).hex()}"
    storage = Storage(str(folder / name))
    command = [sys.executable, "-m", "jobs.codegpt", "--run.storage", str(folder), "--run.name", name]
    steps = SHORT_STEPS if address is None else STANDING_STEPS
    command += ["--run.duration", f"{steps}st", "--scaling.max-workers", str(WORKERS), "--job.eval-blocks", "8"]
    command += ["--cluster.address", address] if address else []
    began, ended, cpu = _run(command, folder / name / "metrics.jsonl", standing)
    events = {e["kind"]: e for e in read_records(storage, EVENTS)}
    rows = [r for r in read_records(storage, METRICS) if "sample_hash" in r]
    warm, cluster_s = events["worker_warm"], events["run_started"]["detail"]["cluster_s"]
    started, parts = events["run_started"]["time"], warm["detail"]
    return {
        "imports, data length": started - began - cluster_s,
        "cluster": cluster_s,
        "workers": warm["time"] - started - warm["seconds"],
        "worker imports": parts["import_s"],
        "data": parts["data_s"],
        "model": parts["model_s"],
        "world and first step": rows[0]["time"] - warm["time"] + warm["seconds"] - sum(parts[k] for k in PARTS),
        "total": rows[0]["time"] - began,
        "last step to prompt": ended - rows[-1]["time"],
    }, cpu


def start_stock(
    folder: Path, address: str | None, standing: Sequence[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """The same for stock Ray Train's TorchTrainer."""
    out = folder / "stock.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "jobs.bench.stock_start", str(out), str(folder / "stock"), str(WORKERS)]
    command += [address] if address else []
    began, ended, cpu = _run(command, out, standing)
    at = json.loads(out.read_text())
    return {
        "imports, data length": at["imported"] - began,
        "cluster": at["cluster"] - at["imported"],
        "workers": at["entered"] - at["cluster"],
        "worker imports": at["worker_imported"] - at["entered"],
        "data": at["data"] - at["worker_imported"],
        "model": at["model"] - at["data"],
        "world and first step": at["first_step"] - at["model"],
        "total": at["first_step"] - began,
        "last step to prompt": ended - at["last_step"],
    }, cpu


def _run(command: list[str], sign: Path, standing: Sequence[int]) -> tuple[float, float, dict[str, float]]:
    """Run it to its end: when it began and ended, and the CPU seconds of its processes until a file was there."""
    began = time.time()
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with CpuTimes(standing) as cpu:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        cpu.roots.append(process.pid)
        found: dict[str, float] = {}
        while process.poll() is None:
            if not found and sign.exists() and sign.stat().st_size:
                found = cpu.by_process()
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return began, time.time(), found


def _standing(ending: ExitStack) -> tuple[str, list[int]]:
    """A cluster of one head, as `ray start --head` starts it, with the workers that Ray starts ahead."""
    from elastic.compat.ray import local_cluster

    cluster = local_cluster(num_cpus=WORKERS, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    ending.callback(cluster.shutdown)
    time.sleep(SETTLE_S)
    return str(cluster.address), [raylet_pid(cluster.head_node)]


def measure(pairs: int, *, standing: bool, alone: bool) -> dict[str, Any]:
    """Interleaved starts of a run here and of stock Ray Train."""
    runs: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="elastic-bench-")))
        roots: list[int] = []
        address: str | None = None
        for pair in range(pairs):
            if standing and pair % RUNS == 0:
                ending.close()
                folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="elastic-bench-")))
                address, roots = _standing(ending)
            who = "here" if not standing else "here, first run" if pair % RUNS == 0 else "here, later runs"
            runs.setdefault(who, []).append(start_here(folder, address, roots))
            if standing:
                time.sleep(SETTLE_S)
            if not alone:
                runs.setdefault("stock Ray Train", []).append(start_stock(folder, address, roots))
            print(
                f"start {pair + 1}/{pairs}: "
                + ", ".join(f"{who} {r[-1][0]['total']:.1f} s, {r[-1][1]['all']:.1f} CPU s" for who, r in runs.items()),
                file=sys.stderr,
            )
    first = next(iter(runs.values()))
    phases = [[phase, *(median(r[0][phase] for r in found) for found in runs.values())] for phase in first[0][0]]
    print(f"\nseconds from the command to the first step, medians of {pairs} {'standing' if standing else 'embedded'}")
    print(table(["phase", *runs], phases))
    names = list(dict.fromkeys(name for found in runs.values() for r in found for name in r[1]))
    names.sort(key=lambda name: -max(median(r[1].get(name, 0.0) for r in found) for found in runs.values()))
    cpu = [[name, *(median(r[1].get(name, 0.0) for r in found) for found in runs.values())] for name in names]
    print("\nCPU seconds until the first step")
    print(table(["process", *runs], cpu))
    return {"phases": phases, "cpu": cpu, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--standing", action="store_true", help=f"on a cluster that runs already, a new one after {RUNS} pairs"
    )
    parser.add_argument("--alone", action="store_true", help="without stock Ray Train")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    write_json(arguments.json, measure(arguments.pairs, standing=arguments.standing, alone=arguments.alone))


if __name__ == "__main__":
    main()
