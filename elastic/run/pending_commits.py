"""A checkpoint whose shares are arriving: what each share decides. Pure: no storage, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic.checkpoint.format import Manifest
from elastic.membership.protocol import Share
from elastic.membership.world import Generation


@dataclass
class Attempt:
    """An attempt of the world `generation` to save `step`; it is complete with `shares` shares of its members."""

    step: int
    name: str
    generation: Generation
    shares: int
    indexes: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    header: dict[str, Any] | None = None
    over: bool = False
    error: str | None = None
    anew: bool = False

    def take(self, member_id: str, share: Share) -> Literal["waits", "whole", "failed", "decided"]:
        """A member's share arrived, or arrived again from a member that could not know the outcome."""
        if self.over:
            return "decided"
        if share.error or share.index is None:
            return "failed"
        self.indexes[member_id], self.facts[member_id] = share.index, share.facts
        self.header = share.header or self.header
        return "whole" if len(self.indexes) == self.shares and self.header is not None else "waits"

    def decide(self, error: str | None, *, anew: bool = False) -> None:
        """The attempt was committed, or failed with `error`; `anew`: the next checkpoint must write all bytes."""
        self.over, self.error, self.anew = True, error, anew
        self.indexes.clear()

    def manifest(self, metrics: Mapping[str, Any]) -> Manifest:
        """The manifest without its tensors."""
        assert self.header is not None
        return Manifest(
            self.step,
            self.header["seed"],
            self.header["config_digest"],
            {**self.header.get("made", {}), "size": self.shares, "generation": str(self.generation)},
            self.header["values"],
            metrics={k: float(v) for k, v in metrics.items()},
        )

    def ordered(self, ranks: Mapping[str, int]) -> list[dict[str, Any]]:
        """The indexes of the shares by rank; those of members that are in no world any more come first, by id."""
        return [self.indexes[i] for i in sorted(self.indexes, key=lambda i: (ranks.get(i, 0), i))]

    @property
    def stall_s(self) -> float:
        """Seconds for which the training of the slowest member stopped."""
        return max(f["stall_s"] for f in self.facts.values())

    @property
    def upload_s(self) -> float:
        """Seconds of the slowest member's upload."""
        return max(f["seconds"] for f in self.facts.values())

    def summary(self) -> dict[str, float]:
        """For the ledger: seconds, requests and bytes of all members together."""
        facts = self.facts.values()
        return {
            "stall_s": self.stall_s,
            **{k: round(sum(f[k] for f in facts), 4) for k in ("cpu_s", "requests", "retries")},
            "written": sum(f["bytes"] for f in facts),
        }
