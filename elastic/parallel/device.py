"""The device of a worker, and the settings that make its arithmetic repeatable."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from elastic.compat.torch import stop_script_from_specialising


def prepare_process(*, bitwise: bool, threads: int) -> None:
    """Make the settings that must precede the first CUDA call.

    `threads` is torch's thread count on the CPU. Sums over threads depend on it, so all members of a bitwise world must
    have the same.
    """
    torch.set_num_threads(threads)
    if bitwise:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        stop_script_from_specialising()


def stop_filling() -> None:
    """Leave new tensors uninitialised. With bitwise settings torch fills them with NaN, so that trying out the job
    shows code that reads before it writes; in training that would cost a write for every gathered parameter and
    buffer."""
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False


class ZerosForEmpty(TorchFunctionMode):
    """Returns zeros where torch's functions would return uninitialised memory."""

    _MAKE = frozenset(
        {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return made.zero_() if function in self._MAKE else made


def pick_device(accelerator: str, local_index: int) -> torch.device:
    """The worker's device; with CUDA it becomes the current one. If there are more plain processes than GPUs, they
    share them, as on a developer's machine: NCCL takes such processes for workers of other hosts."""
    if accelerator != "gpu":
        return torch.device("cpu")
    round_, index = divmod(local_index, torch.cuda.device_count() or 1)
    if round_:
        os.environ.setdefault("NCCL_HOSTID", f"{platform.node()}-{round_}")  # NCCL refuses one device twice on a host
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What two workers must have in common to compute the same bits, as plain JSON."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    found = {"type": device.type, "name": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {
            "driver": nvidia_driver(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
            "cublas": _cublas(),
        }
    return {**found, "precision": _precision(device.type)}


def _precision(kind: str) -> str:
    """How float32 products and convolutions are rounded on such a device, as the job has set it."""
    backends: Any = torch.backends
    if kind == "cuda":
        matmul = backends.cuda.matmul
        parts = {
            "matmul": matmul.fp32_precision,
            "conv": backends.cudnn.conv.fp32_precision,
            "rnn": backends.cudnn.rnn.fp32_precision,
            "reduced": (
                matmul.allow_bf16_reduced_precision_reduction,
                matmul.allow_fp16_reduced_precision_reduction,
                matmul.allow_fp16_accumulation,
            ),
        }
    else:
        parts = {"matmul": backends.mkldnn.matmul.fp32_precision, "conv": backends.mkldnn.conv.fp32_precision}
    return " ".join(f"{what}={'ieee' if how == 'none' else how}" for what, how in parts.items())


def _cublas() -> str:
    """The version of cuBLAS in torch's wheels, otherwise that of the CUDA with which torch was built."""
    for name in ("nvidia-cublas", "nvidia-cublas-cu12"):
        with suppress(PackageNotFoundError):
            return version(name)
    return f"of CUDA {torch.version.cuda}"


def nvidia_driver() -> str:
    """The version of NVIDIA's kernel driver; empty if there is none."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", file.read())
    except FileNotFoundError:
        return ""
    return found[1] if found else ""


def memory_share(device: torch.device) -> float | None:
    """The largest share of the device's memory that tensors took; None on CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


def host_wait(device: torch.device) -> None:
    """Wait until all work is done that was enqueued on the device's current stream."""
    synchronize = getattr(torch.get_device_module(device).current_stream(device), "synchronize", None)
    if synchronize is not None:  # otherwise the device has no queues: all work was done when its call returned
        synchronize()


def synchronize(device: torch.device) -> None:
    """Wait until all work is done that was enqueued on any stream of the device.

    Raises:
        RuntimeError: some work failed, after which this process cannot use the device any more.
    """
    torch.get_device_module(device).synchronize(device)
