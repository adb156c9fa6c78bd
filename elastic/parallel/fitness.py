"""Models that a strategy cannot train right, refused by name before anything is placed."""

from __future__ import annotations

import torch
from torch import nn

from elastic.compat.torch import gradient_hooks
from elastic.compat.torch_groups import leaves_unused_gradients
from elastic.errors import ConfigError


def check_dense(model: nn.Module) -> None:
    """Refuse layers with sparse gradients: only DDP's own reduction sums those.

    Raises:
        ConfigError: with the layer, and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ConfigError(
                f"{name} ({type(module).__name__}) is made with sparse=True, and sparse gradients are only summed with "
                "--parallel.strategy ddp in --run.exactness fast; leave it out, or use these"
            )


def check_unwritten(model: nn.Module) -> None:
    """Refuse layers that write to their own parameters in forward passes.

    Raises:
        ConfigError: with the layer, and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ConfigError(
                f"{name} ({type(module).__name__}) is made with max_norm={module.max_norm:g}, which changes its rows "
                "in forward passes, on each worker others; leave it out, and limit them in after_step()"
            )


def check_unhooked(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: a parameter of a model that is cut, or will be, has a hook on its gradient.
    """
    for name, p in model.named_parameters():
        if any(gradient_hooks(p)):
            raise ConfigError(
                f"parameter {name} has a hook on its gradient, which with --parallel.strategy fsdp and hsdp no worker "
                "has whole; set rows to be kept in after_step(), or use ddp"
            )


def check_shardable(model: nn.Module) -> None:
    """Refuse a model that FSDP2 cannot shard.

    Raises:
        ConfigError: a parameter without dimensions or elements, with gaps in memory, or with hooks; trained parameters
            of several dtypes; a ScriptModule; a container instead of a model.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{name or 'the model'} ({module.original_name}) is a ScriptModule, whose parameters cannot be "
                "sharded; leave torch.jit out (--parallel.compile does more), or use --parallel.strategy ddp"
            )
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        raise ConfigError(
            f"model() returns a {type(model).__name__}, which has no forward(), so it cannot be sharded; make it an "
            "attribute of a module with one, or use --parallel.strategy ddp"
        )
    check_unhooked(model)
    dtypes: dict[torch.dtype, str] = {}
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise ConfigError(
                f"parameter {name} has no dimensions, so it cannot be sharded; give it the shape (1,), or use "
                "--parallel.strategy ddp"
            )
        if not p.numel():
            raise ConfigError(
                f"parameter {name} has no elements (its shape is {tuple(p.shape)}), so it cannot be sharded; leave it "
                "out, or use --parallel.strategy ddp"
            )
        if not p.is_contiguous():
            raise ConfigError(
                f"parameter {name} is not contiguous in memory (strides {p.stride()}), so it cannot be sharded; give "
                "its module .contiguous() values, or use --parallel.strategy ddp"
            )
        if type(p) is not nn.Parameter:
            raise ConfigError(
                f"parameter {name} is a {type(p).__name__}, a class that it loses where it is cut over the workers; "
                "mark it with an attribute, or use --parallel.strategy ddp"
            )
        if p.requires_grad:  # gradients are reduced together, and frozen parameters have none
            dtypes.setdefault(p.dtype, name)
    if len(dtypes) > 1:
        (first, one), (second, other) = list(dtypes.items())[:2]
        raise ConfigError(
            f"parameter {one} is {first} and {other} is {second}; parameters that are trained and sharded need one "
            "dtype, so convert one, freeze it, or use --parallel.strategy ddp"
        )
    if not leaves_unused_gradients():
        raise ConfigError(
            f"--parallel.strategy fsdp and hsdp need torch 2.13 or newer, this is {torch.__version__}; use ddp"
        )
