"""The factor on the loss with fp16: a power of two that keeps gradients from being too small for the format."""

from __future__ import annotations

from typing import Any

GROW_AFTER = 2000
LARGEST = 2.0**24


class LossScale:
    """Doubles after `GROW_AFTER` steps without overflow, and is halved by an overflow, as in torch's GradScaler. But
    one
    decision holds for all workers: an overflow is a global norm that is not finite. Powers of two round nothing."""

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
