"""Finds the microbatch behind a loss or gradient norm that is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from elastic.errors import NonFiniteError
from elastic.parallel.records import StepRecord

_SHOWN = 16


def first_bad_microbatch(
    finite: Callable[[Any], bool], microbatches: Iterable[tuple[int, Any]], padding: int = 0
) -> int:
    """Run microbatches again, one by one; the index of the first whose own gradients are not finite, or -1.

    Args:
        finite: returns whether the gradients of a batch are finite.
        microbatches: (index, batch) of this rank's microbatches, seeded as in training when they are drawn.
        padding: number of further passes, which other workers of a sharded model need, and which do not count.
    """
    found, batch = -1, None
    for index, batch in microbatches:
        if not finite(batch) and found < 0:
            found = index
    for _ in range(padding):
        finite(batch)
    return found


def error(
    step: int, phase: str, record: StepRecord, norm: float, microbatch: int | None, ids: list[int]
) -> NonFiniteError:
    """The error that ends the run. `ids`: the samples of the pass that begins with `microbatch`, or of the whole step
    if all its weights are 0."""
    what = "loss" if record.nonfinite_microbatch is not None else "gradient norm"
    if not math.isfinite(record.weight):
        what = "weight"
    where, which = "", f"step {step + 1}" + (f" ({phase})" if phase else "")
    shown = ", ".join(map(str, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")
    if record.weight == 0:
        return NonFiniteError(
            f"all weights of {which} are 0, so its loss has no mean (samples {shown}); nothing of this step "
            "was applied. Have loss() return the number of samples or tokens, look at these samples, or give "
            "--run.on-nonfinite skip"
        )
    if microbatch is not None:
        where = f", first in microbatch {microbatch} (samples {shown})"
    return NonFiniteError(
        f"the {what} of {which} is not finite (loss {record.loss:g}, norm {norm:g}){where}; nothing of this "
        "step was applied. Lower the learning rate, clip with --optim.clip-norm, look at these samples, or give "
        "--run.on-nonfinite skip"
    )
