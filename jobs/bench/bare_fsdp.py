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
from torch.distributed.tensor.parallel import parallelize_module

from elastic.parallel.tensor import styles
from jobs.bench.report import resident_peak_mib
from jobs.codegpt import CodeGPT


def clip(model: nn.Module, most: float) -> None:
    """Clip the norm of all gradients: with tensor parallelism they have two meshes, and are not summed together."""
    gradients: dict[object, list[torch.Tensor]] = {}
    for p in model.parameters():
        gradients.setdefault(p.device_mesh, []).append(p.grad)
    norms = [nn.utils.get_total_norm(some).full_tensor() for some in gradients.values()]
    share = most / (torch.stack(norms).norm().item() + 1e-6)
    if share < 1:
        torch._foreach_mul_([g.to_local() for some in gradients.values() for g in some], share)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-size", type=int, required=True)
    parser.add_argument("--passes", type=int, default=1, help="forward/backward passes of a rank's share of a step")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model: more than one is HSDP")
    parser.add_argument("--tensor", type=int, default=1, help="neighbours that share the layers of the job's plan")
    parser.add_argument("--size", default="0.5M")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    cells = world // arguments.tensor
    shape, names = ((cells, arguments.tensor), ("shard", "tensor"))
    if arguments.replicas > 1:
        shape, names = ((arguments.replicas, cells // arguments.replicas), ("replicate", "shard"))
    whole = init_device_mesh(device.type, shape, mesh_dim_names=names)
    mesh = whole if arguments.replicas > 1 else whole["shard"]
    torch.manual_seed(0)
    job = CodeGPT(size=arguments.size, block=arguments.block)
    data = job.train_data()
    model = job.model().to(device)
    if arguments.tensor > 1:
        parallelize_module(model, whole["tensor"], styles(model, job.tensor_plan()))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not cuda:  # gloo has no mean of its own
        for module in (*model.blocks, model):
            module.set_gradient_divide_factor(cells)
            module.set_force_sum_reduction_for_comms(True)
    optimizer = job.optimizer(model)
    order = np.random.default_rng(0).permutation(len(data))
    share = arguments.global_size // cells
    each = share // arguments.passes
    times, cpu = [], []
    for step in range(arguments.steps):
        optimizer.zero_grad(set_to_none=True)
        first = (step * arguments.global_size + rank // arguments.tensor * share) % (len(data) - arguments.global_size)
        for i in range(arguments.passes):
            ids = order[first + i * each : first + (i + 1) * each].tolist()
            x, y = job.collate_fn(data.__getitems__(ids))
            loss, weight, _ = job.loss(model, (x.to(device), y.to(device)))
            (loss / (weight * arguments.passes)).backward()
        clip(model, 1.0) if arguments.tensor > 1 else nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        times.append(time.time())
        cpu.append(time.process_time())
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident_peak_mib(os.getpid())
        Path(arguments.out).write_text(json.dumps({"times": times, "cpu": cpu, "peak_mib": peak}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
