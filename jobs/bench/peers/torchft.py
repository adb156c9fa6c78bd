"""torchft without Ray as a peer: a lighthouse, and three replica groups of one worker each.

It needs `torchft-nightly`, which is no dependency of this project. Give it an environment of its own:

    python -m venv torchft-env
    torchft-env/bin/pip install torchft-nightly==2026.10.26 torch==2.13.0 numpy

Run by that interpreter:

    PYTHON -m jobs.bench.peers.torchft lighthouse TICK_MS JOIN_MS FILE    writes its address to FILE
    PYTHON -m jobs.bench.peers.torchft worker LIGHTHOUSE NAME NOTES
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from jobs.bench.peers.notes import PHASES, Notes, any_moment, kill, read, recovery, train, wait, wait_for_world

REPOSITORY = Path(__file__).parent.parent.parent.parent
LONGEST_S = 90.0  # for a survivor to go on; its collectives time out after 60

#: (how often the lighthouse looks, how long it waits for members that were heard of lately), milliseconds.
AS_ITS_README = (100, 10_000)
TUNED = (50, 300)  # as long as we wait before we go on without who does not answer


def measure(folder: Path, python: str, kills: int, timing: tuple[int, int]) -> list[dict[str, float]]:
    """SIGKILL one of three replica groups, so many times; of two survivors, the one that stalled longer counts."""
    folder.mkdir()
    log = (folder / "log").open("w")

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [python, "-m", "jobs.bench.peers.torchft", *arguments],
            stdout=log,
            stderr=log,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )

    address = folder / "address"
    running = [start("lighthouse", str(timing[0]), str(timing[1]), str(address))]
    found = []
    try:
        wait(lambda: address.exists() and address.read_text(), 60, "torchft's lighthouse")
        files = [folder / f"notes-{i}.jsonl" for i in range(3)]

        def replica(i: int) -> subprocess.Popen[bytes]:
            return start("worker", address.read_text(), f"replica-{i}", str(files[i]))

        replicas = [replica(i) for i in range(3)]
        running += replicas
        for k in range(kills):
            for file in files:
                wait_for_world(file, 3)
            any_moment(k)
            one = k % 3
            killed = kill(replicas[one].pid)
            replicas[one].wait()
            found.append(_recovery([file for i, file in enumerate(files) if i != one], killed))
            for i in range(3):
                if i == one or not _resumed(files[i], killed, 0):  # also one that was left behind for good
                    kill(replicas[i].pid)
                    replicas[i].wait()
                    replicas[i] = replica(i)
                    running.append(replicas[i])
    finally:
        for process in running:
            process.kill()
            process.wait()
        log.close()
    return found


def _recovery(survivors: list[Path], killed: float) -> dict[str, float]:
    """Of those survivors that went on, the recovery that took longest; the others were left out.

    Where none went on, the stall is at least as long as we waited, and nobody knows what it went into.
    """
    resumed = [read(file) for file in survivors if _resumed(file, killed, LONGEST_S)]
    if not resumed:
        return {"stall_s": LONGEST_S, "lost": 0.0, "left_out": float(len(survivors)), **dict.fromkeys(PHASES, 0.0)}
    longest = max((recovery(notes, killed, 2) for notes in resumed), key=lambda r: r["stall_s"])
    return {**longest, "left_out": max(longest["left_out"], float(len(survivors) - len(resumed)))}


def _resumed(file: Path, killed: float, timeout_s: float) -> bool:
    try:
        wait_for_world(file, None, killed, timeout_s)
    except TimeoutError:
        return False
    return True


def lighthouse(tick_ms: int, join_ms: int, file: str) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer("[::]:0", min_replicas=1, join_timeout_ms=join_ms, quorum_tick_ms=tick_ms)
    Path(file + ".tmp").write_text(server.address())
    os.replace(file + ".tmp", file)
    threading.Event().wait()


def worker(lighthouse_address: str, name: str, file: str) -> None:
    """One replica group of one worker. It writes a mark when it notices an error, has a quorum, and is connected."""
    import torch
    import torchft
    from torch.distributed import TCPStore

    from jobs.bench.steady import build_model

    torch.set_num_threads(1)
    notes = Notes(file)

    class Group(torchft.ProcessGroupGloo):
        def reconfigure(self, opts: Any) -> Any:
            notes.mark("form")
            done = super().reconfigure(opts)
            notes.mark("connect")
            return done

    class Manager(torchft.Manager):
        def report_error(self, e: Exception) -> None:
            notes.mark("detect")
            super().report_error(e)

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    inner = build_model()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)

    def load(state: dict[str, Any]) -> None:
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=Group(timeout=timedelta(seconds=60)),
        load_state_dict=load,
        state_dict=lambda: {"model": inner.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse_address,
        replica_id=name,
        hostname="127.0.0.1",
    )
    model = torchft.DistributedDataParallel(manager, inner)
    applied = 0

    def done() -> None:
        nonlocal applied
        if manager.current_step() > applied:  # else the step was dropped, and is tried again
            applied = manager.current_step()
            notes.step(applied, manager.num_participants(), manager._quorum_id)

    train(model, torchft.Optimizer(manager, optimizer), done)


if __name__ == "__main__":
    if sys.argv[1] == "lighthouse":
        lighthouse(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        worker(*sys.argv[2:])
