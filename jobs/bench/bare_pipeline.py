"""The bare loop that pipelines are measured against: torch's own pipelining, gradients summed over pipelines after it.

DDP around a stage does not go with torch 2.13: its reducer counts the passes in which shapes are found out.

torchrun --nproc-per-node 4 -m jobs.bench.bare_pipeline --steps 40 --global-size 32 --passes 4 --out times.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from elastic.parallel.stage_costs import parameters_of
from elastic.parallel.stages import cut
from jobs.bench.report import resident_peak_mib
from jobs.codegpt import CodeGPT


def clip(parameters: list[nn.Parameter], most: float, stages: dist.ProcessGroup) -> None:
    """Clip the norm of the gradients of all stages."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    square = nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(square, group=stages)
    share = most / (square.sqrt().item() + 1e-6)
    if share < 1:
        torch._foreach_mul_(gradients, share)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-size", type=int, required=True)
    parser.add_argument("--passes", type=int, required=True, help="microbatches of a pipeline's share of a step")
    parser.add_argument("--pipeline", type=int, default=2, help="stages")
    parser.add_argument("--size", default="0.5M")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, pipelines = dist.get_rank(), dist.get_world_size() // arguments.pipeline
    mesh = init_device_mesh("cpu", (pipelines, arguments.pipeline), mesh_dim_names=("pipeline", "stage"))
    pipeline, stage = divmod(rank, arguments.pipeline)
    torch.manual_seed(0)
    job = CodeGPT(size=arguments.size, block=arguments.block, tied=False)
    data, model = job.train_data(), job.model()
    layers = job.stages(model)
    bounds = cut([parameters_of(layer) for layer in layers], arguments.pipeline)
    mine = nn.Sequential(*(layers[i] for i in bounds[stage]))
    optimizer, parameters = torch.optim.AdamW(mine.parameters(), lr=job.lr, betas=(0.9, 0.95)), list(mine.parameters())
    stages, copies = mesh["stage"].get_group(), mesh["pipeline"].get_group()
    share = arguments.global_size // pipelines
    weight = arguments.global_size * arguments.block

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / weight

    of_torch = PipelineStage(mine, stage, arguments.pipeline, torch.device("cpu"), group=stages)
    schedule = Schedule1F1B(of_torch, arguments.passes, loss_fn=loss, scale_grads=False)
    order = np.random.default_rng(0).permutation(len(data))
    times, cpu = [], []
    for step in range(arguments.steps):
        optimizer.zero_grad(set_to_none=True)
        first = (step * arguments.global_size + pipeline * share) % (len(data) - arguments.global_size)
        x, y = job.collate_fn(data.__getitems__(order[first : first + share].tolist()))
        targets = {"target": y, "losses": []} if stage == arguments.pipeline - 1 else {}
        schedule.step(*([x] if stage == 0 else []), return_outputs=False, **targets)
        if pipelines > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in parameters])
            dist.all_reduce(flat, group=copies)
            for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(total.view_as(p))
        clip(parameters, 1.0, stages)
        optimizer.step()
        times.append(time.time())
        cpu.append(time.process_time())
    if rank == 0:
        found = {"times": times, "cpu": cpu, "peak_mib": resident_peak_mib(os.getpid())}
        Path(arguments.out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
