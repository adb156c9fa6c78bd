"""Runs a function of the job on batches, once each, under one seed: what it returned, as numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from elastic.compat.torch import is_compiler_loaded
from elastic.seeds import seed_all
from elastic.worker.returned import LossValue
from elastic.worker.sums import CLOSE, Sums
from elastic.worker.user_code import UserCodeError, is_out_of_memory

_SHOWN = 3

Batches = list[tuple[int, Any]]  # (number of samples, batch): of all samples, of the first half, of the other half
Function = Callable[..., LossValue]
Agreed = Callable[[bool], bool]  # returns whether something is so on any worker that shares the model


def in_memory(function: Function) -> Function:
    """Wrap a function so that it is called once more, compiled, if memory runs out.

    Trials compile nothing, since that takes long. But compiled code may need far less memory, as flex_attention does.
    """

    def call(batch: Any, **more: Any) -> LossValue:
        with suppress(_OutOfMemory):
            return attempt(batch, **more)
        with torch.compiler.set_stance("default"):
            return function(batch, **more)

    def attempt(batch: Any, **more: Any) -> LossValue:
        try:
            return function(batch, **more)
        except UserCodeError as error:
            if is_compiler_loaded() and error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise _OutOfMemory from None  # `from None`: the frames of the first error hold what was computed
            raise

    return call


class _OutOfMemory(Exception):
    pass


def passes(function: Function, batches: Batches, seed: int) -> list[Sums]:
    """Call the function on a copy of each batch, under one seed, and return the sums."""
    found = []
    for samples, batch in batches:
        seed_all(seed)
        loss, weight, metrics = function(own(batch))
        figures = {k: float(v) for k, v in metrics.items()}
        found.append(Sums(samples, float(loss), float(weight), figures, max(CLOSE, _rounding(loss))))
    return found


def _rounding(loss: Any) -> float:
    """Return which share of a sum its number format may lose."""
    short = isinstance(loss, torch.Tensor) and loss.is_floating_point()
    return 4 * torch.finfo(loss.dtype).eps if short else 0.0


def listed(names: list[str]) -> str:
    """Join the first names for a message."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def own(batch: Any) -> Any:
    """Return a deep copy, or the batch itself if its class cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # of a class of the job's; then the batch itself is tried
        return batch
