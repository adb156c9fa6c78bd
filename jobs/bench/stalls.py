"""What a run's ledger says of its stalls: after a kill, and when a worker was taken in."""

from __future__ import annotations

from typing import Any

from elastic.membership.world import Generation
from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.storage import Storage
from jobs.bench.peers.notes import split
from jobs.bench.report import median

Record = dict[str, Any]
BROKEN = ("member_lost", "world_broken")  # whichever came first


class Ledger:
    """Rows of steps and events of one run."""

    def __init__(self, storage: Storage):
        self.rows = [r for r in read_records(storage, METRICS) if "sample_hash" in r]
        self.events = read_records(storage, EVENTS)

    def normal_s(self, size: int) -> float:
        """Median time between two steps of worlds of this size."""
        pairs = zip(self.rows, self.rows[1:], strict=False)
        return median(
            b["time"] - a["time"] for a, b in pairs if a["generation"] == b["generation"] and b["world_size"] == size
        )

    def recovery(self, killed: float, dead: set[int], size: int) -> dict[str, float]:
        """How the run went on after members of a world of `size` were killed: processes `dead`, at unix time `killed`.

        Returns:
            as `jobs.bench.peers.notes.recovery`, and "rest", the seconds of the unfinished step that had gone by.
        """
        before = [r for r in self.rows if r["time"] <= killed]
        old = Generation.parse(before[-1]["generation"])
        first = next(r for r in self.rows if Generation.parse(r["generation"]) > old)
        last = [r for r in self.rows if r["generation"] == str(old)][-1]
        lost = next(e for e in self.events if e["kind"] in BROKEN and e["generation"] == str(old))
        formed = self._formed(first)
        late = [
            e
            for e in self.events
            if e["kind"] == "member_late"
            and killed <= e["time"] <= first["time"]
            and self._pid(e["member"]) not in dead
        ]
        left_out = max(0, size - len(dead) - formed["detail"]["size"])
        return {
            "lost": float(last["step"] - first["step"] + 1),
            "left_out": float(max(left_out, len(late))),
            "rest": max(0.0, killed - last["time"]),
            **self._stall(last, first, {"detect": lost["time"], "form": formed["time"]}, killed, size),
        }

    def joins(self, size: int) -> list[dict[str, float]]:
        """The stalls of those that were there, each time that a world grew to `size` at a step boundary."""
        found = []
        for last, first in zip(self.rows, self.rows[1:], strict=False):
            if last["world_size"] < size == first["world_size"] and not self._lost(last, first):
                reached = {"form": self._formed(first)["time"]}
                found.append(self._stall(last, first, reached, last["time"], size))
        return found

    def _stall(self, last: Record, first: Record, reached: dict[str, float], begin: float, size: int) -> Record:
        """`size`: of the larger world, whose steps are shorter: a first step that takes longer is part of the stall."""
        reached["connect"] = reached["form"] + first["connect_s"]
        reached["restore"] = reached["connect"] + first["restore_s"]
        normal_s = self.normal_s(size)
        return {
            "stall_s": first["time"] - last["time"] - normal_s,
            **split(reached, max(begin, last["time"]), first["time"], normal_s),
        }

    def _formed(self, row: Record) -> Record:
        return next(e for e in self.events if e["kind"] == "world_formed" and e["generation"] == row["generation"])

    def _lost(self, last: Record, first: Record) -> bool:
        return any(e["kind"] in BROKEN and last["time"] < e["time"] < first["time"] for e in self.events)

    def _pid(self, member: str) -> int | None:
        worlds = (e["detail"] for e in self.events if e["kind"] == "world_formed")
        return next((p for w in worlds for m, p in zip(w["ids"], w["pids"], strict=True) if m == member), None)
