"""Stalls and lost steps when one of three workers is killed: this trainer, stock Ray Train, torchrun, in one run.

    python -m jobs.bench.recovery [--kills 10] [--node-kills 5] [--stock-kills 1] [--torchrun-kills 2] [--json FILE]

A stall is the time between two applied steps minus a normal step. Where it goes: until the loss is noticed, until
the next world is formed, connecting, restoring and wrapping, and the rest of the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from elastic.membership.watch import p95
from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import Command, LocalCluster
from jobs.bench.report import median, table, write_json
from jobs.bench.restarting import PAUSE_S, SAVE_EVERY, steps_of, wait

WORLD = re.compile(r"world formed world 1-(\d+) size=(\d+) pids=\[(.*?)\]")
PHASES = ("detect", "form", "connect", "restore", "first step")


def here(folder: Path, kills: int, node_kills: int) -> dict[str, list[dict[str, float]]]:
    """Kill processes, then nodes, of one run; each time wait until three workers train again."""
    cluster = LocalCluster(nodes=3, cpus=1)
    killed: list[tuple[str, float]] = []
    pause = PAUSE_S / 4  # a worker of three runs four of the twelve microbatches
    try:
        run = Command(
            "-m", "jobs.bench.steady", "--cluster.address", cluster.address, "--run.storage", str(folder),
            "--run.name", "here", "--run.duration", "1000000st", "--scaling.max-workers", "3",
            "--run.exactness", "bitwise", "--job.pause", str(pause), "--observe.log-every", "0.2",
        )  # fmt: skip
        pids = _next_world(run, 3, 0)
        for i in range(kills + node_kills):
            run.wait_for_step(_step(run) + 20)
            before = _worlds(run)[-1][0]
            kind = "process" if i < kills else "node"
            killed.append((kind, time.time()))
            if kind == "process":
                os.kill(pids[i % 3], signal.SIGKILL)
            else:
                cluster.kill_node(cluster.nodes[0])
                _next_world(run, 2, before)
                cluster.add_node()
            pids = _next_world(run, 3, before)
        run.wait_for_step(_step(run) + 20)
        run.signal(signal.SIGINT)
        run.wait()
    finally:
        cluster.close()
    return _analyse(Storage(str(folder / "here")), killed)


def _worlds(run: Command) -> list[tuple[int, int, list[int]]]:
    found = (WORLD.search(line) for line in list(run.lines))
    return [(int(m[1]), int(m[2]), list(map(int, m[3].split(",")))) for m in found if m]


def _next_world(run: Command, size: int, after: int) -> list[int]:
    """Pids of the first world of this size that is newer."""

    def fits(line: str) -> bool:
        match = WORLD.search(line)
        return bool(match) and int(match[1]) > after and int(match[2]) == size  # type: ignore[index]

    run.wait_for(fits, 120)
    return next(w[2] for w in _worlds(run) if w[0] > after and w[1] == size)


def _step(run: Command) -> int:
    lines = [line for line in list(run.lines) if line.startswith("step ")]
    return int(lines[-1].split()[1].split("/")[0]) if lines else 0


def _analyse(storage: Storage, killed: list[tuple[str, float]]) -> dict[str, list[dict[str, float]]]:
    rows = [r for r in read_records(storage, METRICS) if "sample_hash" in r]
    events = read_records(storage, EVENTS)
    normal = median(r["step_s"] for r in rows)
    found: dict[str, list[dict[str, float]]] = {"process": [], "node": []}
    for kind, at in killed:
        lost = next(e for e in events if e["kind"] == "member_lost" and e["time"] > at)
        formed = next(e for e in events if e["kind"] == "world_formed" and e["time"] > lost["time"])
        index = next(i for i, r in enumerate(rows) if r["generation"] == formed["generation"])
        first, last = rows[index], rows[index - 1]
        stall = first["time"] - last["time"] - normal
        parts = {
            "detect": max(0.0, lost["time"] - max(at, last["time"])), "form": formed["time"] - lost["time"],
            "connect": first["connect_s"], "restore": first["restore_s"],
        }  # fmt: skip
        begun = formed["time"] + first["connect_s"] + first["restore_s"]
        parts["first step"] = max(0.0, first["time"] - begun - normal)
        steps = [r["step"] for r in rows]
        found[kind].append({"stall_s": stall, "lost": float(len(steps) - len(set(steps))), **parts})
    suspected = sum(e["kind"] == "member_suspected" for e in events)
    print(f"here: a normal step takes {normal:.3f} s; {suspected} false suspicions", file=sys.stderr)
    for runs in found.values():
        for one in runs:
            one["suspected"] = float(suspected)
    return found


def torchrun(folder: Path, kills: int) -> list[dict[str, float]]:
    """Three torchrun agents of one worker each; kill an agent with its worker, and start another."""
    file, port = str(folder / "torchrun.jsonl"), _free_port()

    def agent() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:3", "--nproc-per-node", "1",
                "--max-restarts", "100", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
                "--rdzv-id", "bench", "-m", "jobs.bench.restarting", "loop", file,
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    agents = [agent() for _ in range(3)]
    found = []
    try:
        for _ in range(kills):
            wait(lambda: _last(file).get("size") == 3, 240)
            at = _last(file)["step"]
            wait(lambda at=at: _last(file)["step"] > at + 30, 120)
            before = _last(file)
            workers = _children(agents[-1].pid)
            for pid in (agents[-1].pid, *workers):
                os.kill(pid, signal.SIGKILL)
            agents.pop().wait()
            killed = time.time()
            wait(lambda killed=killed: _last(file)["time"] > killed + 1 and _last(file)["size"] < 3, 240)
            rows = steps_of(file)
            after = next(r for r in rows if r["time"] > killed and r["size"] < 3)
            last = [r for r in rows if r["time"] < after["time"]][-1]
            stall = after["time"] - last["time"] - PAUSE_S
            found.append({"stall_s": stall, "lost": float(max(before["step"], last["step"]) - after["step"] + 1)})
            agents.append(agent())
    finally:
        for one in agents:
            for pid in (one.pid, *_children(one.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            one.wait()
    return found


def _children(pid: int) -> list[int]:
    try:
        direct = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*direct, *(grandchild for c in direct for grandchild in _children(c))]


def _last(file: str) -> dict[str, Any]:
    rows = steps_of(file)
    return rows[-1] if rows else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stock(folder: Path, kills: int) -> list[dict[str, float]]:
    out = folder / "stock.json"
    subprocess.run(
        [sys.executable, "-m", "jobs.bench.restarting", "ray", str(folder / "stock.jsonl"), str(out), str(kills)],
        check=True, timeout=500 * max(1, kills), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--node-kills", type=int, default=5)
    parser.add_argument("--stock-kills", type=int, default=1)
    parser.add_argument("--torchrun-kills", type=int, default=2)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder = Path(name)
        mine = here(folder, arguments.kills, arguments.node_kills)
        found["here, process killed"], found["here, node killed"] = mine["process"], mine["node"]
        if arguments.torchrun_kills:
            found["torchrun, agent killed"] = torchrun(folder, arguments.torchrun_kills)
        if arguments.stock_kills:
            found["stock Ray Train, node killed"] = stock(folder, arguments.stock_kills)
    rows = []
    for kind, kills in found.items():
        if kills:
            stalls = [k["stall_s"] for k in kills]
            lost = max(k["lost"] for k in kills)
            rows.append([kind, len(kills), median(stalls), p95(stalls), max(stalls), int(lost)])
    print(f"three workers, steps of about {PAUSE_S} s, peers save every {SAVE_EVERY} steps")
    print(table(["who", "kills", "stall p50 (s)", "p95", "worst", "steps lost"], rows))
    mine_rows = [[p, *(median(k[p] for k in mine[kind]) for kind in mine if mine[kind])] for p in PHASES]
    print("\nwhere it goes here, medians (s)")
    print(table(["phase", *(f"{kind} killed" for kind in mine if mine[kind])], mine_rows))
    write_json(arguments.json, {"kills": found, "false_suspicions": mine["process"][0]["suspected"]})


if __name__ == "__main__":
    main()
