"""What is used of torch beyond its public interface, and what is named differently in its versions.

Read in torch 2.13; 2.11 is the oldest that works. What a step uses of each tensor is bound here as it is, without a
function around it. What compiled code may run are functions, which the compiler goes into.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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
