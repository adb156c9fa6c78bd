"""Saving and restoring a worker's training state through checkpoints and through peers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from elastic import fault
from elastic.checkpoint.format import Manifest
from elastic.checkpoint.initial import load_initial, open_initial
from elastic.checkpoint.loader import check_objects, load
from elastic.checkpoint.reader import Committed, newest_first, read_manifest, refuse_to_begin_anew
from elastic.checkpoint.saver import Save, Saver
from elastic.checkpoint.transfer import in_one_sentence
from elastic.checkpoint.uploader import STILL_S
from elastic.config import CheckpointOptions
from elastic.errors import CheckpointError, DamagedCheckpoint, ElasticError
from elastic.membership.client import RunOver, WorkerLink
from elastic.membership.protocol import Share, Unloadable
from elastic.membership.world import Generation
from elastic.parallel.layout import sources
from elastic.storage import Storage
from elastic.worker.comeback import check_comes_back
from elastic.worker.group import Group
from elastic.worker.state import TrainState, weights_alone

WhenBusy = Literal["wait", "delay", "skip"]
UPLOAD_TIMEOUT_S = 3600.0
LAST_SAVE_S = 600.0  # for which a save is tried again that nobody tries again later
_FIRST_AGAIN_S, _LONGEST_AGAIN_S = 0.1, 10.0


@dataclass(frozen=True)
class _Sender:
    """The member of a world that a save belongs to, and what its first rank adds."""

    generation: Generation
    rank: int
    size: int
    header: dict[str, Any] | None
    world: object


class Saving:
    """Every way in which a worker saves. All methods on the training thread.

    A save's share is reported to the keeper, which commits when it has all, after its bytes are durable and after the
    row of its step was posted: no committed step is missing in the ledger.
    """

    def __init__(
        self,
        state: TrainState | None,
        storage: Storage,
        link: WorkerLink,
        device: torch.device,
        *,
        seed: int,
        config_digest: str,
        when_busy: WhenBusy,
        on_wait: Callable[[int], None] = lambda seconds: None,
        made: Callable[[], dict[str, Any]] = dict,
        still_s: float = STILL_S,
    ):
        """`on_wait` is called about once a second while training waits for an upload, with the seconds so far.

        Args:
            state: None where `enter` will bring it.
            made: what the state was computed with, for the manifest.
            still_s: an uploader that moves nothing for so long is replaced.

        Raises:
            ConfigError: the state holds what checkpoints cannot have.
        """
        if state is not None:
            check_comes_back(state)
        self._state, self._link, self._on_wait = state, link, on_wait
        self._header = {"seed": seed, "config_digest": config_digest}
        self._when_busy, self._made = when_busy, made
        self._saver = Saver(storage, device=device, still_s=still_s, on_restart=self._on_restart)
        self._generation: Generation | None = None
        self._rank, self._size, self._count = 0, 1, 0
        self._lock = threading.Lock()
        self._world: object = None  # saves of another one are not reported any more
        self._ended: tuple[Save, _Sender] | None = None  # a save whose report waits for its row
        self._posted_step = -1
        self._under_way: tuple[int, str] | None = None  # step and attempt that the keeper has not decided on
        self._overdue = False
        self._committed: tuple[int, str] | None = None  # step and attempt of the newest commit heard of

    # ---- worlds ----------------------------------------------------------------------------------------------------

    def enter(self, group: Group, state: TrainState) -> None:
        """From now on saves are this world's, and of this state."""
        assert group.place is not None, "a spare saves nothing"
        self._state = state
        self._generation, self._rank, self._size = group.assignment.generation, group.place, group.layout.size
        self._count = 0
        with self._lock:
            self._world, self._posted_step = object(), -1

    def leave(self) -> None:
        """The world is over. What it was saving will not be committed, so the next one saves again."""
        self._note_commits()
        if self._under_way is not None:
            self._overdue = True
            self._saver.cancel()
        with self._lock:
            self._world = self._ended = None
        self._under_way = None

    def close(self) -> None:
        """End the uploader."""
        self._saver.close()

    # ---- in the step loop ------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a save is still under way here; the members agree on it at the fence."""
        return self._saver.busy

    @property
    def overdue(self) -> bool:
        """Whether a save was put off: wished for at the next fence."""
        return self._overdue

    def settle(self) -> float:
        """To be called before the state is written to; returns the seconds that it waited."""
        return self._saver.settle()

    def save(self, step: int, *, busy: bool) -> None:
        """The state of `step` is to be saved; `busy` if the members agreed that one of them still is.

        What the last save was for is not thrown away: this one waits for it, is put off, or is left out, as configured.
        """
        self._note_commits()
        if busy and self._when_busy != "wait":
            self._overdue = self._when_busy == "delay"
            if self._rank == 0:
                what = "put off until the save before has" if self._overdue else "left out: the save before has not"
                detail = f"{what} ended"
                self._link.event("checkpoint_skipped", step, detail)
            return
        self._overdue = False
        self._begin(step)

    def row_posted(self, step: int) -> None:
        """The row of this step, and all before, are on their way to the ledger."""
        with self._lock:
            self._posted_step = step
            ended, self._ended = self._ended, None
        if ended is not None:
            self._report(*ended)

    # ---- on the way out --------------------------------------------------------------------------------------------

    def finish(self, step: int) -> None:
        """Save the state of `step`, whose row is posted, and wait until it is committed; again where that failed.

        Raises:
            CheckpointError: it could not be saved or committed for LAST_SAVE_S.
            WorldBroken: a member was lost meanwhile, so it never will be.
        """

        def save() -> None:
            self._begin(step)
            self.row_posted(step)
            self._await(UPLOAD_TIMEOUT_S)

        self._again(save, LAST_SAVE_S)

    def _again(self, save: Callable[[], None], timeout_s: float) -> None:
        """Save until that succeeds. All members hear of each failure, so they all begin anew."""
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
            self._on_wait(int(time.monotonic() - began))
            time.sleep(min(left, 0.5))

    def make_safe(self, step: int, timeout_s: float) -> None:
        """Have the state of `step`, whose row is posted, committed before the world is left.

        Raises:
            CheckpointError: it could not be saved or committed.
            WorldBroken: a member was lost meanwhile, so it never will be.
        """
        deadline = time.monotonic() + timeout_s

        def save() -> None:
            self._note_commits()
            if self._committed is None or self._committed[0] != step:
                if self._under_way is None or self._under_way[0] != step:
                    self._begin(step)
                    self.row_posted(step)
                self._await(deadline - time.monotonic())

        self._again(save, timeout_s)

    def finish_under_way(self, timeout_s: float) -> None:
        """Give the save that is under way the time to be committed, before this worker ends with an error."""
        with contextlib.suppress(ElasticError, RunOver):  # the error that ends the worker is the one to be told
            self._note_commits()
            self._await(timeout_s)

    def save_alone(self, state: TrainState, step: int, generation: Generation) -> None:
        """Commit the state of `step` without a world: this worker was the last one in `generation` to hold it."""
        self._state = state
        self._generation, self._rank, self._size = generation, 0, 1
        with self._lock:
            self._world = object()

        def save() -> None:
            self._begin(step, alone=True)
            self.row_posted(step)
            self._await(UPLOAD_TIMEOUT_S)

        with contextlib.suppress(CheckpointError):  # which is in the ledger: nobody can save this any more
            self._again(save, LAST_SAVE_S)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _begin(self, step: int, *, alone: bool = False) -> None:
        self._await_upload()
        assert self._generation is not None
        assert self._state is not None
        self._count += 1
        attempt = f"{self._generation}-{self._count}{'alone' if alone else ''}"
        header = {**self._header, "made": self._made(), "values": self._state.values()} if self._rank == 0 else None
        self._note_commits()
        refer = self._under_way is None  # else one may be committed meanwhile, and the one before it pruned
        sender = _Sender(self._generation, self._rank, self._size, header, self._world)
        shards = self._state.shards(self._rank, self._size)
        self._under_way = (step, attempt)
        try:
            self._saver.start(
                step, attempt, shards, rank=self._rank, refer=refer, on_end=lambda save: self._on_end(save, sender)
            )
        except (OSError, MemoryError) as error:
            failed = Save(step, attempt, self._rank, [], [], 0)
            failed.error = f"no memory to stage the state of step {step}: {error}"
            self._on_end(failed, sender)

    def _await_upload(self) -> None:
        """Wait for a save that is still under way; each is patient with storage, but not for ever."""
        seconds = 0
        while self._saver.busy:
            with contextlib.suppress(CheckpointError):
                self._saver.wait(1.0)
            seconds += 1
            self._on_wait(seconds)
            if seconds > UPLOAD_TIMEOUT_S:
                raise CheckpointError(f"the upload before took more than {UPLOAD_TIMEOUT_S:.0f} s")

    def _on_restart(self, save: Save, why: str) -> None:
        """On the saver's thread."""
        self._link.event("uploader_restarted", save.step, why, generation=self._generation)

    def _on_end(self, save: Save, sender: _Sender) -> None:
        """On the saver's thread."""
        with self._lock:
            if save.step > self._posted_step:
                self._ended = (save, sender)
                return
        self._report(save, sender)

    def _report(self, save: Save, sender: _Sender) -> None:
        fault.point("checkpoint.before_report", save.rank, save.step)
        with self._lock:
            if sender.world is not self._world:
                return
        share = Share(
            save.step,
            save.attempt,
            sender.size,
            save.index,
            sender.header,
            save.error,
            save.no_room,
            save.facts,
        )
        self._link.post(share, sender.generation)

    def _note_commits(self, wait_s: float = 0.0) -> str | None:
        """Take in what the keeper decided; returns the error of what was under way, if it decided on that."""
        while (commit := self._link.next_commit(wait_s)) is not None:
            attempt = (commit.step, commit.attempt)
            if commit.anew:
                self._saver.refer_to_nothing()
            if commit.error and (attempt == self._committed or commit.step < 0):  # -1 is all that there was
                self._committed = None
            if not commit.error and attempt != self._committed:  # who missed it makes the keeper say it again
                self._committed = attempt
                self._saver.committed(*attempt)
            if attempt == self._under_way:
                self._under_way = None
                return commit.error
        return None

    def _await(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        step = self._under_way[0] if self._under_way else 0
        while self._under_way is not None:
            error = self._note_commits(0.1)
            if error:
                raise CheckpointError(error)
            if self._under_way is not None:
                self._link.check()
                if time.monotonic() > deadline:
                    raise CheckpointError(f"waited {timeout_s:.0f} s for the commit of the checkpoint of step {step}")


def initialise(state: TrainState, options: CheckpointOptions, link: WorkerLink, *, tell: bool = True) -> None:
    """A fresh start: give the model (or this worker's part of it) the weights that the run is to start from, if it is.

    Raises:
        CheckpointError: they do not fit.
        ConfigError: they cannot be read.
    """
    if options.init_from is None:
        return
    began = time.monotonic()
    shards, aliases = state.weights()
    found = load_initial(open_initial(options.init_from), shards, partial=options.init_partial, aliases=aliases)
    if not tell:
        return
    link.event("initialised", 0, found.to_json(), seconds=round(time.monotonic() - began, 4))


def restore_newest(state: TrainState, storage: Storage, link: WorkerLink, *, convert: bool) -> Manifest | None:
    """Load the newest committed checkpoint that verifies; a damaged one is reported, and the one before is used.

    Args:
        convert: dtypes may be others than were saved.

    Returns:
        its manifest, or None where there is none: a fresh start.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded.
        StorageError: storage cannot be read.
    """
    with in_one_sentence(storage, "read"):
        return _restore_newest(state, storage, link, convert)


def _restore_newest(state: TrainState, storage: Storage, link: WorkerLink, convert: bool) -> Manifest | None:
    problem: CheckpointError | None = None
    for checkpoint in newest_first(storage):
        began = time.monotonic()
        try:
            manifest = read_manifest(storage, checkpoint)
            check_objects(storage, checkpoint.folder, manifest.tensors)
            other = convert or weights_alone(manifest.values)
            shards = state.destinations(manifest.tensors, manifest.values, convert=other)
            report = load(storage, checkpoint.folder, manifest, shards, convert=other)
            state.load_values(manifest.values)
        except CheckpointError as error:
            problem = problem or error
            tell_unloadable(link, checkpoint, error)
            continue
        for block in report.refetched:
            link.event("block_refetched", checkpoint.step, block)
        detail = {"rung": "checkpoint", "attempt": checkpoint.attempt, "bytes": report.read_bytes}
        link.event("restored", manifest.step, detail, seconds=round(time.monotonic() - began, 4))
        return manifest
    if problem is not None:
        raise CheckpointError(f"no committed checkpoint can be loaded; the newest problem: {problem}") from problem
    refuse_to_begin_anew(storage)
    return None


def tell_unloadable(link: WorkerLink, checkpoint: Committed, error: CheckpointError) -> None:
    """Tell the keeper: nothing is to count this checkpoint any more; it is marked if it is damaged."""
    damaged = isinstance(error, DamagedCheckpoint)
    link.post(Unloadable(checkpoint.step, checkpoint.attempt, str(error), damaged))


def restore_from_peers(state: TrainState, group: Group, held: list[int], link: WorkerLink) -> int:
    """Who does not have the newest state takes it from one that has it.

    Args:
        held: step of each rank's state.

    Returns:
        the step of the state that every member now has.
    """
    began = time.monotonic()
    where = sources(held)
    having = where[group.rank] == group.rank
    values = group.send_json(state.values() if group.rank == min(where) else None, min(where))
    tensors = group.send_tensors(state.tensors() if having else None, where)
    if not having:
        state.load(tensors, values)
        detail = {"rung": "peer", "source": where[group.rank]}
        link.event("restored", max(held), detail, seconds=round(time.monotonic() - began, 4))
    return max(held)
