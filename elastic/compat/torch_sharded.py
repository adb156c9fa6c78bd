"""Names of FSDP2 beyond torch's public interface.

Read in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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


def drop_gathered_ahead(module: nn.Module) -> None:
    """Forget what FSDP2 has gathered ahead for a sharded module that did not run then: its next pass would take it,
    whatever the parameters are by then. FSDP2 itself does so at the end of a backward pass."""
    for group in _groups(module):
        if (ahead := group._all_gather_result) is not None:
            if ahead.all_gather_event is not None:
                group.device_handle.current_stream().wait_event(ahead.all_gather_event)
            if ahead.all_gather_work is not None:
                ahead.all_gather_work.wait()
            group._all_gather_result = None


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


def end_blocks_in_order(model: nn.Module) -> None:
    """Have FSDP2 end the backward pass of a block without a node of its own in the graph.

    FSDP2 passes a block's inputs through an identity, whose backward pass reduces the block's gradients. So what a
    block adds to the gradient of an input is summed by itself, before it is added to what other modules add to it,
    which has other last bits than the plain model; and an input that a block does not use gets zeros.

    Here a block ends when an older node runs than those of its call. The engine runs the newest of the nodes that can
    run (`CompareNodeTaskTime` in torch's engine.cpp), and a node is older than those that take what it made, so all
    newer ones are done by then.
    """
    states: list[Any] = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    blocks = [_Calls(state) for state in states if state._fsdp_param_groups]
    for block in blocks:
        block.watch(blocks)


class _Calls:
    """The calls of a block in the present forward passes, by autograd's sequence numbers: each node gets the next."""

    def __init__(self, state: Any):
        self._state, self._groups = state, list(state._fsdp_param_groups)
        self._began: list[int] = []
        self._runs: int | None = None  # the call whose backward pass runs

    def watch(self, blocks: Sequence[_Calls]) -> None:
        """Take over from FSDP2; `blocks`: all of the model."""
        before = self._state._pre_backward

        def pre_backward(gradient: torch.Tensor) -> torch.Tensor:  # of an output of the block
            node: Any = torch._C._current_autograd_node()
            now = node._sequence_nr()
            for block in blocks:
                block._end(now)
            call = max((n for n in self._began if n <= now), default=None)
            if call is None and self._began:  # the block returned what was made before it
                return gradient
            self._runs = call
            return before(gradient)

        self._state._pre_backward = pre_backward
        for group in self._groups:
            group._register_post_backward_hook = partial(self._begin, group._register_post_backward_hook)
            group.finalize_backward = partial(self._forget, group.finalize_backward)

    def _begin(self, otherwise: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:  # computed again in a backward pass, where it may have its own
            return otherwise(args, kwargs)
        if torch.is_grad_enabled():
            self._began.append(torch.autograd._get_sequence_nr())
        return args, kwargs

    def _end(self, now: int) -> None:
        if self._runs is None or self._runs <= now:
            return
        self._runs = None
        for group in reversed(self._groups):
            if group._training_state == type(group._training_state).PRE_BACKWARD:
                group.post_backward()

    def _forget(self, finalize: Callable[[], None]) -> None:
        self._began, self._runs = [], None
        finalize()
