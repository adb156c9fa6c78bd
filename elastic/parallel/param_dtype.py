"""Computing in another number format than that in which parameters are kept, for models that are not sharded.

It does what FSDP2 does when it gathers a sharded model's parameters (`MixedPrecisionPolicy`): each block, and the rest
of the model, sees its parameters and inputs in that format. Gradients arrive in the parameters' own format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from elastic.compat.torch import NormWithStatistics, list_weights_again, own_parameters, tree_map
from elastic.errors import ConfigError


def check_castable(model: nn.Module) -> None:
    """Refuse layers that must not compute in another number format.

    Raises:
        ConfigError: a layer has running statistics, which would differ in format from its parameters.
    """
    for name, module in model.named_modules():
        if isinstance(module, NormWithStatistics):
            raise ConfigError(
                f"--precision.param-dtype would give {name} ({type(module).__name__}) parameters in another number "
                "format than its running statistics; use --precision.autocast"
            )


def cast_parameters(model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Let each block, and the rest of the model, run with floating parameters and inputs in this format.

    To be called before activation checkpointing is applied to blocks, so that recomputed passes are cast too.
    """
    assigned: set[nn.Module] = set()
    for module in [*blocks, model]:
        mine = [m for m in module.modules() if m not in assigned]
        assigned.update(mine)
        holders = [
            (m, name) for m in mine for name, p in own_parameters(m).items() if p is not None and p.is_floating_point()
        ]
        module.forward = partial(_run, module.forward, holders, dtype)


def _run(
    forward: Callable[..., Any], holders: Sequence[tuple[nn.Module, str]], dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    kept = [own_parameters(m)[name] for m, name in holders]
    casts = {id(p): cast(p) for p in kept}  # one cast of a parameter that several modules share
    try:
        for (m, name), p in zip(holders, kept):
            own_parameters(m)[name] = casts[id(p)]
        _list_again(holders)
        return forward(*tree_map(cast, args), **tree_map(cast, kwargs))
    finally:
        for (m, name), p in zip(holders, kept):
            own_parameters(m)[name] = p
        _list_again(holders)


def _list_again(holders: Sequence[tuple[nn.Module, str]]) -> None:
    """Recurrent layers keep their parameters in a list as well."""
    for module in {m for m, _ in holders if isinstance(m, nn.RNNBase)}:
        list_weights_again(module)
