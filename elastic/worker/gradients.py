"""Whether the gradients of a batch are the sums of those of its halves.

They may not be although its loss is: hooks and autograd functions of a job divide gradients by a norm over the batch,
clip them by it, or center them. Then an update goes by which samples a pass has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from elastic.compat.torch import norm_of_each
from elastic.seeds import derive, seed_all
from elastic.worker.trials import Function, own
from elastic.worker.user_code import UserCodeError

_CLOSE = 0.02  # of the norm of all gradients: rounding, also in 16 bits, is less, and what is no sum is off by more
_Gradients = list[torch.Tensor | None]


def add_up(loss: Function, parameters: Iterable[torch.Tensor], batches: Sequence[Any], seed: int) -> bool:
    """Return whether they are sums, as far as can be known: also if there are none, or if they depend on chance.

    Takes as much memory as a backward pass, and once more as much as all gradients.

    Args:
        loss: of a whole model.
        parameters: that are trained.
        batches: a batch and its halves.
        seed: of the run.
    """
    seeds = derive("rehearsal", seed), derive("rehearsal again", seed)
    dense = [p for p in parameters if p.requires_grad]
    if len(batches) != 3 or not dense:
        return True
    try:
        whole, *halves = (_gradients(loss, dense, batch, seeds[0]) for batch in batches)
        sizes = sum(_norm(half) for half in halves)
        for half in halves:
            _subtract(whole, half)
        if not _CLOSE * sizes < _norm(whole) < float("inf"):
            return True
        first, other = (_gradients(loss, dense, batches[0], seed) for seed in seeds)
    except (UserCodeError, RuntimeError, NotImplementedError):  # a backward pass in evaluation mode need not work
        return True
    _subtract(first, other)
    return _norm(first) > _CLOSE * _norm(other)


def _gradients(loss: Function, parameters: Sequence[torch.Tensor], batch: Any, seed: int) -> _Gradients:
    seed_all(seed)
    with torch.enable_grad():
        found = torch.autograd.grad(loss(own(batch))[0], parameters, allow_unused=True)
    return [None if g is None or g.layout is not torch.strided else g.clone() for g in found]


def _subtract(whole: _Gradients, part: _Gradients) -> None:
    for i, gradient in enumerate(part):
        if gradient is not None:
            here = whole[i]
            whole[i] = -gradient if here is None else here.sub_(gradient)


def _norm(gradients: _Gradients) -> float:
    each = norm_of_each([g for g in gradients if g is not None])
    return float(torch.stack(each).float().norm()) if each else 0.0
