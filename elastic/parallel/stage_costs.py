"""What the layers of a pipeline cost, counted by running them on fake tensors: no values, no memory, no device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elastic.compat.torch import CPU_ATTENTION, FakeTensorMode, own_parameters, storage_identity, tree_map_only
from elastic.parallel.stages import Layers
from elastic.parallel.standin import calls_of
from elastic.seeds import unseeded


@dataclass(frozen=True)
class LayerCost:
    """What a layer takes for a microbatch.

    Args:
        flops: of its forward pass, counted by `torch.utils.flop_counter`: matrix products, convolutions, attention.
        kept: bytes that it keeps for its backward pass, parameters aside.
    """

    flops: int
    kept: int


def costs_of(job: Any, model: nn.Module, layers: Layers, batch: Any) -> list[int]:
    """What each layer costs, for `cut`: its FLOPs for a microbatch, or its parameters where these cannot be counted.

    Args:
        model: as built; nothing of it changes.
        batch: a microbatch; None if there is none.
    """
    found = counted(job, model, layers, batch) if batch is not None else None
    if found is None or not any(one.flops for one in found):
        return [parameters_of(layer) for layer in layers.modules]
    return [1 + one.flops for one in found]


def parameters_of(layer: nn.Module) -> int:
    """The parameters of a layer, each of which is multiplied with every token; those of embeddings are only looked
    up."""
    counted = (m for m in layer.modules() if not isinstance(m, nn.Embedding))
    return 1 + sum(p.numel() for m in counted for p in own_parameters(m).values() if p is not None)


def counted(job: Any, model: nn.Module, layers: Layers, batch: Any) -> list[LayerCost] | None:
    """Run a copy of the model on fake tensors for a microbatch, and count what each layer takes; None if that fails, as
    where the job's code looks at values."""
    try:
        with unseeded():
            return _count(copy.copy(job), model, layers, batch)
    except Exception:  # of the job's code, which the first step will run and report
        return None


def _count(job: Any, model: nn.Module, layers: Layers, batch: Any) -> list[LayerCost]:
    names = {id(module): name for name, module in model.named_modules()}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        clone = copy.deepcopy(model, {id(t): _fake(t) for t in (*model.parameters(), *model.buffers())}).train()
    inputs, named = calls_of(job.loss, clone, batch, named=layers.named)
    with mode:
        inputs, named = tree_map_only(torch.Tensor, _fake, (inputs, named))
    known = {storage_identity(t) for t in clone.parameters()}
    flops, kept, held = [0] * len(layers.modules), [0] * len(layers.modules), []
    present: list[int] = []  # the layer that runs

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if present and (storage := storage_identity(tensor)) not in known:
            known.add(storage)
            kept[present[-1]] += tensor.untyped_storage().nbytes()
        held.append(tensor)  # so that no other memory gets its place
        return tensor

    def begin(layer: int) -> Callable[..., None]:
        def call(*_: Any) -> None:
            present.append(layer)
            flops[layer] -= counter.get_total_flops()

        return call

    def end(layer: int) -> Callable[..., None]:
        def call(*_: Any) -> None:
            present.pop()
            flops[layer] += counter.get_total_flops()

        return call

    for i, layer in enumerate(layers.modules):
        module = clone.get_submodule(names[id(layer)])
        module.register_forward_pre_hook(begin(i))
        module.register_forward_hook(end(i))
    counter: Any = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention})
    with mode, counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        clone(*inputs, **named)
    return [LayerCost(*pair) for pair in zip(flops, kept, strict=True)]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
