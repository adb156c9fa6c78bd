"""The factor on the loss in fp16: gradients too small for the format are made larger, by a power of two."""

from __future__ import annotations

from typing import Any

GROW_AFTER = 2000
LARGEST = 2.0**24


class LossScale:
    """Grows after `GROW_AFTER` steps without overflow, is halved by one. As torch's GradScaler, but with one decision
    for all workers: an overflow is a global norm that is not finite. Exact, since a power of two rounds nothing."""

    def __init__(self, first: float):
        self.factor, self._good = first, 0

    def update(self, overflow: bool) -> None:
        """After a step, which was skipped if gradients overflowed."""
        if overflow:
            self.factor, self._good = max(1.0, self.factor / 2), 0
            return
        self._good += 1
        if self._good == GROW_AFTER:
            self.factor, self._good = min(LARGEST, self.factor * 2), 0

    def values(self) -> dict[str, Any]:
        """As JSON values, for checkpoints."""
        return {"factor": self.factor, "good": self._good}

    def load(self, values: dict[str, Any]) -> None:
        self.factor, self._good = float(values["factor"]), int(values["good"])
