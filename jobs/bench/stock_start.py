"""Stock Ray Train: the same job to its third step, writing when each phase was over."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.codegpt import CodeGPT


def train(config: dict) -> None:
    at = {"entered": time.time()}
    import ray.train
    import ray.train.torch
    from torch import nn

    at["worker_imported"] = time.time()
    job = CodeGPT()
    data = job.train_data()
    job.eval_data()
    at["data"] = time.time()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ray.train.torch.prepare_model(job.model())
    optimizer = job.optimizer(model)
    at["model"] = time.time()
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    share = 32 // world
    for step in range(3):
        ids = list(range(step * 32 + rank * share, step * 32 + (rank + 1) * share))
        loss, weight, _ = job.loss(model, job.collate_fn(data.__getitems__(ids)))
        optimizer.zero_grad()
        (loss / weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at.setdefault("first_step", time.time())
        ray.train.report({"loss": loss.item()})
        if step == 0 and rank == 0:
            Path(config["out"]).write_text(json.dumps(at))
    at["last_step"] = time.time()
    if rank == 0:
        Path(config["out"]).write_text(json.dumps({**config["at"], **at}))


def main() -> None:
    out, storage, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    import ray

    at = {"imported": time.time()}
    if len(sys.argv) > 4:
        ray.init(address=sys.argv[4])
    else:
        ray.init(include_dashboard=False)
    at["cluster"] = time.time()
    trainer = TorchTrainer(
        train,
        train_loop_config={"out": out, "at": at},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=storage, name="stock"),
    )
    trainer.fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
