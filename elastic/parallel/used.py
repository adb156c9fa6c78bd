"""Which parameters of a model that FSDP2 has sharded got a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from elastic.compat.torch import own_parameters
from elastic.parallel.wrapping import is_gathered


class Used:
    """Collects the indices of trainable parameters that got a gradient since `seen` was cleared.

    FSDP2 reduces zeros for the others. The autograd engine accumulates into the gathered parameters, which exist from
    the first forward pass on.
    """

    def __init__(self, model: nn.Module):
        self.seen: set[int] = set()
        self._counts = True
        #: Begins to watch parameters outside of blocks, in case the job calls other methods of the model than
        #: forward().
        self.look_at_root: Callable[[], None] = lambda: None
        indices = {id(p): i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
        for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
            entries = [
                (m, name, indices[id(p)])
                for m in _managed(module)
                for name, p in own_parameters(m).items()
                if p is not None and p.requires_grad
            ]
            watch = self._watch(module, entries)
            if module is model:
                self.look_at_root = watch

    def _watch(self, module: Any, entries: list[tuple[nn.Module, str, int]]) -> Callable[[], None]:
        waiting = entries

        def watch(*_: Any) -> None:
            nonlocal waiting
            if not waiting:
                return
            found = [(entry, own_parameters(entry[0])[entry[1]]) for entry in waiting]
            # those that learn in another phase have their turn then
            waiting = [entry for entry, p in found if p is not None and not p.requires_grad]
            for parameter, index in {id(p): (p, entry[2]) for entry, p in found}.values():
                assert parameter is not None
                if parameter.requires_grad:
                    assert is_gathered(parameter), "gathered before the forward pass"
                    parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._saw(index))
            if not waiting:
                handle.remove()

        handle = module.register_forward_pre_hook(torch.compiler.disable(watch))
        return watch

    def _saw(self, index: int) -> None:
        if self._counts:
            self.seen.add(index)

    @contextmanager
    def only_if(self, counts: bool) -> Iterator[None]:
        """Gradients inside count only if `counts`."""
        self._counts = counts
        try:
            yield
        finally:
            self._counts = True


def _managed(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its descendants, without those that were sharded by themselves."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _managed(child)
