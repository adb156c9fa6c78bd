"""Placing a model: whole on one device, or sharded over the workers of a mesh by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from elastic.compat.torch import (
    base_of,
    copies_cut_module,
    is_cut_after_another,
    mixes_cut_and_whole,
    own_buffers,
    tree_map_only,
)
from elastic.compat.torch_groups import all_gather_flat
from elastic.compat.torch_sharded import drop_gathered_ahead, end_blocks_in_order, without_backward
from elastic.errors import ConfigError
from elastic.parallel.deferred import DeferredModel, become
from elastic.parallel.layout import REPLICATE, ROWS, SHARD, TENSOR
from elastic.parallel.mesh import Mesh, axis_of
from elastic.parallel.tensor import Plan, cut_over_cells
from elastic.placement import Box, Cut, narrowed

T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 is used.

    Args:
        native: FSDP2 itself reduces over copies of the model.
        prefetch: number of blocks to gather ahead; 0 leaves it to FSDP2.
        param_dtype, reduce_dtype: None for the parameters' own.
    """

    native: bool = True
    reshard_after_forward: bool = True
    prefetch: int = 0
    offload: bool = False
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None


def cut_of(name: str, tensor: torch.Tensor) -> Cut:
    """How a tensor of the state is cut over the workers of a copy of the model: over those of a cell first, then the
    parts over cells; empty if each worker has it whole.

    Raises:
        ConfigError: its layout cannot be saved, such as one term of a sum on each worker.
    """
    if not isinstance(tensor, DTensor) or all(p.is_replicate() for p in tensor.placements):
        return ()
    lies: dict[str, Placement] = dict(zip(_axes(tensor), tensor.placements, strict=True))
    within, rows = lies.pop(TENSOR, Replicate()), lies.pop(SHARD, Replicate())
    cut: Cut = ((TENSOR, within.dim),) if isinstance(within, Shard) else ()
    as_rows = is_cut_after_another(rows, 0) if cut == ((TENSOR, 0),) else rows.is_shard(0)
    others = [*lies.values(), *([] if cut else [within]), *([] if as_rows else [rows])]
    if not all(p.is_replicate() for p in others):
        raise ConfigError(
            f"{name} lies over the workers as {tensor.placements}, but state is kept whole or cut along its first "
            "dimension; use an optimizer that works element by element, or --parallel.strategy ddp"
        )
    return (*cut, *ROWS) if as_rows else cut


def placement_in_cell(tensor: torch.Tensor) -> Placement | None:
    """How a tensor of the model lies over the workers of a cell; None where these know nothing of each other."""
    if not isinstance(tensor, DTensor):
        return None
    return dict(zip(_axes(tensor), tensor.placements, strict=True)).get(TENSOR)


def is_gathered(parameter: torch.Tensor) -> bool:
    """Whether a parameter is whole here, or all of what a worker of a cell has of it: FSDP2 has gathered it."""
    return not isinstance(parameter, DTensor) or SHARD not in _axes(parameter)


def _axes(tensor: DTensor) -> tuple[str, ...]:
    """The axes over which a tensor lies, in the order of its placements."""
    names = tensor.device_mesh.mesh_dim_names or (REPLICATE, SHARD)[-len(tensor.placements) :]
    return tuple(map(axis_of, names))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's shard of a tensor, or a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The whole of a tensor. If it is cut, all workers of the copy call this at the same time."""
    cut, mine = cut_of("a tensor of the state", tensor), local(tensor).detach()
    boxes = [part.box(tensor.shape, cut) for part in mesh.part.siblings]
    if not cut or len(boxes) == 1:
        return mine
    gathered = mine.new_zeros(max(box.volume for box in boxes), device=mesh.rows.device_type)  # it may be offloaded
    gathered[: mine.numel()] = mine.reshape(-1)
    groups = [mesh.cells.get_group()] if mesh.layout.tensor > 1 else []
    for group in [*groups, mesh.row_group]:  # the last axis of a part first
        everyone = gathered.new_empty(dist.get_world_size(group) * len(gathered))
        all_gather_flat(everyone, gathered, group=group)
        gathered = everyone
    found = mine.new_empty(tensor.shape, device=gathered.device)
    for box, rows in zip(boxes, gathered.view(len(boxes), -1)):
        narrowed(found, box, Box.whole(tuple(tensor.shape))).copy_(rows[: box.volume].view(box.sizes))
    return found


def place_whole(built: DeferredModel, device: torch.device) -> nn.Module:
    """Fill a model, whole, on a device, and modules that `model()` made besides it."""
    built.fill(device)
    for module in (built.model, *built.others):
        move(module, device)
    return built.model


def lay_out_as_cut(model: nn.Module) -> None:
    """Give parameters the strides that they have where the model is cut. Of a contiguous tensor with dimensions of
    size 1 several are possible (`torch.channels_last` takes others), by which torch chooses kernels with other bits."""
    for p in model.parameters():
        strides = torch.empty(p.shape, device="meta").stride()
        if p.is_contiguous() and p.stride() != strides:
            p.data = p.data.as_strided(p.shape, strides)


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module that has values to a device. Buffers stay the same objects, as parameters do by themselves."""
    for buffer in module.buffers():
        if buffer.device != device:
            become(buffer, buffer.to(device))
    module.to(device)


def place_sharded(
    built: DeferredModel,
    blocks: Sequence[nn.Module],
    device: torch.device,
    mesh: Mesh,
    how: Sharding,
    *,
    fill: bool,
    sourced: Mapping[str, Callable[[torch.Tensor], None]] = MappingProxyType({}),
    plan: Plan = MappingProxyType({}),
) -> nn.Module:
    """Shard a model over the mesh.

    Args:
        blocks: modules that are gathered one by one.
        fill: give parameters their initial values; otherwise a saved state will be loaded. Buffers always get theirs.
        sourced: parameters that no saved state has, by name: they always get theirs, and this is called with the value.
        plan: what of the model is cut over the workers of a cell, if it has several.
    """
    model = built.model
    ties, marks = _ties(model), {name: dict(vars(p)) for name, p in model.named_parameters()}
    policy = MixedPrecisionPolicy(
        param_dtype=how.param_dtype,
        reduce_dtype=how.reduce_dtype or (torch.float32 if how.param_dtype is not None else None),
    )
    offload = CPUOffloadPolicy() if how.offload else OffloadPolicy()
    devices = mesh.copies if how.native else mesh.rows
    if mesh.layout.tensor > 1:
        cut_over_cells(model, plan, mesh.cells, ties)
        for module in [*blocks, model]:
            module.register_forward_hook(lambda module, args, output: tree_map_only(torch.Tensor, _no_view, output))
    for module in [*blocks, model]:
        root = module is model
        reshard = None if root and how.reshard_after_forward else how.reshard_after_forward
        fully_shard(module, mesh=devices, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)
    if how.prefetch:
        for i, block in enumerate(blocks):
            _fsdp(block).set_modules_to_forward_prefetch([_fsdp(b) for b in blocks[i + 1 : i + 1 + how.prefetch]])
            _fsdp(block).set_modules_to_backward_prefetch(
                [_fsdp(b) for b in reversed(blocks[max(0, i - how.prefetch) : i])]
            )
    _fsdp(model).set_reduce_scatter_unused_params(True)
    for wrapped in fsdp_modules(model):
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)
    end_blocks_in_order(model)
    model.to_empty(device="cpu" if how.offload else device)
    if how.offload:  # only parameters are offloaded: buffers are used where the model runs
        for module in model.modules():
            for key, buffer in own_buffers(module).items():
                if buffer is not None:
                    own_buffers(module)[key] = torch.empty_like(buffer, device=device)
    _tie_again(model, ties)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vars(parameter).update(marks[name])  # attributes by which the job may group parameters for its optimizer
            if fill or name in sourced:
                box, value = mesh.part.box(parameter.shape, cut_of(name, parameter)), built.value(name)
                local(parameter).copy_(narrowed(value, box, Box.whole(tuple(parameter.shape))))
                if name in sourced:
                    sourced[name](value)
        for name, buffer in model.named_buffers():
            buffer.copy_(built.value(name))
    built.fill(device)
    for module in built.others:
        move(module, device)
    return model


def call_gathered(model: nn.Module, work: Callable[[], T]) -> T:
    """Call code of the job that uses a model in forward passes, with the parameters outside of blocks gathered.

    FSDP2 gathers them for `forward()` only, but the job may call other methods of the model, its submodules, or use
    parameters.

    Raises:
        ConfigError: the result was computed from parameters of a block, outside of that block; or the code runs a
            backward pass, after which FSDP2 frees what is gathered, under whoever still uses it.
    """
    if not isinstance(model, FSDPModule):
        return work()
    name = "_with_parameters_gathered"

    def run() -> Any:  # it takes no arguments, since FSDP2 would cast them
        with without_backward(_refuse_backward):
            return tree_map_only(torch.Tensor, _returned, work())

    setattr(model, name, run)
    try:
        register_fsdp_forward_method(model, name)
        return getattr(model, name)()
    except Exception:
        let_go(model)
        raise
    finally:
        model.__dict__.pop(name, None)


def _refuse_backward() -> ConfigError:
    return ConfigError(
        "the job runs a backward pass of its own (backward() or torch.autograd.grad()), after which a model that is "
        "cut over the workers is no longer gathered; add all that is to be learned to the loss, and for gradients of "
        "gradients use --parallel.strategy ddp"
    )


MIXED = (
    "whole tensors are mixed with parameters of the model, of which each worker has rows only, outside of the "
    "forward() that they belong to; with --parallel.strategy fsdp and hsdp, and with --parallel.pipeline, use "
    "parameters in forward(), and make what is kept beside them of them (p.detach().clone() in optimizer()), or use "
    "ddp without pipelines"
)
_COPIED = (
    "the model is copied with deepcopy, which with --parallel.strategy fsdp and hsdp does not go; keep copies of its "
    "parameters ({name: p.detach().clone() for name, p in model.named_parameters()}), or use ddp"
)


def refused_where_sharded(error: BaseException) -> str | None:
    """The explanation of an error that code of the job gets because parameters are sharded; None for other errors."""
    if mixes_cut_and_whole(error):
        return MIXED
    if copies_cut_module(error):
        return _COPIED
    return None


def let_go(model: nn.Module) -> None:
    """Put this worker's shards back in place of parameters that an interrupted pass left gathered."""
    model.state_dict()  # FSDP2 does so before it, in whatever state it is; its own `reshard` does not always


def reshard(model: nn.Module) -> None:
    """Free parameters that forward passes without a backward pass left gathered, and what was gathered ahead."""
    for module in fsdp_modules(model):
        module.reshard()
        drop_gathered_ahead(module)  # type: ignore[arg-type]


def _returned(tensor: torch.Tensor) -> torch.Tensor:
    """Return no view: FSDP2 puts a hook on the result, which an in-place operation on a view would drop."""
    if isinstance(tensor, DTensor):  # a number and a sharded tensor give one, which is not the sum of anything
        raise ConfigError(MIXED)
    return _no_view(tensor)


def _no_view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if base_of(tensor) is not None and tensor.requires_grad else tensor


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that were sharded by themselves, the root included."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def _ties(model: nn.Module) -> dict[str, str]:
    """Parameters and buffers that several modules share: further name -> first name."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {name: other for name, other in found.items() if name != other}


def _tie_again(model: nn.Module, ties: dict[str, str]) -> None:
    """Share tensors again, since `to_empty` gives every module a tensor of its own."""
    for name, first in ties.items():
        path, _, leaf = name.rpartition(".")
        other, _, kept = first.rpartition(".")
        setattr(model.get_submodule(path), leaf, getattr(model.get_submodule(other), kept))
