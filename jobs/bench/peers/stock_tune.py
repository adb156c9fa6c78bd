"""Plain Ray Tune as a peer: its own ASHA over trials that each are a stock `TorchTrainer`, as Ray's guide has it.

The trials train the net of `jobs.digits` on the same data with the same options, batches, number of steps and
evaluations, and save at each evaluation, from which a trial goes on whose worker or driver was lost.

    python -m jobs.bench.peers.stock_tune SETTINGS RESULT
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


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.torch import prepare_model
    from torch.nn import functional
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    from jobs.digits import Digits

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = Digits(lr=config["job.lr"], width=config["job.width"])
    model = prepare_model(job.model())
    optimizer = job.optimizer(model)
    warmup, total = config["warmup"], config["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    data, held_out = job.train_data(), job.eval_data()
    sampler = DistributedSampler(data, size, rank)
    loader = DataLoader(data, config["batch"] // size, sampler=sampler, drop_last=True, collate_fn=job.collate_fn)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    epoch = 0
    while step < total:
        sampler.set_epoch(epoch)
        epoch += 1
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % config["every"] == 0:
                _report(model, optimizer, held_out, step, rank)
            if step == total:
                return


def _report(model: Any, optimizer: Any, held_out: Any, step: int, rank: int) -> None:
    import ray.train
    import torch

    model.eval()
    with torch.no_grad():
        accuracy = (model(held_out.images).argmax(1) == held_out.labels).float().mean().item()
    model.train()
    with tempfile.TemporaryDirectory() as folder:
        saved = None
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, f"{folder}/state.pt")
            saved = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"accuracy": accuracy, "step": step}, checkpoint=saved)


def _trial(config: dict[str, Any], points: list[dict[str, Any]]) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    config = points[config["number"]]
    TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"]),
        run_config=RunConfig(
            name=f"trial-{config['number']}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()


def _run(settings: dict[str, Any]) -> dict[str, Any]:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from jobs.bench.nodes import LocalCluster

    # Ray Train asks the dashboard whether a trial is over before it gives up what that trial held
    cluster = LocalCluster(nodes=settings["nodes"], cpus=settings["cpus"], dashboard=True)
    ray.init(address=cluster.address, logging_level="ERROR")
    storage = tempfile.mkdtemp(dir=settings["folder"])
    common = {k: settings[k] for k in ("steps", "every", "batch", "warmup", "workers")}
    points = [{**p, "number": n, "storage": storage, **common} for n, p in enumerate(settings["trials"])]

    told = Path(storage) / "reported"

    class Reported(tune.Callback):
        """Leaves a file when the first trial has reported."""

        def on_trial_result(self, *_: Any, **__: Any) -> None:
            told.touch()

    def kill() -> None:
        while not told.exists():
            time.sleep(0.05)
        cluster.kill_node(cluster.nodes[-1])

    if settings["kill"]:
        threading.Thread(target=kill, daemon=True).start()
    began = time.time()
    grid = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, points=points), {"CPU": 0.01}),
        param_space={"number": tune.grid_search(list(range(len(points))))},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            search_alg=BasicVariantGenerator(max_concurrent=settings["concurrent"]),
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                max_t=settings["steps"] // settings["every"],
                grace_period=settings["grace"],
                reduction_factor=settings["factor"],
            ),
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage,
            verbose=0,
            callbacks=[Reported()],
            failure_config=tune.FailureConfig(max_failures=3),
        ),
    ).fit()
    seconds = time.time() - began
    steps = [int(r.metrics.get("step", 0)) if r.metrics else 0 for r in grid]
    best = max((r.metrics.get("accuracy", 0.0) for r in grid if r.metrics), default=0.0)
    return {"seconds": seconds, "steps": sum(steps), "by_trial": steps, "best": best, "failed": len(grid.errors)}


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    found = _run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
    os._exit(0)  # the cluster ends with this process
