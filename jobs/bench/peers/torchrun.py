"""torchrun's elastic agents as a peer: three agents of one worker each, which stand for three nodes.

When a worker dies, the agents end all workers, meet again and start new ones, which load the last checkpoint; so its
documentation advises to save often.

Two things are set other than by default, or it does not recover reliably (torch 2.13; read in
`torch/distributed/elastic/rendezvous/dynamic_rendezvous.py`, and seen):

* `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`. By default agent 0 makes one store for the workers and keeps it over all
  rounds. Workers of the next round find the addresses of dead ones in it and fail to connect at first; and its
  address is published in the first round alone, so that an agent that comes later waits 60 s for it and ends.
* The store that the agents meet in runs in the process that measures, as it would on a head node: the agent that
  hosts it cannot be lost.

    torchrun ... -m jobs.bench.peers.torchrun NOTES    one worker
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.bench.peers.notes import SAVE_EVERY, Notes, any_moment, children, kill, read, recovery, train, wait_for_world

#: Seconds; torch's defaults are a heartbeat every 5, 3 of them, and 30 for stragglers. These take whole numbers.
TUNED = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"
_LINE = re.compile(r"[IW](\d{4} [\d:.]+) .*\] \[default\] (.*)")


def measure(folder: Path, kills: int, *, nodes: bool, settings: str = "") -> list[dict[str, float]]:
    """Kill one of three workers, or (`nodes`) its agent with it, so many times. `settings`: of the rendezvous."""
    import torch.distributed as dist

    folder.mkdir()
    file = folder / "notes.jsonl"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    configuration = ",".join(filter(None, ["is_host=0", settings]))
    logs: list[Path] = []

    def agent() -> subprocess.Popen[bytes]:
        logs.append(folder / f"agent-{len(logs)}.log")
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "1:3",
                "--nproc-per-node",
                "1",
                "--max-restarts",
                "100",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                f"127.0.0.1:{store.port}",
                "--rdzv-id",
                "bench",
                "--rdzv-conf",
                configuration,
                "-m",
                "jobs.bench.peers.torchrun",
                str(file),
            ],
            stdout=subprocess.DEVNULL,
            stderr=logs[-1].open("w"),
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )

    agents = [agent() for _ in range(3)]
    found = []
    try:
        for i in range(kills):
            wait_for_world(file, 3)
            any_moment(i)
            one = agents.pop(0)  # each in turn, and so also the one whose worker is rank 0
            killed = kill(*([one.pid] if nodes else []), *children(one.pid)[:1])
            if nodes:
                one.wait()
            wait_for_world(file, 2 if nodes else 3, killed)
            notes = read(file)
            found.append(recovery(notes, killed, 2 if nodes else 3, _from_logs(logs, killed, notes)))
            agents.append(agent() if nodes else one)
    finally:
        for one in agents:
            kill(one.pid, *children(one.pid))
            one.wait()
    return found


def _from_logs(logs: list[Path], killed: float, notes: list[dict[str, Any]]) -> dict[str, float]:
    """When an agent first noticed, and when the last set of workers was started before steps went on."""
    lines = sorted(line for log in logs for line in _lines(log) if line[0] > killed)
    resumed = next(n["time"] for n in notes if n.get("mark") == "restore" and n["time"] > killed)
    noticed = [at for at, text in lines if "FAILED" in text or text.startswith("Detected")]
    started = [at for at, text in lines if text.startswith("Starting worker group") and at < resumed]
    return {"detect": noticed[0], "form": started[-1]}


def _lines(log: Path) -> list[tuple[float, str]]:
    """(unix seconds, text) of what an agent logged."""
    year = time.localtime().tm_year
    found = (_LINE.match(line) for line in log.read_text().splitlines())
    return [(datetime.strptime(f"{year}{m[1]}", "%Y%m%d %H:%M:%S.%f").timestamp(), m[2]) for m in found if m]


def worker(file: str) -> None:
    """One worker: loads the newest checkpoint, saves one every few steps."""
    import torch
    import torch.distributed as dist

    from jobs.bench.steady import build_model

    torch.set_num_threads(1)
    notes, saved = Notes(file), Path(file + ".pt")
    inner = build_model()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)  # the first optimizer imports for seconds
    began = time.time()
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = torch.nn.parallel.DistributedDataParallel(inner)
    connected = time.time()
    step = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if rank == 0:
        notes.mark("start", began)
        notes.mark("connect", connected)
        notes.mark("restore")

    def done() -> None:
        nonlocal step
        step += 1
        if rank == 0:
            notes.step(step, size, os.getpid())
            if step % SAVE_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, file + ".tmp")
                os.replace(file + ".tmp", saved)

    train(model, optimizer, done)


if __name__ == "__main__":
    worker(sys.argv[1])
