"""What benchmarks share: medians, tables, JSON, and peak memory read from outside."""

from __future__ import annotations

import json
import math
import platform
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def interval_of_median(values: Iterable[float]) -> tuple[float, float]:
    """Where the median of what these are a sample of lies, with 95 % certainty, whatever their distribution: from one
    of them to another. Both ends are infinite for fewer than 6, of which all may be on one side."""
    ordered = sorted(values)
    low, beyond = 0, 0.5 ** len(ordered)
    while beyond <= 0.025:
        low += 1
        beyond += math.comb(len(ordered), low) / 2 ** len(ordered)
    return (ordered[low - 1], ordered[-low]) if low else (-math.inf, math.inf)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns as wide as they need to be; numbers to three significant digits."""
    cells = [list(head), *([_cell(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def write_json(file: str | None, figures: dict[str, Any]) -> None:
    if file:
        Path(file).write_text(json.dumps({"machine": platform.platform(), **figures}, indent=1) + "\n")


class PeakMemory:
    """Watches processes' peak resident memory (VmHWM, MiB) until closed."""

    def __init__(self, pids: Callable[[], Iterable[int]]):
        self._pids, self.peak = pids, {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for pid in self._pids():
                mib = resident_peak_mib(pid)
                if mib is not None:
                    self.peak[pid] = max(mib, self.peak.get(pid, 0.0))

    def close(self) -> float:
        """The largest peak of any of the processes."""
        self._stop.set()
        self._thread.join()
        return max(self.peak.values(), default=float("nan"))


def resident_peak_mib(pid: int) -> float | None:
    """VmHWM of a process, or None where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    lines = [line for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 1024 if lines else None
