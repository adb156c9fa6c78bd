"""Settings of NCCL, and of torch's watchdog over it, that a run needs: made where the user has not made them.

A process reads each of them when it makes its first group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """An environment variable. `why` is a text for people; `source` says how it is known."""

    name: str
    value: str
    why: str
    source: str


SETTINGS = (
    Setting(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "0",
        "torch's watchdog would end a worker whose peer was lost",
        "torch: ProcessGroupNCCL, ErrorHandling",
    ),
    Setting(
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
        "0",
        "the watchdog would sleep a minute on the first error, with a lock that every operation takes",
        "torch: Watchdog::runLoop",
    ),
    Setting(
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "0",
        "the watchdog would ask a world's store every second, which is gone once the world is over",
        "torch: HeartbeatMonitor",
    ),
    Setting(
        "TORCH_NCCL_ENABLE_MONITORING",
        "0",
        "the watchdog's monitor would end a worker whose abort takes long",
        "torch issue 155916",
    ),
    Setting(
        "TORCH_NCCL_RETHROW_CUDA_ERRORS",
        "0",
        "the watchdog would end a worker for an error of CUDA, which the worker's own thread meets",
        "nvidia-resiliency-ext, known issues",
    ),
    Setting(
        "TORCH_NCCL_USE_COMM_NONBLOCKING",
        "0",
        "exchanges between pairs fail with communicators that do not block: operation in progress",
        "measured on a H200, torch 2.11",
    ),
    Setting(
        "NCCL_NVLS_ENABLE",
        "0",
        "with it creation fails where multicast cannot be bound, uneven worlds hang, and aborts do not work",
        "NCCL issues 2077, 2385; nvidia-resiliency-ext, known issues",
    ),
)
INTERFACE = "NCCL_SOCKET_IFNAME"
WHY_INTERFACE = "NCCL would take the first interface that it finds, which other nodes may not reach"


def make_settings(interface: str | None) -> None:
    """Make the settings in this process; `interface` is the network interface of this node's address."""
    for setting in SETTINGS:
        os.environ.setdefault(setting.name, setting.value)
    if interface is not None:
        os.environ.setdefault(INTERFACE, f"={interface}")  # "=": without it NCCL takes all names that begin so


def describe_settings() -> list[tuple[str, str, str]]:
    """Name, value and reason of each setting, as workers with GPUs on this machine would have it; `(yours)` marks
    values that the user has set."""
    found = []
    for setting in SETTINGS:
        value = os.environ.get(setting.name, setting.value)
        yours = "" if value == setting.value else " (yours)"
        found.append((setting.name, value + yours, f"{setting.why} ({setting.source})"))
    own = os.environ.get(INTERFACE)
    found.append((INTERFACE, f"{own} (yours)" if own else "the one of the node's address", WHY_INTERFACE))
    return found


def settings_lines(accelerator: str) -> list[str]:
    """The lines about these settings that `--dry-run` prints.

    Args:
        accelerator: as in the run's options; with "auto" it is not known yet whether workers have GPUs.
    """
    if accelerator == "cpu":
        return []
    if accelerator == "auto":
        return [
            "",
            f"workers with GPUs set {len(SETTINGS) + 1} variables for NCCL; --scaling.accelerator gpu lists them",
        ]
    lines = ["", "set for NCCL in workers, where you have not:"]
    return lines + [f"  {name}={value}  {why}" for name, value, why in describe_settings()]
