"""A run's figures in Ray's own metrics, which its dashboard and a Prometheus beside it show."""

from __future__ import annotations

import time
from typing import Any

from ray.util.metrics import Gauge

from elastic.observe.figures import FIGURES, Figures

EVERY_S = 1.0


class RayMetrics:
    """Hears the records of a run. Ray's counters only count up from here, so all figures are gauges."""

    def __init__(self, run: str, total_steps: int):
        self._figures, self._tags, self._next = Figures(total_steps), {"run": run}, 0.0
        self._gauges = {name: Gauge(name, meaning, ("run",)) for name, (_, meaning) in FIGURES.items()}

    def on_record(self, record: dict[str, Any]) -> None:
        """A row or event has come."""
        self._figures.hear(record)
        if "kind" in record or time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            for name, value in self._figures.values().items():
                self._gauges[name].set(value, self._tags)
