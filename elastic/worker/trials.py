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
Agreed = Callable[[bool], bool]  # whether something is so on any worker that shares the model


def in_memory(function: Function) -> Function:
    """Nothing is compiled in trials, but what is compiled in a step may need far less memory there, as flex_attention
    does: so where memory runs out, it is tried once more as in a step."""

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
                raise _OutOfMemory from None  # without the frames, which hold what was computed
            raise

    return call


class _OutOfMemory(Exception):
    pass


def passes(function: Function, batches: Batches, seed: int) -> list[Sums]:
    found = []
    for samples, batch in batches:
        seed_all(seed)
        loss, weight, metrics = function(own(batch))
        figures = {k: float(v) for k, v in metrics.items()}
        found.append(Sums(samples, float(loss), float(weight), figures, max(CLOSE, _rounding(loss))))
    return found


def _rounding(loss: Any) -> float:
    """How much of a sum may be lost in its number format."""
    short = isinstance(loss, torch.Tensor) and loss.is_floating_point()
    return 4 * torch.finfo(loss.dtype).eps if short else 0.0


def listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def own(batch: Any) -> Any:
    """A copy to be written to, where it can be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # of a class of the job's: then it is tried itself
        return batch
