"""Saves a worker's training state as checkpoints: with its world, or alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from elastic import fault
from elastic.checkpoint.save import Save
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.uploader_client import HANG_TIMEOUT_S
from elastic.errors import CheckpointError, ElasticError
from elastic.membership.client import RunOver, WorkerLink
from elastic.membership.protocol import Share
from elastic.membership.world import Generation
from elastic.storage import Storage
from elastic.worker.group import Group
from elastic.worker.state import TrainState

WhenBusy = Literal["wait", "delay", "skip"]
UPLOAD_TIMEOUT_S = 3600.0
LAST_SAVE_S = 600.0  # for so long a save is repeated if it is the last chance
_FIRST_AGAIN_S, _LONGEST_AGAIN_S = 0.1, 10.0


class Saving:
    """All ways in which a worker saves, and their state that outlives a world. All methods are for the training thread.

    A save's share is reported to the keeper, which commits when it has all shares. It is reported after its bytes are
    durable and after the row of its step was posted, so that no committed step is missing in the ledger.

    Args:
        on_wait: called about once a second while training waits for an upload, with the seconds so far.
        made: returns with what the state was computed, for the manifest.
        hang_timeout_s: an uploader that moves no byte for so long is replaced.
    """

    def __init__(
        self,
        storage: Storage,
        link: WorkerLink,
        device: torch.device,
        *,
        seed: int,
        config_digest: str,
        when_busy: WhenBusy,
        on_wait: Callable[[int], None] = lambda seconds: None,
        made: Callable[[], dict[str, Any]] = dict,
        hang_timeout_s: float = HANG_TIMEOUT_S,
    ):
        self.link, self.on_wait, self.when_busy, self.made = link, on_wait, when_busy, made
        self.header = {"seed": seed, "config_digest": config_digest}
        self.saver = Saver(storage, device=device, hang_timeout_s=hang_timeout_s, on_restart=self._on_restart)
        self.overdue = False  # a save was delayed, or its world ended: requested again at the next fence
        self.under_way: tuple[int, str] | None = None  # step and attempt that the keeper has not decided on
        self.committed: tuple[int, str] | None = None  # step and attempt of the newest known commit
        self.generation: Generation | None = None  # of the newest world
        self.count = 0  # saves under that generation

    def enter(self, group: Group, place: int, state: TrainState) -> WorldSaves:
        """A world begins, with this worker at `place` of its mesh."""
        self.count = 0
        return WorldSaves(self, group.assignment.generation, place, group.layout.size, state)

    def alone(self, state: TrainState, generation: Generation) -> WorldSaves:
        """Save without a world: this worker was the last one in `generation` to hold the state."""
        return WorldSaves(self, generation, 0, 1, state, alone=True)

    def settle(self) -> float:
        """To be called before the state is written to; returns the seconds that it waited for staging."""
        return self.saver.settle()

    def finish_under_way(self, timeout_s: float) -> None:
        """Wait for the commit of a pending save, before this worker ends with an error."""
        with contextlib.suppress(ElasticError, RunOver):  # the worker reports the error with which it ends, not these
            self.note_commits()
            self.await_commit(timeout_s)

    def close(self) -> None:
        """End the uploader."""
        self.saver.close()

    def _on_restart(self, save: Save, why: str) -> None:
        """Called on the saver's thread."""
        self.link.event("uploader_restarted", save.step, why, generation=self.generation)

    def note_commits(self, wait_s: float = 0.0) -> str | None:
        """Take in the keeper's decisions; returns the error of the pending save, if one of them was about it."""
        while (commit := self.link.next_commit(wait_s)) is not None:
            attempt = (commit.step, commit.attempt)
            if commit.anew:
                self.saver.refer_to_nothing()
            if commit.error and (attempt == self.committed or commit.step < 0):  # -1 means all checkpoints
                self.committed = None
            if not commit.error and attempt != self.committed:  # the keeper repeats a commit for workers that missed it
                self.committed = attempt
                self.saver.committed(*attempt)
            if attempt == self.under_way:
                self.under_way = None
                return commit.error
        return None

    def await_commit(self, timeout_s: float) -> None:
        """Wait until the keeper has decided on the pending save.

        Raises:
            CheckpointError: it could not be committed, or not in time.
            WorldBroken: a member was lost meanwhile, so it will not be committed.
        """
        deadline = time.monotonic() + timeout_s
        step = self.under_way[0] if self.under_way else 0
        while self.under_way is not None:
            error = self.note_commits(0.1)
            if error:
                raise CheckpointError(error)
            if self.under_way is not None:
                self.link.check()
                if time.monotonic() > deadline:
                    raise CheckpointError(f"waited {timeout_s:.0f} s for the commit of the checkpoint of step {step}")


class WorldSaves:
    """The saves of one state in one world. Made by `Saving`.

    Args:
        rank, size: index of this worker among those that save together, and their number.
        alone: it saves without a world.
    """

    def __init__(
        self,
        saving: Saving,
        generation: Generation,
        rank: int,
        size: int,
        state: TrainState,
        *,
        alone: bool = False,
    ):
        self._saving, self._link, self._saver = saving, saving.link, saving.saver
        self._generation, self._rank, self._size, self._state, self._alone = generation, rank, size, state, alone
        saving.generation = generation
        self._lock = threading.Lock()
        self._over = False
        self._ended: tuple[Save, dict[str, Any] | None] | None = None  # a save whose report awaits its row
        self._posted_step = -1

    def leave(self) -> None:
        """The world is over. Its pending save will not be committed, so the next world saves again."""
        saving = self._saving
        saving.note_commits()
        if saving.under_way is not None:
            saving.overdue = True
            self._saver.cancel()
        with self._lock:
            self._over, self._ended = True, None
        saving.under_way = None

    # ---- in the step loop ------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a save is pending here; the members agree on it at the fence."""
        return self._saver.busy

    @property
    def overdue(self) -> bool:
        """Whether a save was delayed, so that it is requested again at the next fence."""
        return self._saving.overdue

    def save(self, step: int, *, busy: bool) -> None:
        """Save the state of `step`; `busy` if the members agreed that a save of one of them is pending.

        A pending save is not given up: this one waits for it, is delayed, or is skipped, as configured.
        """
        saving = self._saving
        saving.note_commits()
        if busy and saving.when_busy != "wait":
            saving.overdue = saving.when_busy == "delay"
            if self._rank == 0:
                what = "put off until the save before has" if saving.overdue else "left out: the save before has not"
                detail = f"{what} ended"
                self._link.event("checkpoint_skipped", step, detail)
            return
        saving.overdue = False
        self._begin(step)

    def row_posted(self, step: int) -> None:
        """The rows of this step and all earlier ones are on their way to the ledger."""
        with self._lock:
            self._posted_step = step
            ended, self._ended = self._ended, None
        if ended is not None:
            self._report(*ended)

    # ---- on the way out --------------------------------------------------------------------------------------------

    def finish(self, step: int) -> None:
        """Save the state of `step`, whose row is posted, and wait until it is committed; repeat it if that fails.

        Raises:
            CheckpointError: it could not be saved or committed for LAST_SAVE_S.
            WorldBroken: a member was lost meanwhile, so it will not be committed.
        """

        def save() -> None:
            self._begin(step)
            self.row_posted(step)
            self._saving.await_commit(UPLOAD_TIMEOUT_S)

        self._again(save, LAST_SAVE_S)

    def _again(self, save: Callable[[], None], timeout_s: float) -> None:
        """Repeat a save until it succeeds. All members learn of each failure, so all of them begin again."""
        began, pause = time.monotonic(), _FIRST_AGAIN_S
        while True:
            try:
                return save()
            except CheckpointError:
                if time.monotonic() + pause > began + timeout_s:
                    raise
            self._rest(pause, began)
            pause = min(2 * pause, _LONGEST_AGAIN_S)

    def _rest(self, seconds: float, began: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._link.check()
            self._saving.on_wait(int(time.monotonic() - began))
            time.sleep(min(left, 0.5))

    def make_safe(self, step: int, timeout_s: float) -> None:
        """Have the state of `step`, whose row is posted, committed before the world is left.

        Raises:
            CheckpointError: it could not be saved or committed.
            WorldBroken: a member was lost meanwhile, so it will not be committed.
        """
        deadline = time.monotonic() + timeout_s

        def save() -> None:
            saving = self._saving
            saving.note_commits()
            if saving.committed is None or saving.committed[0] != step:
                if saving.under_way is None or saving.under_way[0] != step:
                    self._begin(step)
                    self.row_posted(step)
                saving.await_commit(deadline - time.monotonic())

        self._again(save, timeout_s)

    def commit_alone(self, step: int) -> None:
        """Commit the state of `step` without a world."""

        def save() -> None:
            self._begin(step)
            self.row_posted(step)
            self._saving.await_commit(UPLOAD_TIMEOUT_S)

        with contextlib.suppress(CheckpointError):  # the ledger has it, and no other worker can save this state
            self._again(save, LAST_SAVE_S)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        self._await_upload()
        saving, leads = self._saving, self._rank == 0
        saving.count += 1
        attempt = f"{self._generation}-{saving.count}{'alone' if self._alone else ''}"
        header = {**saving.header, "made": saving.made(), "values": self._state.values()} if leads else None
        saving.note_commits()
        refer = saving.under_way is None  # otherwise that save may be committed meanwhile, and an earlier one pruned
        shards = self._state.shards(self._rank, self._size)
        saving.under_way = (step, attempt)
        try:
            self._saver.start(
                step, attempt, shards, rank=self._rank, refer=refer, on_end=lambda save: self._on_end(save, header)
            )
        except (OSError, MemoryError) as error:
            failed = Save(step, attempt, self._rank, [], [], [], 0)
            failed.error = f"no memory to stage the state of step {step}: {error}"
            self._on_end(failed, header)

    def _await_upload(self) -> None:
        """Wait for a pending save. It is patient with storage, but not for ever."""
        seconds = 0
        while self._saver.busy:
            with contextlib.suppress(CheckpointError):
                self._saver.wait(1.0)
            seconds += 1
            self._saving.on_wait(seconds)
            if seconds > UPLOAD_TIMEOUT_S:
                raise CheckpointError(f"the upload before took more than {UPLOAD_TIMEOUT_S:.0f} s")

    def _on_end(self, save: Save, header: dict[str, Any] | None) -> None:
        """Called on the saver's thread."""
        with self._lock:
            if save.step > self._posted_step:
                self._ended = (save, header)
                return
        self._report(save, header)

    def _report(self, save: Save, header: dict[str, Any] | None) -> None:
        fault.point("checkpoint.before_report", save.rank, save.step)
        with self._lock:
            if self._over:
                return
        share = Share(save.step, save.attempt, self._size, save.index, header, save.error, save.no_room, save.facts)
        self._link.post(share, self._generation)
