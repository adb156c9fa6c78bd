"""Names of FSDP2 beyond torch's public interface.

Read in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def gathered_parameters(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The gathered parameters that FSDP2 made for a module that it has sharded, by name within the model; those of
    modules that have not run yet are left out.

    They stay the same objects. FSDP2 gathers into them without moving their version counters, so these move only where
    other code writes to one.
    """
    found = []
    for group in _groups(module):
        for one in group.fsdp_params:
            if (parameter := getattr(one, "_unsharded_param", None)) is not None:
                found.append((one._param_fqn or "", parameter))
    return found


def _groups(module: nn.Module) -> list[Any]:
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    return [g for g in (groups if groups is not None else [state._fsdp_param_group]) if g is not None]


@contextmanager
def without_gathering(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP2's hooks around the modules of a model do nothing: whoever runs them has put whole parameters there.

    The hooks let a module alone that is run again in a backward pass and has no parameters to gather, so each is told
    that it is one.
    """
    states: list[Any] = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    kept = [(state._fsdp_param_groups, state._training_state) for state in states]
    for state in states:
        state._fsdp_param_groups, state._training_state = [], type(state._training_state).PRE_BACKWARD
    try:
        yield
    finally:
        for state, (groups, training) in zip(states, kept, strict=True):
            state._fsdp_param_groups, state._training_state = groups, training


def hook_inside(module: nn.Module, before: Any, after: Any) -> Any:
    """Have `before(module, inputs)` called right after FSDP2 has gathered a module's parameters for its forward pass,
    before all hooks of others, and `after(module, inputs, output)` after all hooks that see them gathered. Returns a
    function that removes both."""
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    first = module.register_forward_pre_hook(before, prepend=True)
    last = module.register_forward_hook(after)
    _move(module._forward_pre_hooks, first.id, state._pre_forward_hook_handle.id, behind=True)
    _move(module._forward_hooks, last.id, state._post_forward_hook_handle.id, behind=False)

    def remove() -> None:
        first.remove()
        last.remove()

    return remove


def _move(hooks: Any, key: int, anchor: int, *, behind: bool) -> None:
    """Change the order of hooks so that `key` comes right before or behind `anchor`."""
    if anchor not in hooks:
        return
    order = [k for k in hooks if k != key]
    order.insert(order.index(anchor) + int(behind), key)
    for k in order:
        hooks.move_to_end(k)


@contextmanager
def without_backward(refuse: Callable[[], Exception]) -> Iterator[None]:
    """Inside, backward passes raise what `refuse` returns: `backward()`, and `torch.autograd.grad()` under any name."""

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise refuse()

    engine: Any = torch.autograd
    kept, engine._engine_run_backward = engine._engine_run_backward, raising
    try:
        yield
    finally:
        engine._engine_run_backward = kept
