"""What operations do with tensors: which of some they read, and whether they draw random numbers for those that are
cut, or sum over their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.overrides import TorchFunctionMode

#: Names of tensor operations that read no values, or overwrite all of them.
_NO_READS = {
    "__get__",
    "__len__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_contiguous",
    "copy_",
    "zero_",
    "fill_",
    "data_ptr",
    "detach",
    "requires_grad_",
}


class OnCut(TorchFunctionMode):
    """Records an operation on sharded tensors that draws random numbers, and one that sums over their rows.

    A maximum or minimum over them has the same bits however they are cut.
    """

    drew = summed = ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [inner for one in (*args, *kwargs.values()) for inner in _members(one)]
        if not any(isinstance(one, DTensor) for one in given):
            return function(*args, **kwargs)
        before = torch.get_rng_state()
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "an operation")
        if not self.drew and not torch.equal(before, torch.get_rng_state()):
            self.drew = name
        if not self.summed and any(map(_is_sum, _members(result))):
            self.summed = name
        return result


class Reads(TorchFunctionMode):
    """Records which of some tensors are inputs of operations."""

    def __init__(self, watched: set[int]):
        super().__init__()
        self._watched = watched
        self.seen: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name not in _NO_READS:
            for one in [*args, *kwargs.values()]:
                for inner in one if isinstance(one, (list, tuple)) else (one,):
                    if id(inner) in self._watched:
                        self.seen.add(id(inner))
        return function(*args, **kwargs)


def _members(one: Any) -> Sequence[Any]:
    return one if isinstance(one, (list, tuple)) else (one,)


def _is_sum(one: Any) -> bool:
    return isinstance(one, DTensor) and any(
        isinstance(p, Partial) and p.reduce_op not in ("max", "min") for p in one.placements
    )
