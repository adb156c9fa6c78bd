"""Names of torch beyond its public interface, and names that differ between its versions.

Read in torch 2.13; 2.11 is the oldest version that works. Functions that a step calls for each tensor are bound
directly, without a wrapper. Functions that compiled code may call are Python functions, which the compiler traces.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "is_traceable_wrapper_subclass",
    "tree_flatten",
    "tree_map",
    "tree_map_only",
]

# ---- tensors -------------------------------------------------------------------------------------------------------

version_of: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""How often a tensor, or one that shares its memory, was written to in place: autograd's counter.

There is no public counter. Writes through `.data`, and by kernels of running statistics, do not change it.
"""

_DATA: Any = torch.Tensor.data  # the attribute as torch has it


@contextmanager
def counting_data(but: Collection[int] = ()) -> Iterator[None]:
    """Inside, writes through `parameter.data`, and another address that it is given, move the parameter's counter, as
    those through `parameter.detach()` do. `but`: the ids of parameters for which that is as outside."""

    def get(parameter: nn.Parameter) -> torch.Tensor:
        return _DATA.__get__(parameter) if id(parameter) in but else parameter.detach()

    def put(parameter: nn.Parameter, value: torch.Tensor) -> None:
        before = parameter.data_ptr()
        _DATA.__set__(parameter, value)
        if parameter.data_ptr() != before and id(parameter) not in but:
            torch.autograd.graph.increment_version(parameter)

    nn.Parameter.data = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Parameter.data


add_each_: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = torch._foreach_add_
"""Add the second tensors to the first in place, in one kernel for many; each pair has equal shapes.

Elementwise, so it has the bits of a loop of `add_`. torch's own optimizers use it; there is no public one.
"""

multiply_each_: Callable[[list[torch.Tensor], float], None] = torch._foreach_mul_
"""Multiply all tensors by one number in place, in one kernel for many; with the bits of a loop of `mul_`."""


def norm_of_each(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The L2 norm of each tensor: scalars of the tensors' dtype, on their device; of tensors in 16 bits in float32, as
    a norm in so few digits is off by up to 0.4 %, and in float16 is infinite from 65,504 on."""
    if not tensors:  # a step in which no pass used a parameter
        return []
    short = [t.dtype in (torch.bfloat16, torch.float16) for t in tensors]
    if not any(short):
        return list(torch._foreach_norm(tensors))
    if all(short):
        return list(torch._foreach_norm(tensors, 2.0, dtype=torch.float32))
    return [torch.linalg.vector_norm(t, dtype=torch.float32 if s else None) for t, s in zip(tensors, short)]


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor of which autograd considers this one a view, or None."""
    return tensor._base


def storage_identity(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory. On meta, where all addresses are 0, for those that would share it."""
    return tensor.untyped_storage()._cdata


def values_of_sparse(gradient: torch.Tensor) -> torch.Tensor:
    """The values of a sparse COO tensor, each index once: shape (indices, *dense dimensions), same dtype.

    They share its memory. Unlike the public `values()`, this is no operation for autograd.
    """
    return gradient.coalesce()._values()


def gradient_hooks(tensor: torch.Tensor) -> tuple[Any, Any]:
    """The hooks on a tensor's gradient, before and after accumulation; None or empty if there are none."""
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


def set_gradient_hooks(tensor: torch.Tensor, hooks: tuple[Any, Any]) -> None:
    """Give a tensor the hooks of another, as `gradient_hooks` returned them."""
    tensor._backward_hooks, tensor._post_accumulate_grad_hooks = hooks


def use_count(tensor: torch.Tensor) -> int:
    """How many C++ owners the tensor has: its Python object, its views, nodes of the graph. `torch.utils.swap_tensors`
    refuses a tensor with other owners than its Python object."""
    return tensor._use_count()  # type: ignore[attr-defined]


# ---- operations ----------------------------------------------------------------------------------------------------


def makes_tensors(function: Callable[..., Any]) -> bool:
    """Whether a function of torch makes a new tensor and takes `device`, as `with device:` decides it."""
    return function in _device_constructors()


def written_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call that the operation (an `OpOverload`) writes to, according to its schema."""
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
    """Inside, `nn.init.trunc_normal_`, under any imported name, calls `wrap(inner)` instead of its inner function
    `(tensor, mean, std, a, b, generator=...) -> tensor`. If this torch has no such function, nothing is wrapped."""
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
    """Keep torch.jit from specialising functions: its code, and so the bits, would depend on how often this process ran
    them.

    The public `torch.jit.optimized_execution` affects one thread only, and only inside a `with`.
    """
    torch._C._jit_set_profiling_executor(False)
    torch._C._set_graph_executor_optimize(False)


# ---- modules -------------------------------------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters, by attribute; writing to this dict skips the checks of `setattr`.

    The value is None for a parameter registered as None. For a ScriptModule it is no dict, and has no `get`.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """A module's own buffers, by attribute; otherwise as `own_parameters`."""
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children, by attribute, including repeated ones; otherwise as `own_parameters`."""
    return module._modules


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Attributes of a module's own buffers that were registered with persistent=False."""
    return module._non_persistent_buffers_set


#: The attributes with these three dictionaries of a module.
OWN_DICTS = ("_parameters", "_buffers", "_modules")

#: Layers with running statistics; they have no public base class. Their kernels write to the statistics without
#: changing the counter of `version_of`.
NormWithStatistics: type[nn.Module] = _NormBase

#: Attention on a CPU, which `FlopCounterMode` does not count by itself.
CPU_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

#: The last component of the key at which a state dict has the result of a module's `get_extra_state`.
EXTRA_STATE = _EXTRA_STATE_KEY_SUFFIX

#: Wrappers (module, class), and the attribute in which each has the wrapped module. By name, since importing
#: `torch._dynamo` takes as long as importing torch.
WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
}


def flat_weights(module: nn.RNNBase) -> list[torch.Tensor | None]:
    """The list in which a recurrent layer keeps its parameters a second time, and with which it computes."""
    return module._flat_weights


def list_weights_again(module: nn.RNNBase) -> None:
    """After a recurrent layer's parameters were replaced: have it compute with the present ones."""
    module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]


def forget_weak_weights(module: nn.RNNBase) -> None:
    """Drop a recurrent layer's weak references to its parameters, which would forbid swapping these. The layer makes
    them again when it is moved to a device."""
    module._flat_weight_refs = []


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `module.compile()` or `torch.compile(module)`."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def has_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a torch scheduler was made for an optimizer: it wraps `step` to count calls, and marks the wrapper."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether other code runs inside `step()`: hooks before or behind it, or what was put in its place, schedulers
    aside."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    of_all = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
    step = vars(optimizer).get("step")  # a scheduler's wrapper has another step within if the job had replaced it
    of_scheduler = getattr(step, "__globals__", {}).get("__name__") == torch.optim.lr_scheduler.__name__
    replaced = step is not None and not (of_scheduler and step.__wrapped__ is type(optimizer).step)
    return any(own) or any(of_all) or replaced


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Say that an optimizer was stepped: its schedulers are, as often as needed, and would warn of coming first."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


# ---- torch.compile -------------------------------------------------------------------------------------------------

#: Compiler settings that make torch choose code by measuring it.
AUTOTUNING = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning")


def is_compiler_loaded() -> bool:
    """Whether this process may have compiled anything. Does not load the compiler, which takes seconds."""
    return "torch._dynamo" in sys.modules


def load_compiler() -> None:
    """Import what the first step of an optimizer imports: as long as torch itself takes."""
    import torch._dynamo  # noqa: F401


def limit_recompiles(limit: int) -> None:
    """Compile at most `limit` variants of one function's code, and raise beyond that: torch would continue uncompiled,
    with other bits."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = limit, True


def autotuning() -> str | None:
    """The full name of the first compiler setting that is on and makes torch choose the fastest code by measuring; None
    if all are off."""
    import torch._inductor.config as inductor

    found = next((name for name in AUTOTUNING if getattr(inductor, name, False)), None)
    return None if found is None else f"{inductor.__name__}.{found}"


# ---- how tensors lie over workers ----------------------------------------------------------------------------------


def is_cut_after_another(placement: Any, dimension: int) -> bool:
    """Whether this placement of a DTensor cuts a dimension of the parts that a later axis of the mesh has cut along the
    same dimension, as FSDP2 does with what tensor parallelism has cut."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard) and placement.dim == dimension


# ---- errors that only their text identifies ------------------------------------------------------------------------


def mixes_cut_and_whole(error: BaseException) -> bool:
    """Whether an operation got sharded tensors together with tensors that are not sharded."""
    return isinstance(error, RuntimeError) and "got mixed torch.Tensor and DTensor" in str(error)


def copies_cut_module(error: BaseException) -> bool:
    """Whether code tried to copy a module that FSDP2 has sharded."""
    return isinstance(error, AssertionError) and "FSDP does not support deepcopy" in str(error)


def is_unfit_view(error: RuntimeError) -> bool:
    """Whether a view or reshape asked for another number of elements than there are."""
    return "is invalid for input of size" in str(error)


def lacks_sharding(error: BaseException) -> bool:
    """Whether torch does not implement an operation for sharded tensors."""
    return any(words in str(error) for words in ("sharding strategy", "Sharding propagation failed"))


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether the host has no memory left for a tensor; torch raises a plain RuntimeError for that."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
