"""What is used of torch beyond its public interface, and what is named differently in its versions.

Read in torch 2.13; 2.11 is the oldest that works. What a step uses of each tensor is bound here as it is, without a
function around it. What compiled code may run are functions, which the compiler goes into.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

__all__ = ["TorchDispatchMode", "is_traceable_wrapper_subclass", "tree_flatten", "tree_map", "tree_map_only"]

# ---- tensors -------------------------------------------------------------------------------------------------------

version_of: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""How often a tensor (or one that shares its memory) was written to in place: autograd's counter.

Nothing public counts writes. Writes through `.data`, and by kernels of running statistics, do not move it.
"""

add_each_: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = torch._foreach_add_
"""Add the second tensors to the first in place, in one kernel for many; shapes are equal pair by pair.

Element by element, so with the bits of a loop of `add_`. Used by torch's own optimizers; there is no public one.
"""

multiply_each_: Callable[[list[torch.Tensor], float], None] = torch._foreach_mul_
"""Multiply all tensors by one number in place, in one kernel for many; with the bits of a loop of `mul_`."""

norm_of_each: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]] = torch._foreach_norm
"""The L2 norm of each tensor: scalars of the tensors' dtype, on their device."""


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that autograd takes this one for a view of, or None."""
    return tensor._base


def storage_identity(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, or would if they had any: on meta all addresses are 0."""
    return tensor.untyped_storage()._cdata


def values_of_sparse(gradient: torch.Tensor) -> torch.Tensor:
    """The values of a sparse COO tensor, each index once: shape (indices, *dense dimensions), its dtype.

    The same memory, and no operation for autograd, which the public `values()` is.
    """
    return gradient.coalesce()._values()


def gradient_hooks(tensor: torch.Tensor) -> tuple[Any, Any]:
    """The hooks on a tensor's gradient, before and after it is accumulated; None, or empty, where there are none."""
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


def set_gradient_hooks(tensor: torch.Tensor, hooks: tuple[Any, Any]) -> None:
    """Give a tensor the hooks of another, as `gradient_hooks` returned them."""
    tensor._backward_hooks, tensor._post_accumulate_grad_hooks = hooks


def use_count(tensor: torch.Tensor) -> int:
    """How many in C++ hold the tensor: its Python object, views of it, nodes of the graph. `torch.utils.swap_tensors`
    refuses what more than its Python object holds."""
    return tensor._use_count()  # type: ignore[attr-defined]


# ---- operations ----------------------------------------------------------------------------------------------------


def makes_tensors(function: Callable[..., Any]) -> bool:
    """Whether a function of torch makes a tensor from nothing and takes `device`: what `with device:` looks at."""
    return function in _device_constructors()


def written_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an operation (an `OpOverload`) writes to of the arguments that it is called with, by its schema."""
    schema = function._schema
    if not schema.is_mutable:
        return []
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    return [value for writes, value in zip(written, args) if writes] + [
        kwargs[argument.name]
        for writes, argument in zip(written, schema.arguments)
        if writes and argument.name in kwargs
    ]


@contextmanager
def trunc_normal_wrapped(wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Inside, `nn.init.trunc_normal_`, under whatever name it was imported, calls what `wrap` makes of its inside:
    `(tensor, mean, std, a, b, generator=...) -> tensor`. Nothing is wrapped in a torch that has no such inside."""
    name = "_no_grad_trunc_normal_"
    kept = getattr(nn.init, name, None)
    if kept is None:
        yield
        return
    setattr(nn.init, name, wrap(kept))
    try:
        yield
    finally:
        setattr(nn.init, name, kept)


def stop_script_from_specialising() -> None:
    """What torch.jit makes of a function depends on how often this process has run it, and so do its bits: not now.

    The public `torch.jit.optimized_execution` holds for one thread, and inside a `with`.
    """
    torch._C._jit_set_profiling_executor(False)
    torch._C._set_graph_executor_optimize(False)


# ---- modules -------------------------------------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module itself has, by attribute; writing to it replaces one without what `setattr` checks.

    None for those that are registered as None. Of a ScriptModule it is no dict, and has no `get`.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers that a module itself has, by attribute, as `own_parameters`."""
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module itself has, by attribute, as `own_parameters`; also those that it has twice."""
    return module._modules


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Attributes of the buffers that a module itself has and that were registered with persistent=False."""
    return module._non_persistent_buffers_set


#: Under which attributes every module has these three.
OWN_DICTS = ("_parameters", "_buffers", "_modules")

#: Layers with running statistics, of which a common public class does not exist. Kernels write to those statistics
#: without moving the counter of `version_of`.
NormWithStatistics: type[nn.Module] = _NormBase

#: The last part of the key under which a state dict has what a module's `get_extra_state` returned.
EXTRA_STATE = _EXTRA_STATE_KEY_SUFFIX

#: Wrappers (module, class), and the attributes under which they have the module that they wrap. By name: importing
#: `torch._dynamo` takes as long as torch itself.
WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
}


def flat_weights(module: nn.RNNBase) -> list[torch.Tensor | None]:
    """The list in which a recurrent layer keeps its parameters as well; what it computes with."""
    return module._flat_weights


def list_weights_again(module: nn.RNNBase) -> None:
    """A recurrent layer's parameters were replaced: have it compute with those it has now."""
    module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]


def forget_weak_weights(module: nn.RNNBase) -> None:
    """Drop the weak references that a recurrent layer has to its parameters, which could not be swapped with them;
    it makes them again when it is moved to a device."""
    module._flat_weight_refs = []


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `module.compile()` or `torch.compile(module)`."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def has_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scheduler of torch's was made for an optimizer: it wraps `step` to count calls, and marks it."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


# ---- torch.compile -------------------------------------------------------------------------------------------------

#: Settings of torch's compiler by which it measures what to generate.
AUTOTUNING = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning")


def is_compiler_loaded() -> bool:
    """Whether anything in this process may be compiled; without loading the compiler, which takes seconds."""
    return "torch._dynamo" in sys.modules


def limit_recompiles(limit: int) -> None:
    """Compile at most `limit` variants of the code of one function, and fail then: torch would go on uncompiled, with
    other bits."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = limit, True


def autotuning() -> str | None:
    """The setting of torch's compiler that is on and has it take what is fastest where it is tried, by its whole name;
    None where all are off."""
    import torch._inductor.config as inductor

    found = next((name for name in AUTOTUNING if getattr(inductor, name, False)), None)
    return None if found is None else f"{inductor.__name__}.{found}"


# ---- process groups ------------------------------------------------------------------------------------------------

#: The gather of equal flat tensors, under the name that this torch has for it (renamed in 2.13).
all_gather_flat: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: What tells DDP not to send buffers in forward passes, under the name that this torch has for it (renamed in 2.13).
NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}

#: Name of the threads in which gloo's operations are carried out, as the kernel has it (15 letters at most).
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
    "_allgather_base",  # this and what follows are older names, which torch 2.13 has beside its own
    "_reduce_scatter_base",
    "allgather_into_tensor_coalesced",
    "alltoall_base",
    "reduce_scatter_tensor_coalesced",
)
#: The methods of a process group that start an operation which gloo has, in this torch.
GLOO_OPERATIONS = tuple(name for name in _OPERATIONS if hasattr(dist.ProcessGroup, name))


def leaves_unused_gradients() -> bool:
    """Whether FSDP2 reduces gradients also of parameters that got none on some worker (from 2.13 on)."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def count_groups_from_zero() -> None:
    """Name the next process group 0, in this process. Members find each other under names that count up, and failing
    to connect leaves the count behind, in some members only."""
    dist.distributed_c10d._world.group_count = 0


def process_groups() -> list[dist.ProcessGroup]:
    """All groups of this process that torch knows, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_names)


def forget_groups() -> None:
    """Have torch know of no group any more, as `destroy_process_group` does, which would wait for other members."""
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


def failure_of_group(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """What the backend of a group found wrong with it on the side, by torch's name; None for nothing, and for backends
    that do not tell. Waits for no device."""
    get_error = getattr(group._get_backend(device), "get_error", None)
    if get_error is None:
        return None
    name = str(getattr(get_error(), "name", ""))
    return None if name in ("", "SUCCESS") else name


def check_reduced(ddp: nn.parallel.DistributedDataParallel) -> None:
    """See whether DDP has reduced the gradients of the backward pass that has just ended.

    Raises:
        RuntimeError: not all, since some parameters got none.
    """
    ddp.reducer._check_reducer_finalized()


class PythonWork(dist.Work):
    """An operation under way, in Python. A class of its own, for the private name by which C++ asks for the source."""

    def source_rank(self) -> int:
        """The rank that a receive has come from; -1 for none."""
        raise NotImplementedError

    def _source_rank(self) -> int:
        return self.source_rank()


def source_rank(work: dist.Work) -> int:
    """The rank that a finished receive has come from.

    Raises:
        RuntimeError: it is no receive.
    """
    return work._source_rank()


class AroundGroup(dist.ProcessGroup):
    """A process group around another one, `inner`, whose operations a subclass defines.

    Overrides by which C++ and `torch.distributed` ask a group for its name, its devices and its backend.
    """

    inner: dist.ProcessGroup

    def __init__(self, rank: int, size: int):
        super().__init__(rank, size)  # type: ignore[call-arg]  # the one that Python classes may inherit

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


# ---- errors that torch tells by their text alone -------------------------------------------------------------------


def mixes_cut_and_whole(error: BaseException) -> bool:
    """Whether an operation was given tensors that are cut over workers together with such that are not."""
    return isinstance(error, RuntimeError) and "got mixed torch.Tensor and DTensor" in str(error)


def copies_cut_module(error: BaseException) -> bool:
    """Whether a module that FSDP2 has cut was to be copied."""
    return isinstance(error, AssertionError) and "FSDP does not support deepcopy" in str(error)


def lacks_sharding(error: BaseException) -> bool:
    """Whether torch has no way to do something with tensors that are cut over workers."""
    return any(words in str(error) for words in ("sharding strategy", "Sharding propagation failed"))


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether a tensor found no room in the host's memory, for which torch raises a plain RuntimeError."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
