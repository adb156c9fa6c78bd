"""The bare torchrun FSDP2 loop that sharded runs are measured against: same model, data, batch, optimizer, clipping.

torchrun --nproc-per-node 2 -m jobs.bench.bare_fsdp --steps 40 --global-size 32 --passes 1 --out times.json
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
from torch.distributed.fsdp import fully_shard

from jobs.bench.report import resident_peak_mib
from jobs.codegpt import CodeGPT


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-size", type=int, required=True)
    parser.add_argument("--passes", type=int, default=1, help="forward/backward passes of a rank's share of a step")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model: more than one is HSDP")
    parser.add_argument("--size", default="0.5M")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    shape, names = ((world,), ("shard",))
    if arguments.replicas > 1:
        shape, names = ((arguments.replicas, world // arguments.replicas), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    torch.manual_seed(0)
    job = CodeGPT(size=arguments.size, block=arguments.block)
    data = job.train_data()
    model = job.model().to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not cuda:  # gloo has no mean of its own
        for module in (*model.blocks, model):
            module.set_gradient_divide_factor(world)
            module.set_force_sum_reduction_for_comms(True)
    optimizer = job.optimizer(model)
    order = np.random.default_rng(0).permutation(len(data))
    share = arguments.global_size // world
    each = share // arguments.passes
    times = []
    for step in range(arguments.steps):
        optimizer.zero_grad(set_to_none=True)
        first = (step * arguments.global_size + rank * share) % (len(data) - arguments.global_size)
        for i in range(arguments.passes):
            ids = order[first + i * each : first + (i + 1) * each].tolist()
            x, y = job.collate_fn(data.__getitems__(ids))
            loss, weight, _ = job.loss(model, (x.to(device), y.to(device)))
            (loss / (weight * arguments.passes)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        times.append(time.time())
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_peak_mib(os.getpid())
        Path(arguments.out).write_text(json.dumps({"times": times, "peak_mib": peak}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
