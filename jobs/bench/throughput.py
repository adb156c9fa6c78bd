"""Samples/s of a fault-free run here and in a bare torchrun DDP loop, and the time to the first step.

    python -m jobs.bench.throughput [--pairs 5] [--part steps|start|all] [--json FILE]

Runs of the variants alternate, so that a machine whose speed drifts slows all alike; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.storage import Storage
from jobs.bench.report import median, table, write_json
from jobs.bench.steps import BLOCK, bare, here

WORKERS = 2
LOOP = "jobs.bench.bare_loop"
PARTS = ("import_s", "data_s", "model_s")


def steps_part(pairs: int, steps: int, size: str, tokens: list[int], global_size: int) -> dict[str, Any]:
    """Interleaved runs of: bare, bare with the same microbatches, fast, and bitwise at each microbatch size."""
    found: dict[str, list[dict[str, float]]] = {}
    common: dict[str, Any] = {"steps": steps, "size": size, "global_size": global_size}
    batch_tokens = global_size * BLOCK
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder = Path(name)
        kinds: dict[str, Callable[[], dict[str, float]]] = {
            "bare": partial(bare, folder, LOOP, WORKERS, passes=1, **common),
            "fast": partial(here, folder, WORKERS, microbatches=batch_tokens // 512, exactness="fast", **common),
        }
        for t in tokens:
            v = batch_tokens // t
            kinds[f"bare, {t} tokens a pass"] = partial(bare, folder, LOOP, WORKERS, passes=v // WORKERS, **common)
            kinds[f"bitwise, {t} tokens a pass"] = partial(
                here, folder, WORKERS, microbatches=v, exactness="bitwise", **common
            )
        for pair in range(pairs):
            for kind, measure in kinds.items():
                found.setdefault(kind, []).append(measure())
                print(f"pair {pair + 1}/{pairs}  {kind}: {found[kind][-1]['rate']:.1f} samples/s", file=sys.stderr)
    base = {key: median(r[key] for r in found["bare"]) for key in ("rate", "peak_mib")}
    rows = []
    for kind, runs in found.items():
        rate, peak = median(r["rate"] for r in runs), median(r["peak_mib"] for r in runs)
        ratios = [r["rate"] / b["rate"] for r, b in zip(runs, found["bare"], strict=True)]
        same = found.get(kind.replace("bitwise", "bare")) if kind.startswith("bitwise") else None
        against = median(r["rate"] / b["rate"] for r, b in zip(runs, same, strict=True)) if same else ""
        rows.append([kind, rate, median(ratios), min(ratios), max(ratios), against, peak, peak / base["peak_mib"]])
    head = ["variant", "samples/s", "of bare", "min", "max", "of bare, same passes", "peak MiB", "of bare"]
    print(f"\n{size}, global batch {global_size} x {BLOCK} tokens, {WORKERS} workers, {pairs} pairs of {steps} steps")
    print(table(head, rows))
    return {"head": head, "rows": rows, "pairs": pairs, "steps": steps, "size": size, "global_size": global_size}


def first_step_here(folder: Path) -> dict[str, float]:
    """Seconds from the command to the first applied step, by phase."""
    name = f"start-{os.urandom(3).hex()}"
    began = time.time()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "jobs.codegpt",
            "--run.storage",
            str(folder),
            "--run.name",
            name,
            "--run.duration",
            "3st",
            "--scaling.max-workers",
            str(WORKERS),
            "--job.eval-blocks",
            "8",
        ],
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    storage = Storage(str(folder / name))
    events = {e["kind"]: e for e in read_records(storage, EVENTS)}
    first = next(r for r in read_records(storage, METRICS) if "sample_hash" in r)
    warm, cluster_s = events["worker_warm"], events["run_started"]["detail"]["cluster_s"]
    started = events["run_started"]["time"]
    parts = warm["detail"]
    return {
        "imports, data length": started - began - cluster_s,
        "cluster": cluster_s,
        "workers": warm["time"] - started - warm["seconds"],
        "worker imports": parts["import_s"],
        "data": parts["data_s"],
        "model": parts["model_s"],
        "world and first step": first["time"] - warm["time"] + warm["seconds"] - sum(parts[k] for k in PARTS),
        "total": first["time"] - began,
    }


def first_step_stock(folder: Path) -> dict[str, float]:
    """The same for stock Ray Train's TorchTrainer."""
    out = folder / "stock.json"
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "jobs.bench.stock_start", str(out), str(folder / "stock"), str(WORKERS)],
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
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
    }


def start_part(pairs: int) -> dict[str, Any]:
    """Interleaved starts of a run here and of stock Ray Train."""
    ours, stock = [], []
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        for pair in range(pairs):
            ours.append(first_step_here(Path(name)))
            stock.append(first_step_stock(Path(name)))
            print(
                f"start {pair + 1}/{pairs}: here {ours[-1]['total']:.1f} s, stock {stock[-1]['total']:.1f} s",
                file=sys.stderr,
            )
    rows = [[phase, median(r[phase] for r in ours), median(r[phase] for r in stock)] for phase in ours[0]]
    ratio = median(a["total"] / b["total"] for a, b in zip(ours, stock, strict=True))
    print(f"\nseconds from command to first step, medians of {pairs} pairs; here / stock = {ratio:.2f}")
    print(table(["phase", "here", "stock Ray Train"], rows))
    return {"rows": rows, "ratio": ratio, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", default="0.5M")
    parser.add_argument("--global-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024], help="tokens of a microbatch")
    parser.add_argument("--part", choices=("steps", "start", "all"), default="all")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.part != "start":
        figures["steps"] = steps_part(
            arguments.pairs, arguments.steps, arguments.size, arguments.tokens, arguments.global_size
        )
    if arguments.part != "steps":
        figures["start"] = start_part(arguments.pairs)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
