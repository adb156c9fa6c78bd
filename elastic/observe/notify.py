"""Decides which events of a run are worth a message to somebody who does not watch it. Pure."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

PARKED_S = 600.0


@dataclass(frozen=True)
class Message:
    """A message: `kind` for programs, `text` for people, in one line."""

    kind: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self, run: str) -> dict[str, Any]:
        """Return the message as JSON values; chat services show its `text`."""
        return {"format": 1, "text": self.text, "kind": self.kind, "run": run, **self.facts}


class Attention:
    """Takes in the records of a run, and returns the messages to send.

    Args:
        run: its name.
    """

    def __init__(self, run: str):
        self._run = run
        self._parked_at: float | None = None
        self._told_parked = self._failing = False
        self._why = ""

    def hear(self, record: dict[str, Any], now: float) -> list[Message]:
        """Take in a row or an event.

        Args:
            now: monotonic seconds.
        """
        kind, detail = record.get("kind"), record.get("detail")
        if kind == "end":
            return [self._ended(record)]
        if kind == "run_started" and isinstance(detail, dict) and detail.get("heartbeat_before"):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(detail["heartbeat_before"])))
            return [self._say("lost", f"was lost (no heartbeat since {since}), and goes on now", record)]
        if kind == "parked":
            self._parked_at, self._why = self._parked_at or now, str(detail or "")
        elif kind == "world_formed":
            self._parked_at, was_told = None, self._told_parked
            self._told_parked = False
            return [self._say("resumed", "goes on after it was parked", record)] if was_told else []
        elif kind == "checkpoint_failed" and not self._failing:
            self._failing = True
            return [self._say("checkpoints_failing", f"cannot save: {_line(detail)}", record)]
        elif kind == "checkpoint_committed" and self._failing:
            self._failing = False
            return [self._say("checkpoints_saved", f"saves again: step {record.get('step')}", record)]
        elif kind == "node_quarantined":
            where = detail if isinstance(detail, dict) else {}
            text = f"takes no workers of node {where.get('node')} any more: {_line(where.get('why'))}"
            return [self._say("node_quarantined", text, where)]
        return []

    def tick(self, now: float) -> list[Message]:
        """Note that time has passed.

        Args:
            now: monotonic seconds.
        """
        if self._parked_at is None or self._told_parked or now - self._parked_at < PARKED_S:
            return []
        self._told_parked = True
        text = f"is parked for more than {PARKED_S / 60:.0f} minutes: {_line(self._why)}"
        return [self._say("parked", text, {})]

    def _ended(self, end: dict[str, Any]) -> Message:
        status = str(end.get("status"))
        result = end.get("result") or {}
        facts = {name: result[name] for name in ("steps", "loss", "cost", "worker_hours") if name in result}
        kind = {"finished": "finished", "stopped": "paused"}.get(status, "failed")
        done = f" after step {result['steps']}" if "steps" in result else ""
        why = _line(end.get("message"))
        return Message(kind, f"run {self._run} {kind}{done}" + (f": {why}" if why else ""), facts)

    def _say(self, kind: str, text: str, record: dict[str, Any]) -> Message:
        facts = {name: record[name] for name in ("step", "node", "member") if record.get(name) is not None}
        return Message(kind, f"run {self._run} {text}", facts)


def _line(detail: Any) -> str:
    """Return the essence of a detail: the last line of a traceback, the first line of anything else."""
    lines = [line for line in str(detail or "").splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
