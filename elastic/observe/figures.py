"""A run as figures in Prometheus' text format, and for others that collect figures. Pure, from its records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

GAUGE, COUNTER = "gauge", "counter"
#: Name, type and meaning of each figure.
FIGURES: dict[str, tuple[str, str]] = {
    "elastic_step": (GAUGE, "the newest step"),
    "elastic_total_steps": (GAUGE, "steps of the whole run"),
    "elastic_world_size": (GAUGE, "workers in the world; 0 while there is none"),
    "elastic_parked": (GAUGE, "1 while the run is parked with too few workers"),
    "elastic_loss": (GAUGE, "loss of the newest step"),
    "elastic_learning_rate": (GAUGE, "learning rate of the newest step"),
    "elastic_gradient_norm": (GAUGE, "norm of the gradients of the newest step"),
    "elastic_step_seconds": (GAUGE, "seconds of the newest step"),
    "elastic_compute_seconds": (GAUGE, "seconds of it that computed"),
    "elastic_sync_seconds": (GAUGE, "seconds of it that waited for gradients and agreement"),
    "elastic_data_seconds": (GAUGE, "seconds of it that waited for the batch"),
    "elastic_checkpoint_seconds": (GAUGE, "seconds of it that stood still to save"),
    "elastic_device_memory_share": (GAUGE, "share of the device's memory in use"),
    "elastic_samples_total": (COUNTER, "samples that were trained on"),
    "elastic_tokens_total": (COUNTER, "tokens that were trained on"),
    "elastic_steps_done_total": (COUNTER, "steps done by this command, those that were done again too"),
    "elastic_checkpoint_step": (GAUGE, "step of the newest committed checkpoint"),
    "elastic_checkpoint_time_seconds": (GAUGE, "when it was committed, unix time"),
    "elastic_checkpoint_bytes": (GAUGE, "its bytes"),
    "elastic_checkpoint_failures_total": (COUNTER, "checkpoints that failed"),
    "elastic_workers_lost_total": (COUNTER, "workers that were lost"),
    "elastic_worlds_formed_total": (COUNTER, "worlds that were formed"),
    "elastic_worlds_broken_total": (COUNTER, "worlds that broke"),
    "elastic_stall_seconds_total": (COUNTER, "seconds from a break to the next step, a usual step left out"),
}
_OF_ROWS = {
    "elastic_step": "step",
    "elastic_loss": "loss",
    "elastic_learning_rate": "lr",
    "elastic_gradient_norm": "grad_norm",
    "elastic_step_seconds": "step_s",
    "elastic_compute_seconds": "compute_s",
    "elastic_sync_seconds": "sync_s",
    "elastic_data_seconds": "data_s",
    "elastic_checkpoint_seconds": "checkpoint_s",
    "elastic_device_memory_share": "device_memory",
    "elastic_samples_total": "samples",
    "elastic_tokens_total": "tokens",
}


class Figures:
    """Computes the figures, record by record.

    Args:
        total_steps: of the whole run.
    """

    def __init__(self, total_steps: int):
        self._known: dict[str, float] = {name: 0.0 for name, (kind, _) in FIGURES.items() if kind == COUNTER}
        # these count the whole run, and are known only from its first row on
        del self._known["elastic_samples_total"], self._known["elastic_tokens_total"]
        self._known |= {"elastic_total_steps": total_steps, "elastic_world_size": 0, "elastic_parked": 0}
        self._broken = False
        # when the newest step ended (unix seconds), and the seconds that it took
        self._last: tuple[float, float] | None = None

    def hear(self, record: Mapping[str, Any]) -> None:
        """Take in a row or an event."""
        if "kind" in record:
            self._hear_event(str(record["kind"]), record)
        elif "sample_hash" in record:
            self._hear_row(record)

    def _hear_row(self, row: Mapping[str, Any]) -> None:
        for name, column in _OF_ROWS.items():
            value = row.get(column)
            if isinstance(value, (int, float)):
                self._known[name] = float(value)
            elif column in ("loss", "grad_norm") and column in row:
                self._known[name] = math.nan
        self._known["elastic_steps_done_total"] += 1
        at, seconds = float(row["time"]), float(row.get("step_s") or 0.0)
        if self._broken and self._last is not None:
            self._known["elastic_stall_seconds_total"] += max(0.0, at - self._last[0] - seconds)
        self._broken, self._last = False, (at, seconds)

    def _hear_event(self, kind: str, event: Mapping[str, Any]) -> None:
        known, detail = self._known, event.get("detail")
        detail = detail if isinstance(detail, Mapping) else {}
        if kind in ("world_formed", "resumed") and "size" in detail:
            known["elastic_world_size"], known["elastic_parked"] = float(detail["size"]), 0.0
            known["elastic_worlds_formed_total"] += kind == "world_formed"
        elif kind in ("member_lost", "world_broken"):
            known["elastic_workers_lost_total"] += kind == "member_lost"
            known["elastic_worlds_broken_total"] += kind == "world_broken" or not self._broken
            self._broken = True
        elif kind == "parked":
            known["elastic_parked"], known["elastic_world_size"] = 1.0, 0.0
        elif kind == "checkpoint_failed":
            known["elastic_checkpoint_failures_total"] += 1
        elif kind == "checkpoint_committed":
            known["elastic_checkpoint_step"] = float(event.get("step") or 0)
            known["elastic_checkpoint_time_seconds"] = float(event["time"])
            if isinstance(detail.get("bytes"), (int, float)):
                known["elastic_checkpoint_bytes"] = float(detail["bytes"])
        elif kind in ("run_finished", "run_failed"):
            known["elastic_world_size"] = 0.0

    def values(self) -> dict[str, float]:
        """Return the figures that are known now, by name."""
        return dict(self._known)


def exposition(run: str, values: Mapping[str, float]) -> str:
    """Return figures in Prometheus' text format, each with the label `run`."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, (kind, meaning) in FIGURES.items():
        if name in values:
            lines += [
                f"# HELP {name} {meaning}",
                f"# TYPE {name} {kind}",
                f'{name}{{run="{label}"}} {_text(values[name])}',
            ]
    return "\n".join(lines) + "\n"


def _text(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"
