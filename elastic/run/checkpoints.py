"""The checkpoints of a run, for its keeper: commits shares, decides when the next is due, removes old ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastic.checkpoint.cadence import save_cost, save_interval
from elastic.checkpoint.format import ATTEMPT, MANIFEST, attempt_folder
from elastic.checkpoint.patience import is_no_room, patiently
from elastic.checkpoint.reader import Committed, attempts, mark, newest_first, steps_with_attempts, with_manifest
from elastic.checkpoint.retention import Policy, Retention, removals
from elastic.checkpoint.writer import commit
from elastic.errors import DamagedCheckpoint
from elastic.membership.protocol import Commit, HostMessage, RestorePoint, Share, Wished
from elastic.membership.world import Generation
from elastic.run.pending_commits import Attempt
from elastic.run.record import Record
from elastic.storage import Storage


@dataclass(frozen=True)
class Keeping:
    """Functions of the keeper that its checkpoints use.

    Args:
        note: records an event at once.
        send: sends a message to all workers.
        owns: asks storage whether the run still belongs to this claim.
        closed: whether nothing may be written any more.
        flush_rows: writes all rows, so that no committed step is missing in the ledger.
    """

    note: Callable[..., None]
    send: Callable[[HostMessage], None]
    owns: Callable[[], bool]
    closed: Callable[[], bool]
    flush_rows: Callable[[], None]


class Checkpoints:
    """All methods are for the keeper's thread, except `distrust`; `restore` and `failed` may be read from any thread.

    Args:
        save_every_s: seconds between checkpoints; 0 for the interval that costs least, None if it is given in steps.
    """

    def __init__(
        self,
        storage: Storage,
        epoch: int,
        policy: Policy,
        save_every_s: float | None,
        record: Record,
        keeping: Keeping,
    ):
        self._storage, self._epoch, self._policy, self._every_s = storage, epoch, policy, save_every_s
        self._record, self._keeping = record, keeping
        self._unloadable: set[Committed] = set()  # workers of this claim could not load these, marked or not
        self._retention = Retention(storage, policy, self._unloadable)
        self._attempts: dict[tuple[int, str], Attempt] = {}
        self._generation: Generation | None = None  # of the present world
        self._began = time.time()
        self.restarted = False  # an earlier keeper of this claim may have committed without reporting it
        self.failed: dict[str, Any] | None = None  # the last save that failed: step and error
        #: Where state comes from when no worker holds any: the newest committed checkpoint.
        self.restore = self._newest()
        self.due_at = self._next_due()

    def _newest(self) -> RestorePoint:
        for checkpoint in newest_first(self._storage):
            if checkpoint not in self._unloadable:
                return RestorePoint(checkpoint.step, checkpoint.attempt)
        return RestorePoint()

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return self.restore.step or 0

    def recovered(self, began: float | None) -> None:
        """This keeper replaces an earlier one of the same claim, which `began` at that time (unix seconds)."""
        self.restarted, self._began = True, began or self._began

    def world_formed(self, generation: Generation) -> None:
        """Forget the attempts of the last world: their shares will not be complete."""
        self._attempts.clear()
        self._generation = generation
        self.due_at = self._next_due()

    # ---- when ------------------------------------------------------------------------------------------------------

    def _next_due(self) -> float:
        elapsed = time.time() - self._began
        return time.monotonic() + save_interval(self._every_s, self._record.save_costs, elapsed, self._record.faults)

    def wish(self, in_world: bool, why: str = "it is time") -> None:
        """Ask the workers for a checkpoint, once. The next is due an interval after this one is decided, or after the
        world changes."""
        self.due_at = float("inf")
        if in_world and not self._keeping.closed():
            self._keeping.send(Wished("save", why))

    # ---- committing ------------------------------------------------------------------------------------------------

    def take_share(self, member_id: str, generation: Generation, share: Share, ranks: Mapping[str, int]) -> None:
        """A worker's share arrived: its pack is durable, or could not be saved.

        Args:
            ranks: the rank of each member of the present world, by id.
        """
        step, name = key = (share.step, share.attempt)
        attempt = self._attempts.get(key)
        if attempt is None:
            attempt = self._attempts[key] = Attempt(step, name, generation, share.shares)
            if self.restarted and patiently(self._storage.exists, f"{attempt_folder(step, name)}/{MANIFEST}"):
                self._note_committed(step, name)  # the earlier keeper committed it, but may not have told everyone
                self._decide(attempt, None)
                return
        what = attempt.take(member_id, share)
        if what == "decided":
            self._send_commit(attempt)
        elif what == "failed":
            self._decide(attempt, share.error or "a worker's share has no index of its tensors", no_room=share.no_room)
        elif what == "whole":
            self._commit(attempt, ranks)

    def note_commits_before(self) -> None:
        """Record commits without an event: an earlier keeper may have died in between, and all workers with it."""
        for checkpoint in reversed(list(newest_first(self._storage))):
            if checkpoint.attempt.startswith(f"{self._epoch}-"):
                self._note_committed(checkpoint.step, checkpoint.attempt)

    def _note_committed(self, step: int, name: str) -> None:
        self.restore = RestorePoint(step, name)
        if (step, name) not in self._record.committed:
            self._record.committed.add((step, name))
            self._keeping.note(
                "checkpoint_committed", generation=name.rpartition("-")[0], step=step, detail={"attempt": name}
            )

    def _decide(self, attempt: Attempt, error: str | None, *, anew: bool = False, no_room: bool = False) -> None:
        """Report the outcome of an attempt to the ledger and the workers, then remove old checkpoints.

        Args:
            anew: the objects that it refers to are unusable: the next checkpoint must write all bytes.
            no_room: the storage is full; old files are removed before the workers hear of it, as they may save again at
                once.
        """
        attempt.decide(error, anew=anew)
        self.due_at = self._next_due()
        note, step = self._keeping.note, attempt.step
        if error:
            self.failed = {"step": step, "error": error}
            note("checkpoint_failed", generation=str(attempt.generation), step=step, detail=error)
        if no_room and not self._keeping.closed():
            self.make_room(step)
        self._send_commit(attempt)
        if error or self._keeping.closed():
            return
        self._prune()

    def make_room(self, step: int) -> None:
        """The storage is full: remove unfinished attempts, and checkpoints that would be removed after one more commit,
        but never the last one that can be loaded."""
        storage, removed = self._storage, []
        try:
            committed = set(with_manifest(storage))
            for saved in steps_with_attempts(storage):
                for name in attempts(storage, saved):
                    if self._is_over(saved, name) and Committed(saved, name) not in committed:
                        folder = attempt_folder(saved, name)
                        removed += [folder] if storage.names(folder) else []
                        storage.remove(folder)
            policy = replace(self._policy, last=max(1, self._policy.last - 1))
            removed += [c.folder for c in Retention(storage, policy, self._unloadable).prune()]
        except Exception as problem:  # any error of storage: the next save will find out whether there is space
            self._keeping.note("checkpoint_failed", step=step, detail=f"no room could be made: {problem}")
        if removed:
            self._keeping.note("room_made", step=step, detail={"removed": removed})

    def _is_over(self, step: int, name: str) -> bool:
        """Whether no worker writes to an attempt any more. One of the present world may be going on although no share
        of it has arrived."""
        known, match = self._attempts.get((step, name)), ATTEMPT.match(name)
        if known is not None or match is None or self._generation is None:
            return known is not None and known.over
        return Generation(int(match[1]), int(match[2])) < self._generation

    def _prune(self) -> None:
        try:
            self._retention.prune()
        except Exception as problem:  # any error of storage: the run does not depend on it, and the next save retries
            self._keeping.note(
                "checkpoint_failed", step=self.step, detail=f"old checkpoints could not be removed: {problem}"
            )
        self._note_damaged(self._retention)

    def _note_damaged(self, retention: Retention) -> None:
        for checkpoint, damage in retention.damaged.items():
            self.unloadable(checkpoint, damage, damaged=True, found_by="the removal of old ones")

    def _send_commit(self, attempt: Attempt) -> None:
        self._keeping.send(Commit(attempt.step, attempt.name, attempt.error, attempt.anew))

    def _commit(self, attempt: Attempt, ranks: Mapping[str, int]) -> None:
        """Commit an attempt, and report the outcome."""
        if not self._keeping.owns():
            return self._decide(attempt, "a newer claim owns the run")
        if attempt.over:
            return  # while asking, the keeper found that the folder was removed
        began, record, step = time.monotonic(), self._record, attempt.step
        manifest = attempt.manifest(record.last_eval if record.evaluated_step == step else {})
        try:
            self._keeping.flush_rows()
            whole = commit(self._storage, attempt.name, manifest, attempt.ordered(ranks))
        except Exception as error:  # any error of storage: the last checkpoint stays the newest, and the run goes on
            why = f"the checkpoint of step {step} could not be committed: {type(error).__name__}: {error}"
            anew, no_room = isinstance(error, DamagedCheckpoint), is_no_room(error)
            return self._decide(attempt, why, anew=anew, no_room=no_room)
        self.restore = RestorePoint(step, attempt.name)
        record.saved(step, attempt.name, save_cost(attempt.stall_s, attempt.upload_s))
        self._keeping.note(
            "checkpoint_committed",
            generation=str(attempt.generation),
            step=step,
            seconds=round(attempt.upload_s + time.monotonic() - began, 4),
            detail={"attempt": attempt.name, "bytes": whole.nbytes, **attempt.summary()},
        )
        self._decide(attempt, None)

    # ---- what is gone, and what cannot be loaded ---------------------------------------------------------------------

    def removed(self) -> None:
        """All checkpoints were removed: have a new one saved that refers to none of them."""
        self.restore = self._newest()
        for attempt in self._attempts.values():
            if not attempt.over:
                self._decide(attempt, "what it wrote was removed", anew=True)
        self._keeping.send(Commit(-1, "", "removed", anew=True))
        self.wish(True, "all that was saved was removed")

    def distrust(self, checkpoint: Committed) -> None:
        """A checkpoint cannot be loaded: worlds that are formed from now on do not use it. From any thread."""
        self._unloadable.add(checkpoint)
        if (self.restore.step, self.restore.attempt) == (checkpoint.step, checkpoint.attempt):
            self.restore = RestorePoint()  # until storage was asked; workers that hold state keep it

    def unloadable(
        self, checkpoint: Committed, problem: str, *, damaged: bool, found_by: str, generation: str | None = None
    ) -> None:
        """Report a checkpoint that cannot be loaded, mark it if its bytes are damaged, and have nothing refer to it."""
        if self._keeping.closed():
            return
        self.distrust(checkpoint)
        detail: dict[str, Any] = {"attempt": checkpoint.attempt, "problem": problem, "found_by": found_by}
        if damaged:
            try:
                if patiently(self._storage.exists, f"{checkpoint.folder}/{MANIFEST}"):
                    mark(self._storage, checkpoint, problem)
            except Exception as error:  # any error of storage: this claim ignores the checkpoint all the same
                detail["not_marked"] = f"{type(error).__name__}: {error}"
            self._keeping.note("checkpoint_damaged", generation=generation, step=checkpoint.step, detail=detail)
        else:
            self._keeping.note("checkpoint_failed", generation=generation, step=checkpoint.step, detail=problem)
        self.restore = self._newest()
        self._keeping.send(Commit(checkpoint.step, checkpoint.attempt, problem, anew=True))

    # ---- removing --------------------------------------------------------------------------------------------------

    def prune(self, policy: Policy, *, yes: bool) -> list[dict[str, Any]]:
        """The checkpoints that this policy does not keep; with `yes` they are removed."""
        retention = Retention(self._storage, policy, self._unloadable)
        gone, needed = retention.plan()
        found = removals(self._storage, gone, set(newest_first(self._storage)), needed)
        if yes:
            retention.prune()
        self._note_damaged(retention)
        return [asdict(removal) for removal in found]
