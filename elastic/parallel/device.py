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
    """Settings that must be made before the first CUDA call.

    `threads` is torch's thread count on CPU; sums over threads depend on it, so it is part of what a bitwise world
    must share.
    """
    torch.set_num_threads(threads)
    if bitwise:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        stop_script_from_specialising()


def stop_filling() -> None:
    """Leave new tensors as they are. In bitwise torch writes NaN into them, so that who reads one before writing it is
    found when the job is tried; in training that costs one write more for every gathered parameter and buffer."""
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False


class ZerosForEmpty(TorchFunctionMode):
    """Gives zeros where torch's functions would give memory that nobody has written."""

    _MAKE = frozenset(
        {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return made.zero_() if function in self._MAKE else made


def pick_device(accelerator: str, local_index: int) -> torch.device:
    """The worker's device; also makes it CUDA's current one. Plain processes that are more than there are GPUs share
    them, as a developer's machine has one: NCCL takes those for workers of other machines."""
    if accelerator != "gpu":
        return torch.device("cpu")
    round_, index = divmod(local_index, torch.cuda.device_count() or 1)
    if round_:
        os.environ.setdefault("NCCL_HOSTID", f"{platform.node()}-{round_}")  # it refuses two of one device and host
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """What two workers must share to compute the same bits, as plain JSON."""
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
    """What the job set, or left, of how float32 products and convolutions are rounded on such a device."""
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
    """Version of the cuBLAS that torch's wheels brought, else of the CUDA that torch was built with."""
    for name in ("nvidia-cublas", "nvidia-cublas-cu12"):
        with suppress(PackageNotFoundError):
            return version(name)
    return f"of CUDA {torch.version.cuda}"


def nvidia_driver() -> str:
    """Version of NVIDIA's kernel driver; empty where there is none."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", file.read())
    except FileNotFoundError:
        return ""
    return found[1] if found else ""


def memory_share(device: torch.device) -> float | None:
    """Share of the device's memory that tensors took at most, or None on CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory


def host_wait(device: torch.device) -> None:
    """Wait until everything is done that was enqueued on the device's present stream."""
    synchronize = getattr(torch.get_device_module(device).current_stream(device), "synchronize", None)
    if synchronize is not None:  # else nothing is enqueued: it was done when the call returned
        synchronize()


def synchronize(device: torch.device) -> None:
    """Wait until everything is done that was enqueued on any stream of the device.

    Raises:
        RuntimeError: something of it failed, so that the device cannot be used by this process any more.
    """
    torch.get_device_module(device).synchronize(device)
