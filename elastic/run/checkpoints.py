"""The checkpoints of a run, as its keeper has them: commits shares, says when the next is due, removes what is old."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from elastic.checkpoint.cadence import save_cost, save_interval
from elastic.checkpoint.format import MANIFEST, attempt_folder
from elastic.checkpoint.reader import newest_first
from elastic.checkpoint.retention import Policy, Retention, removals
from elastic.checkpoint.transfer import patiently
from elastic.checkpoint.writer import commit
from elastic.membership.world import Generation
from elastic.run.attempts import Attempt
from elastic.run.record import Record
from elastic.storage import Storage


@dataclass(frozen=True)
class Keeping:
    """What the keeper does for its checkpoints.

    Args:
        note: records an event at once.
        tell: sends a message to all workers.
        owns: asks storage whether the run is still this claim's.
        closed: whether nothing is written any more.
        flush_rows: no committed step may be missing in the ledger.
    """

    note: Callable[..., None]
    tell: Callable[[dict[str, Any]], None]
    owns: Callable[[], bool]
    closed: Callable[[], bool]
    flush_rows: Callable[[], None]


class Checkpoints:
    """All methods on the keeper's thread; `restore` and `failed` are read from any.

    Args:
        save_every_s: seconds between checkpoints, 0 for the interval that costs least, None where steps say when.
    """

    def __init__(
        self, storage: Storage, epoch: int, policy: Policy, save_every_s: float | None, record: Record,
        keeping: Keeping,
    ):  # fmt: skip
        self._storage, self._epoch, self._policy, self._every_s = storage, epoch, policy, save_every_s
        self._record, self._keeping = record, keeping
        self._retention = Retention(storage, policy)
        self._attempts: dict[tuple[int, str], Attempt] = {}
        self._began = time.time()
        self.restarted = False  # an earlier keeper of this claim may have committed what it could not tell
        self.failed: dict[str, Any] | None = None  # the last save that failed: step and error
        newest = next(newest_first(storage), None)
        #: Where state comes from when nobody holds any: the newest committed checkpoint.
        self.restore: dict[str, Any] = {"rung": "fresh"}
        if newest is not None:
            self.restore = {"rung": "checkpoint", "step": newest.step, "attempt": newest.attempt}
        self.due_at = self._next_due()

    @property
    def step(self) -> int:
        """Of the newest; 0 where there is none."""
        return int(self.restore.get("step", 0))

    def recovered(self, began: float | None) -> None:
        """An earlier keeper of this claim, which `began` then (unix seconds), was replaced by this one."""
        self.restarted, self._began = True, began or self._began

    def world_formed(self) -> None:
        """What the world before was saving will not be whole."""
        self._attempts.clear()
        self.due_at = self._next_due()

    # ---- when ------------------------------------------------------------------------------------------------------

    def _next_due(self) -> float:
        elapsed = time.time() - self._began
        return time.monotonic() + save_interval(self._every_s, self._record.save_costs, elapsed, self._record.faults)

    def wish(self, in_world: bool) -> None:
        """Ask for one, once; the next is due an interval after this one was decided on, or after the world changed
        meanwhile."""
        self.due_at = float("inf")
        if in_world and not self._keeping.closed():
            self._keeping.tell({"kind": "wish", "wish": "save", "detail": "it is time"})

    # ---- committing ------------------------------------------------------------------------------------------------

    def take_share(
        self, member_id: str, generation: Generation, message: Mapping[str, Any], ranks: Mapping[str, int]
    ) -> None:
        """A worker's share came: its pack is durable, or is not.

        Args:
            ranks: of the members of the present world, by id.
        """
        step, name = key = (message["step"], message["attempt"])
        attempt = self._attempts.get(key)
        if attempt is None:
            attempt = self._attempts[key] = Attempt(step, name, generation, message["shares"])
            if self.restarted and patiently(self._storage.exists, f"{attempt_folder(step, name)}/{MANIFEST}"):
                self._note_committed(step, name)  # by the keeper before, which could not tell everyone
                self._decide(attempt, None)
                return
        what = attempt.take(member_id, message)
        if what == "decided":
            self._tell(attempt)
        elif what == "failed":
            self._decide(attempt, message["error"])
        elif what == "whole":
            self._decide(attempt, self._commit(attempt, ranks))

    def note_commits_before(self) -> None:
        """The keeper before may have died between a commit and its event, and nobody may be left who waits for it."""
        for checkpoint in reversed(list(newest_first(self._storage))):
            if checkpoint.attempt.startswith(f"{self._epoch}-"):
                self._note_committed(checkpoint.step, checkpoint.attempt)

    def _note_committed(self, step: int, name: str) -> None:
        self.restore = {"rung": "checkpoint", "step": step, "attempt": name}
        if (step, name) not in self._record.committed:
            self._record.committed.add((step, name))
            self._keeping.note(
                "checkpoint_committed", generation=name.rpartition("-")[0], step=step, detail={"attempt": name}
            )  # fmt: skip

    def _decide(self, attempt: Attempt, error: str | None) -> None:
        """Tell the ledger and the workers what became of an attempt; then there is time to tidy up."""
        attempt.decide(error)
        self.due_at = self._next_due()
        note, step = self._keeping.note, attempt.step
        if error:
            self.failed = {"step": step, "error": error}
            note("checkpoint_failed", generation=str(attempt.generation), step=step, detail=error)
        self._tell(attempt)
        if error or self._keeping.closed():
            return
        try:
            self._retention.prune()
        except Exception as problem:  # whatever storage raises: the run does not depend on it, and the next tries again
            note("checkpoint_failed", step=step, detail=f"old checkpoints could not be removed: {problem}")

    def _tell(self, attempt: Attempt) -> None:
        self._keeping.tell(
            {"kind": "commit", "step": attempt.step, "attempt": attempt.name, "error": attempt.error}
        )  # fmt: skip

    def _commit(self, attempt: Attempt, ranks: Mapping[str, int]) -> str | None:
        """Commit an attempt; returns why it could not be."""
        if not self._keeping.owns():
            return "a newer claim owns the run"
        began, record, step = time.monotonic(), self._record, attempt.step
        manifest = attempt.manifest(record.last_eval if record.evaluated_step == step else {})
        self._keeping.flush_rows()
        try:
            whole = commit(self._storage, attempt.name, manifest, attempt.ordered(ranks))
        except Exception as error:  # whatever storage raises: the checkpoint before stays the newest, the run goes on
            return f"the checkpoint of step {step} could not be committed: {type(error).__name__}: {error}"
        self.restore = {"rung": "checkpoint", "step": step, "attempt": attempt.name}
        record.saved(step, attempt.name, save_cost(attempt.stall_s, attempt.upload_s))
        self._keeping.note(
            "checkpoint_committed", generation=str(attempt.generation), step=step,
            seconds=round(attempt.upload_s + time.monotonic() - began, 4),
            detail={"attempt": attempt.name, "bytes": whole.nbytes, **attempt.summary()},
        )  # fmt: skip
        return None

    # ---- removing --------------------------------------------------------------------------------------------------

    def prune(self, policy: Policy, *, yes: bool) -> list[dict[str, Any]]:
        """What this policy does not keep; with `yes` it is removed."""
        retention = Retention(self._storage, policy)
        gone, needed = retention.plan()
        found = removals(self._storage, gone, set(newest_first(self._storage)), needed)
        if yes:
            retention.prune()
        return [asdict(removal) for removal in found]
