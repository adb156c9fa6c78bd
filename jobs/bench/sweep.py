"""ASHA here, and with plain Ray Tune over `TorchTrainer`, on the same trials: wall time and steps.

    python -m jobs.bench.sweep [--trials 6] [--steps 360] [--parts quiet killed proofs] [--json FILE]

`quiet`: nothing happens; `killed`: a node is killed when the first trial has reported. Both have the same options in
each trial, the same batches, steps and evaluations, save at each evaluation, and run so many trials at a time on the
same nodes. Seconds are those of the sweep on a cluster that is there, from the first trial to the last.
`proofs` are longer versions of what the tests show: ASHA against the same trials without it and against the default
options, the same sweep twice with a node killed in one, and a population that loses a node.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, read_records
from elastic.storage import Storage
from elastic.sweep.space import draw, parse_search
from elastic.tools.sweeps import TRIALS, TrialRecord, read_trials
from jobs.bench.nodes import Command, LocalCluster, result
from jobs.bench.report import table, write_json

SEARCH = {"job.lr": "loguniform(3e-4,3e-2)", "job.width": "choice(8,16,32)"}
PARTS = ("quiet", "killed", "proofs")
BATCH, WARMUP = 64, 20
NODES, CPUS = 3, 2
LONGEST_S = 900.0
STOCK_LONGEST_S = 420.0  # more than five times what it takes when nothing happens


def settings_of(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both are told."""
    space = parse_search(SEARCH)
    return {
        "trials": [draw(space, 0, n) for n in range(arguments.trials)],
        "steps": arguments.steps,
        "every": arguments.steps // 9,
        "batch": BATCH,
        "warmup": WARMUP,
        "workers": arguments.workers,
        "concurrent": arguments.concurrent,
        "grace": 1,
        "factor": 3,
        "nodes": NODES,
        "cpus": CPUS,
        "folder": str(folder),
        "kill": False,
    }


def stock(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain Ray Tune, in a process of its own."""
    folder = Path(tempfile.mkdtemp(dir=settings["folder"]))
    (folder / "settings.json").write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        try:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "jobs.bench.peers.stock_tune",
                    str(folder / "settings.json"),
                    str(folder / "result.json"),
                ],
                timeout=STOCK_LONGEST_S,
                stdout=log,
                stderr=log,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},
            )
        except subprocess.TimeoutExpired:
            print(f"plain Ray Tune was given up after {STOCK_LONGEST_S:.0f} s; its last words:")
            print((folder / "log").read_text()[-2000:], flush=True)
            return {"seconds": STOCK_LONGEST_S, "steps": 0, "by_trial": [], "best": float("nan"), "failed": "not ended"}
    if not (folder / "result.json").exists():
        raise RuntimeError(f"plain Ray Tune did not come to an end:\n{(folder / 'log').read_text()[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def here(settings: dict[str, Any], name: str = "here", *more: str, scheduler: str = "asha") -> dict[str, Any]:
    """The same sweep here; `trials` are its records."""
    folder = Path(tempfile.mkdtemp(dir=settings["folder"]))
    options = [
        "--job",
        "jobs.digits",
        *[o for k, v in SEARCH.items() for o in ("--search", f"{k}={v}")],
        "--trials",
        str(len(settings["trials"])),
        "--scheduler",
        scheduler,
        "--metric",
        "eval/accuracy",
        "--mode",
        "max",
        "--grace-period",
        str(settings["grace"]),
        "--reduction-factor",
        str(settings["factor"]),
        "--max-concurrent",
        str(settings["concurrent"]),
        "--run.duration",
        f"{settings['steps']}st",
        "--eval.every",
        f"{settings['every']}st",
        "--checkpoint.every",
        f"{settings['every']}st",
        "--batch.global-size",
        str(settings["batch"]),
        "--optim.warmup",
        f"{settings['warmup']}st",
        "--optim.schedule",
        "constant",
        "--scaling.max-workers",
        str(settings["workers"]),
        "--observe.no-tensorboard",
        "--no-plots",
        *more,
    ]
    return sweep(folder, name, options, settings["nodes"], settings["cpus"], kill=settings["kill"])


def sweep(folder: Path, name: str, options: list[str], nodes: int, cpus: int, *, kill: bool) -> dict[str, Any]:
    """Run a sweep on a cluster of its own; `kill`: a node under the first trial that reports."""
    cluster = LocalCluster(nodes=nodes, cpus=cpus)
    try:
        run = Command(
            "-m",
            "jobs.sweep",
            "--cluster.address",
            cluster.address,
            "--run.storage",
            str(folder),
            "--sweep.name",
            name,
            *options,
        )
        if kill:
            threading.Thread(target=_kill, args=(cluster, folder / name, run), daemon=True).start()
        code = run.wait(LONGEST_S)
        if code:
            raise RuntimeError(f"the sweep ended with {code}:\n{run.output}")
    finally:
        cluster.close()
    values = json.loads((folder / name / "sweep.json").read_text())
    storage = Storage(str(folder / name))
    lines = read_records(storage, TRIALS)
    trials = read_trials(storage, values["metric"], values["mode"])
    return {
        "seconds": lines[-1]["time"] - lines[0]["time"],
        "steps": sum(t.step for t in trials),
        "by_trial": [t.step for t in trials],
        "best": values["best"]["value"],
        "trials": trials,
        "failed": sum(t.status == "failed" for t in trials),
        "folder": str(folder / name),
    }


def _kill(cluster: LocalCluster, folder: Path, run: Command) -> None:
    """The node of the newest worker of the first trial that reports."""
    while run.process.poll() is None:
        told = [line for line in read_records(Storage(str(folder)), TRIALS) if line["kind"] == "report"]
        if told:
            trial = folder / f"{folder.name}-{told[0]['trial']:04d}"
            warm = [e for e in read_records(Storage(str(trial)), EVENTS) if e["kind"] == "worker_warm"]
            cluster.kill_node(next(n for n in cluster.nodes if n.node_id == warm[-1]["node"]))
            return
        time.sleep(0.05)


def compare(settings: dict[str, Any]) -> dict[str, Any]:
    """Both in turn; prints a table, and returns all figures."""
    found = {"plain Ray Tune, TorchTrainer": stock(settings), "here": here(settings)}
    base = found["plain Ray Tune, TorchTrainer"]["seconds"]
    rows = [
        (who, f["seconds"], f["seconds"] / base, f["steps"], f"{f['best']:.4f}", f["failed"])
        for who, f in found.items()
    ]
    what = "a node killed" if settings["kill"] else "nothing happens"
    print(f"\n{what}\n" + table(("who", "seconds", "of plain", "steps", "best accuracy", "failed"), rows), flush=True)
    return {who: {k: v for k, v in f.items() if k != "trials"} for who, f in found.items()}


def _same(one: list[TrialRecord], other: list[TrialRecord]) -> bool:
    """Whether two sweeps had the same trials, with the same outcome to the last bit."""
    return [(t.options, t.status, t.step, t.weights_sha256) for t in one] == [
        (t.options, t.status, t.step, t.weights_sha256) for t in other
    ]


def proofs(settings: dict[str, Any]) -> dict[str, Any]:
    """What is promised of sweeps, with its figures."""
    exact = ("--run.exactness", "bitwise")
    asha = here(settings, "asha", *exact)
    whole = here(settings, "whole", *exact, scheduler="none")
    again = here({**settings, "kill": True}, "again", *exact)
    folder = Path(settings["folder"])
    default = Command(
        "-m",
        "elastic.worker",
        "--module",
        "jobs.digits",
        "--workers",
        "1",
        "--run.storage",
        str(folder),
        "--run.name",
        "default",
        *exact,
        "--run.duration",
        f"{settings['steps']}st",
        "--optim.schedule",
        "constant",
        "--optim.warmup",
        f"{settings['warmup']}st",
        "--batch.global-size",
        str(settings["batch"]),
    )
    if default.wait(LONGEST_S):
        raise RuntimeError(default.output)
    known = result(folder / "default")["metrics"]["eval/accuracy"]
    population = sweep(
        Path(tempfile.mkdtemp(dir=folder)),
        "people",
        [
            "--job",
            "jobs.codegpt",
            "--search",
            "job.lr=loguniform(1e-4,3e-2)",
            "--search",
            "job.weight-decay=uniform(0,0.3)",
            "--trials",
            "6",
            "--scheduler",
            "pbt",
            "--metric",
            "eval/bits_per_byte",
            "--job.block",
            "64",
            "--job.eval-blocks",
            "64",
            "--run.duration",
            "60st",
            "--eval.every",
            "15st",
            "--scaling.max-workers",
            "1",
            "--max-concurrent",
            "3",
            "--observe.no-tensorboard",
            "--no-plots",
            *exact,
        ],
        NODES,
        CPUS,
        kill=True,
    )
    wrong = {}
    for trial in population["trials"]:
        rows = read_records(Storage(f"{population['folder']}/{trial.run}"), METRICS)
        wrong[trial.run] = gaps_and_doubles(rows, 16)
    found = {
        "default accuracy": known,
        "best accuracy with asha": asha["best"],
        "best of whole trials": whole["best"],
        "steps with asha": asha["steps"],
        "steps of whole trials": whole["steps"],
        "same trials and hashes with a node killed": _same(asha["trials"], again["trials"]),
        "population: takeovers": sum(v["do"] == "exploit" for t in population["trials"] for v in t.verdicts),
        "population: samples lost or twice": sum(map(len, wrong.values())),
        "population: best bits per byte": population["best"],
    }
    print("\n" + table(("proof", "figure"), found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--steps", type=int, default=360, help="of a whole trial, which has nine evaluations")
    parser.add_argument("--workers", type=int, default=1, help="of a trial")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at a time")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        settings = settings_of(arguments, Path(name))
        for part in arguments.parts:
            if part == "proofs":
                figures[part] = proofs(settings)
            else:
                figures[part] = compare({**settings, "kill": part == "killed"})
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
