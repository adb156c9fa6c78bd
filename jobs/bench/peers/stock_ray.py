"""Stock Ray Train as a peer: elastic, with its defaults, on three Ray nodes of one worker each.

It answers a loss by ending all workers and starting new ones, which load the last reported checkpoint.

    python -m jobs.bench.peers.stock_ray KILLS NODE_KILLS NOTES RESULT
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jobs.bench.peers.notes import SAVE_EVERY, Notes, any_moment, kill, read, recovery, train, wait_for_world

LONGEST_S = 300.0  # of a recovery


def measure(folder: Path, kills: int, node_kills: int) -> dict[str, list[dict[str, float]]]:
    """Kill one of three workers, then one of three nodes, so many times; by `process` and `node`."""
    folder.mkdir()
    out = folder / "result.json"
    with (folder / "log").open("w") as log:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "jobs.bench.peers.stock_ray",
                str(kills),
                str(node_kills),
                str(folder / "notes.jsonl"),
                str(out),
            ],
            check=True,
            timeout=120 + 2 * LONGEST_S * (kills + node_kills),
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )
    return json.loads(out.read_text())


def _worker(config: dict[str, str]) -> None:
    import ray.train
    import torch

    from jobs.bench.steady import build_model

    notes = Notes(config["notes"])
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    Path(f"{config['notes']}.{rank}").write_text(str(os.getpid()))
    if rank == 0:
        notes.mark("form")  # processes were started and connected before this function was called
    torch.set_num_threads(1)
    model = torch.nn.parallel.DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    if rank == 0:
        notes.mark("restore")

    def done() -> None:
        nonlocal step
        step += 1
        if rank == 0:
            notes.step(step, size, os.getpid())
        if step % SAVE_EVERY:
            return
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, f"{folder}/state.pt")
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=saved)

    train(model, optimizer, done)


def _run(kills: int, node_kills: int, file: str) -> dict[str, list[dict[str, float]]]:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    from jobs.bench.nodes import LocalCluster

    class WhenNoticed(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            Notes(file).mark("detect")

    cluster = LocalCluster(nodes=3, cpus=1)
    ray.init(address=cluster.address)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"notes": file},
        scaling_config=ScalingConfig(num_workers=(1, 3)),
        run_config=RunConfig(
            storage_path=tempfile.mkdtemp(dir=Path(file).parent),
            name="stock",
            callbacks=[WhenNoticed()],
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    threading.Thread(target=trainer.fit, daemon=True).start()
    found: dict[str, list[dict[str, float]]] = {"process": [], "node": []}
    for i in range(kills + node_kills):
        kind, expected = ("process", 3) if i < kills else ("node", 2)
        wait_for_world(file, 3, timeout_s=LONGEST_S)
        any_moment(i)
        if kind == "process":
            killed = kill(int(Path(f"{file}.{i % 3}").read_text()))
        else:
            killed = time.time()
            cluster.kill_node(cluster.nodes[-1])
        wait_for_world(file, expected, killed, LONGEST_S)
        found[kind].append(recovery(read(file), killed, expected))
        if kind == "node":
            cluster.add_node()
    return found


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(_run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
    os._exit(0)  # the trainer would go on for ever
