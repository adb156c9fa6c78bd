"""How often to take snapshots with `auto`: the fewest steps from one to the next at which snapshots cost below 2 %."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

SHARE = 0.02  # of the time of fault-free steps that snapshots may take
FIRST, MOST = 8, 1000  # steps from one snapshot to the next: before costs are known, and at most
RECENT = 15


def auto_every(cost_s: float, step_s: float) -> int:
    """Steps between snapshots that cost `cost_s` seconds each, if a step takes `step_s` seconds without them."""
    return min(MOST, max(1, math.ceil(cost_s / (SHARE * step_s)))) if step_s > 0 else FIRST


class Meter:
    """Measures the cost of snapshots in seconds: how much longer steps take while one is being sent."""

    def __init__(self) -> None:
        self._quiet: deque[float] = deque(maxlen=RECENT)
        self._costs: deque[float] = deque(maxlen=RECENT)
        self._under_way: list[float] = []

    def step(self, seconds: float, *, under_way: bool) -> None:
        """Record a step of `seconds`, with or without a snapshot being sent during it."""
        if under_way:
            self._under_way.append(seconds)
        else:
            self.began()
            self._quiet.append(seconds)

    def began(self) -> None:
        """Another snapshot begins: the steps recorded since belong to the last one."""
        if self._under_way and self._quiet:
            usual = median(self._quiet)
            self._costs.append(max(0.0, sum(s - usual for s in self._under_way)))
        self._under_way = []

    def every(self) -> int:
        """The number of steps between snapshots that this worker's measurements suggest."""
        return auto_every(median(self._costs), median(self._quiet)) if self._costs else FIRST
