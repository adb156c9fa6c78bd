"""The peers of the recovery benchmark: the same model and step time under stock Ray Train and under torchrun.

    python -m jobs.bench.restarting ray STEPS_FILE NODES_FILE     stock Ray Train, elastic, one node killed
    torchrun ... -m jobs.bench.restarting loop STEPS_FILE          one worker of a torchrun elastic job

Each writes a line of JSON a step: step, time, world size.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PAUSE_S = 0.05
SAVE_EVERY = 20


def steps_of(file: str | Path) -> list[dict[str, Any]]:
    path = Path(file)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _loop(model: Any, start: int, save: Any, note: Any) -> None:
    """Steps of PAUSE_S for ever, from `start` on."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = start
    while True:
        time.sleep(PAUSE_S)
        loss = model(torch.randn(8, 64)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        note(step)
        if step % SAVE_EVERY == 0:
            save(step)


def torchrun_worker(file: str) -> None:
    """One worker; the state is saved to a file every few steps, as torchrun's own documentation advises."""
    import torch
    import torch.distributed as dist

    from jobs.bench.steady import build_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(build_model())
    saved = Path(file + ".pt")
    start = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        start = state["step"]
    rank, size = dist.get_rank(), dist.get_world_size()

    def save(step: int) -> None:
        if rank == 0:
            torch.save({"model": model.state_dict(), "step": step}, file + ".tmp")
            os.replace(file + ".tmp", saved)

    def note(step: int) -> None:
        if rank == 0:
            with open(file, "a") as f:
                f.write(json.dumps({"step": step, "time": time.time(), "size": size}) + "\n")

    _loop(model, start, save, note)


def _ray_worker(config: dict[str, str]) -> None:
    import ray.train
    import torch

    from jobs.bench.steady import build_model

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    model = torch.nn.parallel.DistributedDataParallel(build_model())
    start = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            start = state["step"]

    def save(step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = None
            if rank == 0:
                torch.save({"model": model.state_dict(), "step": step}, f"{folder}/state.pt")
                found = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=found)

    def note(step: int) -> None:
        if rank == 0:
            with open(config["file"], "a") as f:
                f.write(json.dumps({"step": step, "time": time.time(), "size": size}) + "\n")

    _loop(model, start, save, note)


def stock_ray(file: str, kills: int) -> list[dict[str, float]]:
    """Kill one of three nodes under stock Ray Train, `kills` times; returns stall and lost steps of each."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from jobs.bench.nodes import LocalCluster

    cluster = LocalCluster(nodes=3, cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    storage = tempfile.mkdtemp(prefix="elastic-bench-")
    trainer = TorchTrainer(
        _ray_worker, train_loop_config={"file": file}, scaling_config=ScalingConfig(num_workers=(1, 3)),
        run_config=RunConfig(storage_path=storage, name="stock", failure_config=FailureConfig(max_failures=-1)),
    )  # fmt: skip
    threading.Thread(target=trainer.fit, daemon=True).start()
    found = []
    for _ in range(kills):
        at = len(steps_of(file))
        wait(lambda at=at: len(steps_of(file)) > at + 60, 300)
        before = steps_of(file)[-1]
        cluster.kill_node(cluster.nodes[-1])
        killed = time.time()
        wait(lambda size=before["size"]: steps_of(file)[-1]["size"] < size, 300)
        rows = steps_of(file)
        after = next(r for r in rows if r["time"] > killed and r["size"] < before["size"])
        last = [r for r in rows if r["time"] < after["time"] and r["size"] == before["size"]][-1]
        found.append({"stall_s": after["time"] - last["time"] - PAUSE_S, "lost": last["step"] - after["step"] + 1})
        cluster.add_node()
    return found


def wait(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing within {timeout_s} s")
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1] == "loop":
        torchrun_worker(sys.argv[2])
    else:
        Path(sys.argv[3]).write_text(json.dumps(stock_ray(sys.argv[2], int(sys.argv[4]))))
        os._exit(0)  # the trainer would go on for ever
