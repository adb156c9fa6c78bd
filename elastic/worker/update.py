"""An update that is ready to be applied, and the seconds that its step took."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.parallel.records import StepRecord


@dataclass
class Clock:
    """The seconds that one step spent, by cause."""

    data_s: float = 0.0
    compute_s: float = 0.0
    sync_s: float = 0.0
    checkpoint_s: float = 0.0
    snapshot_s: float = 0.0
    other_s: float = 0.0

    def columns(self, step_s: float) -> dict[str, float]:
        """Return the columns of the step's row: `step_s` and the seconds by cause, rounded to microseconds.

        Args:
            step_s: seconds of the whole step; what no cause explains becomes `other_s`.
        """
        explained = self.data_s + self.compute_s + self.sync_s + self.checkpoint_s + self.snapshot_s
        self.other_s = max(0.0, step_s - explained)
        columns = {"step_s": step_s, **vars(self)}
        if not self.snapshot_s:  # most runs take no snapshots: no column then
            del columns["snapshot_s"]
        return {name: round(seconds, 6) for name, seconds in columns.items()}


@dataclass(frozen=True)
class Update:
    """An update that this worker can apply without any other worker: its gradients are reduced, scaled and clipped.

    Args:
        step: the number of updates applied before it.
        record: the losses and metrics of the step, over all workers.
        lr: the learning rate of the first parameter group.
        norm: the global gradient norm before clipping; NaN if no parameter has a gradient.
        skip: do not change the state, since the loss or the norm is not finite.
        fingerprint: a hash of what is applied; equal on all workers if they apply the same.
    """

    step: int
    record: StepRecord
    lr: float
    norm: float
    skip: bool
    fingerprint: int

    @property
    def numbers(self) -> dict[str, float]:
        """What must be equal on all workers besides gradients and options, by its name for people."""
        return {"the loss": self.record.loss, "the gradient norm": self.norm}
