"""What one step has in hand, and what its time went into."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from elastic.parallel.records import StepRecord


@dataclass
class Clock:
    """Seconds of a step, by what they were spent on."""

    data_s: float = 0.0
    compute_s: float = 0.0
    sync_s: float = 0.0
    checkpoint_s: float = 0.0
    snapshot_s: float = 0.0
    other_s: float = 0.0

    def columns(self, step_s: float) -> dict[str, float]:
        """Seconds of a step, and what they went into, for its row."""
        told = self.data_s + self.compute_s + self.sync_s + self.checkpoint_s + self.snapshot_s
        self.other_s = max(0.0, step_s - told)
        columns = {"step_s": step_s, **asdict(self)}
        if not self.snapshot_s:  # most runs take none
            del columns["snapshot_s"]
        return {name: round(seconds, 6) for name, seconds in columns.items()}


@dataclass(frozen=True)
class Update:
    """A step with all in hand for its update. `skip`: leave it out, it is not finite."""

    step: int
    record: StepRecord
    lr: float
    norm: float
    skip: bool
    fingerprint: int  # equal on all workers if what they apply is
