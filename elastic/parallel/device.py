"""The device of a worker, and the settings that make its arithmetic repeatable."""

from __future__ import annotations

import os
from typing import Any

import torch

from elastic.compat.torch import stop_script_from_specialising


def prepare_process(*, bitwise: bool, threads: int) -> None:
    """Settings that must be made before the first CUDA call.

    `threads` is torch's thread count on CPU; sums over threads depend on it, so it is part of what a bitwise world
    must share.
    """
    torch.set_num_threads(threads)
    if bitwise:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        stop_script_from_specialising()


def pick_device(accelerator: str, local_index: int) -> torch.device:
    """The worker's device; also makes it CUDA's current one."""
    if accelerator != "gpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_index)
    # torch's watchdog ends a process whose peer was lost, unless told not to; who was lost is told by others here.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What two workers must share to compute the same bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"type": device.type, "name": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def memory_share(device: torch.device) -> float | None:
    """Share of the device's memory that tensors took at most, or None on CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


def host_wait(device: torch.device) -> None:
    """Wait until everything enqueued on the device is done; on CPU it is."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
