"""How well a run uses its machines: figures with a goal, a verdict and advice. Pure, from rows.

The goals are those of the field: most of a device's memory in use, most of a step computing, and hardly any waiting for
gradients or data.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from elastic.observe.segments import number

RECENT = 200  # the newest steps from which figures are computed
_BEST = 0.95  # the quantile of a figure that counts as the best this run has reached
GOOD, POOR, NOTED = "good", "poor", "noted"
#: Dense peak FLOP/s of bfloat16 tensor cores, by a part of the device's name; source: NVIDIA's data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A6000": 155e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class Sign:
    """One figure.

    Args:
        value: None if it is not known.
        unit: "share" (0 to 1), or the unit of `value`.
        goal: for people; empty if there is none.
        verdict: "good", "poor", or "noted" if there is no goal.
        advice: what to try; empty if nothing needs to change.
    """

    name: str
    value: float | None
    unit: str
    goal: str = ""
    verdict: str = NOTED
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the figure as JSON values."""
        return asdict(self)


def health(rows: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]] = ()) -> tuple[Sign, ...]:
    """Return the figures of a run.

    Args:
        rows: in the order written; the newest RECENT steps count.
        events: `worker_warm` says what workers run on, and how many FLOPs a sample takes.
    """
    steps = [r for r in rows if "sample_hash" in r and number(r.get("step_s")) > 0][-RECENT:]
    shares = {name: _share(steps, name) for name in ("compute_s", "sync_s", "data_s")}
    warm: dict[str, Any] = next((_detail(e) for e in reversed(events) if e.get("kind") == "worker_warm"), {})
    found = [
        _judged(
            "device memory",
            _newest(steps, "device_memory"),
            "share",
            "70-90 %",
            lambda v: 0.7 <= v <= 0.9,
            lambda v: (
                "larger passes fit: raise --batch.pass-size, or the global batch with fewer microbatches"
                if v < 0.7
                else "it is close to running out: lower --batch.pass-size, or use --parallel.activation-checkpointing"
            ),
        ),
        _judged(
            "computing",
            shares["compute_s"],
            "share",
            "> 85 %",
            lambda v: v > 0.85,
            lambda v: "see what else takes the step's time: synchronisation, data, checkpoints",
        ),
        _judged(
            "synchronising",
            shares["sync_s"],
            "share",
            "< 5 %",
            lambda v: v < 0.05,
            lambda v: (
                "workers wait for each other: fewer workers or a larger batch, microbatches that the workers divide, "
                "--precision.grad-compression bf16, a faster network"
            ),
        ),
        _judged(
            "waiting for data",
            shares["data_s"],
            "share",
            "< 2 %",
            lambda v: v < 0.02,
            lambda v: "let other processes fetch: --data.workers 4; or make samples cheaper to read",
        ),
        *_bandwidth(rows, steps),
        *_speed(steps, warm),
        Sign("gradient norm", _newest(steps, "grad_norm"), "", *_trend(steps, "grad_norm")),
        Sign("loss", _newest(steps, "loss"), "", *_trend(steps, "loss")),
    ]
    return tuple(found)


class Health:
    """Keeps what the figures are computed from, as rows and events arrive."""

    def __init__(self) -> None:
        self._rows: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._sized: list[dict[str, Any]] = []  # the newest row that has the bytes of the gradients
        self._warm: list[dict[str, Any]] = []

    def add(self, rows: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> None:
        """Take in new rows and events."""
        for row in rows:
            if "sample_hash" in row:
                self._rows.append(row)
                if "gradient_bytes" in row:
                    self._sized = [row]
        self._warm = [e for e in events if e.get("kind") == "worker_warm"][-1:] or self._warm

    def signs(self) -> tuple[Sign, ...]:
        """Return the figures as of now."""
        return health([*self._sized, *self._rows], self._warm)


def _judged(
    name: str,
    value: float | None,
    unit: str,
    goal: str,
    ok: Callable[[float], bool],
    advice: Callable[[float], str],
) -> Sign:
    if value is None:
        return Sign(name, None, unit, goal)
    return Sign(name, value, unit, goal, GOOD if ok(value) else POOR, "" if ok(value) else advice(value))


def _detail(event: dict[str, Any]) -> dict[str, Any]:
    detail = event.get("detail")
    return detail if isinstance(detail, dict) else {}


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _newest(steps: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((v for r in reversed(steps) if (v := _finite(r.get(name))) is not None), None)


def _share(steps: Sequence[dict[str, Any]], name: str) -> float | None:
    whole = sum(number(r.get("step_s")) for r in steps)
    return min(1.0, sum(number(r.get(name)) for r in steps) / whole) if whole > 0 else None


def _bandwidth(rows: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> list[Sign]:
    """Compare the bandwidth of the gradients with the best that this run has reached: the network can do that much."""
    size = next((v for r in reversed(rows) if (v := _finite(r.get("gradient_bytes")))), None)
    waits = [(number(r.get("sync_s")), int(number(r.get("world_size")))) for r in steps]
    rates = sorted(2 * (w - 1) / w * size / s for s, w in waits if s > 0 and w > 1) if size else []
    if not rates:
        return [Sign("bandwidth of gradients", None, "bytes/s")]
    now, best = median(rates), rates[int(_BEST * (len(rates) - 1))]
    achieved = _judged(
        "bandwidth of gradients, of its best",
        now / best,
        "share",
        "60-80 % or more",
        lambda v: v >= 0.6,
        lambda v: "steps differ in how long gradients take: look for a slow worker or a shared network",
    )
    return [Sign("bandwidth of gradients", now, "bytes/s"), achieved]


def _speed(steps: Sequence[dict[str, Any]], warm: dict[str, Any]) -> list[Sign]:
    if len(steps) < 2:
        return [Sign("throughput", None, "samples/s")]
    typical_s = median(number(r["step_s"]) for r in steps)
    samples = _finite(steps[-1].get("count")) or 0.0
    found = [Sign("throughput", samples / typical_s, "samples/s")]
    first, last = (_finite(r.get("tokens")) for r in (steps[0], steps[-1]))
    apart = number(steps[-1].get("step")) - number(steps[0].get("step"))
    if first is not None and last is not None and apart > 0:
        found.append(Sign("throughput of tokens", (last - first) / apart / typical_s, "tokens/s"))
    each, workers = _finite(warm.get("flops_per_sample")), number(steps[-1].get("world_size"))
    if not each or not workers:
        return found
    rate = each * samples / typical_s / workers
    found.append(Sign("model FLOP/s of a worker", rate, "FLOP/s"))
    peak = _peak(warm.get("device"))
    if peak is not None:
        found.append(
            _judged(
                "model FLOP/s utilisation",
                rate / peak,
                "share",
                "> 30 %",
                lambda v: v > 0.3,
                lambda v: "try --precision.autocast bf16, --parallel.compile, larger passes",
            )
        )
    return found


def _peak(device: Any) -> float | None:
    """Return the peak FLOP/s of a device (as `worker_warm` describes it), or None if it is not known."""
    try:
        name = str(json.loads(device)["name"])
    except (TypeError, ValueError, KeyError):
        return None
    return next((flops for part, flops in PEAKS.items() if all(word in name for word in part.split())), None)


def _trend(steps: Sequence[dict[str, Any]], name: str) -> tuple[str, str, str]:
    """Judge a figure that should not run away, by comparing its newest values with earlier ones: goal, verdict,
    advice."""
    values = [v for r in steps if (v := _finite(r.get(name))) is not None]
    lost = any(name in r and _finite(r[name]) is None for r in steps[-10:])
    if lost:
        advice = "it is not finite: lower the learning rate, set --optim.clip-norm, look at the samples of that step"
        return "finite", POOR, advice
    if len(values) < 20:
        return "", NOTED, ""
    before, now = median(values[: len(values) // 2]), median(values[-5:])
    if now > 3 * abs(before) + 1e-12:
        advice = "it grows fast: lower the learning rate, lengthen --optim.warmup, or set --optim.clip-norm"
        return "does not run away", POOR, advice
    return "does not run away", GOOD, ""
