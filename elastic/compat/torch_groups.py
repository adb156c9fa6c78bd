"""Names of torch's process groups beyond their public interface, and names that differ between torch's versions.

Read in torch 2.13; 2.11 is the oldest version that works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: The gather of equal flat tensors, by its name in this torch (renamed in 2.13).
all_gather_flat: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: The argument that keeps DDP from sending buffers in forward passes, by its name in this torch (renamed in 2.13).
NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}

#: Name of the threads that run gloo's operations, as the kernel shows it (at most 15 letters).
GLOO_THREAD = "pt_gloo_runloop"

_OPERATIONS = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "gather_into_tensor",  # this and the next from torch 2.14 on
    "gather_single",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "scatter",
    "send",
    "_allgather_base",  # this and the following are older names, which torch 2.13 has in addition
    "_reduce_scatter_base",
    "allgather_into_tensor_coalesced",
    "alltoall_base",
    "reduce_scatter_tensor_coalesced",
)
#: The methods of a process group that start an operation that gloo implements, in this torch.
GLOO_OPERATIONS = tuple(name for name in _OPERATIONS if hasattr(dist.ProcessGroup, name))


def leaves_unused_gradients() -> bool:
    """Whether FSDP2 also reduces gradients of parameters that got none on some worker (from torch 2.13 on)."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def count_groups_from_zero() -> None:
    """Give the next process group of this process the name 0. Members of a group find each other by a name that counts
    up, and a failed connection leaves the count higher in some members only."""
    dist.distributed_c10d._world.group_count = 0


def process_groups() -> list[dist.ProcessGroup]:
    """All groups of this process in torch's tables, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_names)


def forget_groups() -> None:
    """Remove all groups from torch's tables, as `destroy_process_group` does, which would wait for other members."""
    c10d: Any = dist.distributed_c10d
    world = c10d._world
    c10d._update_default_pg(None)
    for table in (
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.pg_to_tag,
        world.tags_to_pg,
        world.pg_coalesce_state,
    ):
        table.clear()
    c10d._unregister_all_process_groups()
    world.group_count = 0


def forget_meshes() -> None:
    """Let go of what torch keeps of DTensors on meshes that are no more: its caches have no bound."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


def failure_of_group(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """The name of the error that a group's backend found in the background; None if there is none, or if the backend
    does not report errors. Waits for no device."""
    get_error = getattr(group._get_backend(device), "get_error", None)
    if get_error is None:
        return None
    name = str(getattr(get_error(), "name", ""))
    return None if name in ("", "SUCCESS") else name


def check_reduced(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Check that DDP has reduced all gradients of the backward pass that has just ended.

    Raises:
        RuntimeError: some parameters got no gradient, so theirs were not reduced.
    """
    ddp.reducer._check_reducer_finalized()


class PythonWork(dist.Work):
    """A pending operation, in Python. It translates the private method name by which C++ asks for the source."""

    def source_rank(self) -> int:
        """The rank from which a receive came; -1 if it is no receive."""
        raise NotImplementedError

    def _source_rank(self) -> int:
        return self.source_rank()


def source_rank(work: dist.Work) -> int:
    """The rank from which a finished receive came.

    Raises:
        RuntimeError: the operation is no receive.
    """
    return work._source_rank()


class AroundGroup(dist.ProcessGroup):
    """A process group around another one, `inner`; a subclass defines its operations.

    It overrides the methods by which C++ and `torch.distributed` ask a group for its name, devices and backend.
    """

    inner: dist.ProcessGroup

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)  # type: ignore[call-arg]  # the constructor for Python subclasses

    def setGroupName(self, name: Any) -> None:
        self.inner._set_group_name(name)

    def getGroupName(self) -> str:
        return self.inner.group_name

    def setGroupDesc(self, description: str) -> None:
        self.inner._set_group_desc(description)

    def getGroupDesc(self) -> str:
        return self.inner.group_desc

    @property
    def _device_types(self) -> list[torch.device]:
        return self.inner._device_types

    def _get_backend(self, device: torch.device) -> Any:
        return self.inner._get_backend(device)


class AroundGloo(AroundGroup):
    """A process group for CPU tensors around a group of gloo."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        gloo._set_sequence_number_for_group()
        self.inner = dist.ProcessGroup(store, rank, size)
        self.inner._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self.inner._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
