"""Factors on gradients, and the factor on the loss with fp16: a power of two that keeps gradients from being too small
for the format."""

from __future__ import annotations

from typing import Any

import torch

from elastic.compat.torch import multiply_each_

GROW_AFTER = 2000
LARGEST = 2.0**24


class LossScale:
    """Doubles after `GROW_AFTER` steps without overflow, and is halved by an overflow, as in torch's GradScaler.

    But one decision holds for all workers: an overflow is a norm that is not finite. Powers of two round nothing.
    """

    def __init__(self, first: float):
        self.factor, self._good = first, 0

    def update(self, overflow: bool) -> None:
        """Called after a step; the step was skipped if gradients overflowed."""
        if overflow:
            self.factor, self._good = max(1.0, self.factor / 2), 0
            return
        self._good += 1
        if self._good == GROW_AFTER:
            self.factor, self._good = min(LARGEST, self.factor * 2), 0

    def values(self) -> dict[str, Any]:
        """The state as JSON values, for checkpoints."""
        return {"factor": self.factor, "good": self._good}

    def load(self, values: dict[str, Any]) -> None:
        self.factor, self._good = float(values["factor"]), int(values["good"])


def multiply(gradients: list[torch.Tensor], factor: float) -> None:
    """Multiply gradients in place, those that are sparse too."""
    together = [g for g in gradients if not g.is_sparse]
    if together:
        multiply_each_(together, factor)
    for gradient in gradients:
        if gradient.is_sparse:
            gradient.mul_(factor)
