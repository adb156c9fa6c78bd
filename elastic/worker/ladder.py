"""Restores a state that the members do not hold in memory: from snapshots and checkpoints, newest first.

The sources are the rungs of a ladder. All members of a world, spares too, try the same rung; if it fails on one of
them, all go on to the next. Each part of the state is read once, by the first worker that is to hold it, and the other
holders of the part receive it from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from elastic.checkpoint.format import Manifest
from elastic.checkpoint.initial import initial_source, load_initial
from elastic.checkpoint.loader import check_objects, error_json, load_together, raise_first
from elastic.checkpoint.patience import in_one_sentence
from elastic.checkpoint.reader import Committed, newest_first, read_manifest, refuse_to_begin_anew
from elastic.checkpoint.tensors import Shard
from elastic.config import CheckpointOptions
from elastic.errors import CheckpointError, DamagedCheckpoint, SnapshotError
from elastic.membership.client import WorkerLink
from elastic.membership.protocol import Unloadable
from elastic.storage import Storage
from elastic.worker.group import Group
from elastic.worker.snapshots import Snapshots
from elastic.worker.state import TrainState
from elastic.worker.weights import weights_alone

Make = Callable[[bool], TrainState]


@dataclass
class Found:
    """What was restored.

    Args:
        step: the number of updates in the state.
        state: this worker's part; None if another worker reads it.
        rung: "snapshot", "checkpoint" or "fresh".
        open: an evaluation that belongs after this step may not have been done.
        manifest: of the checkpoint that was read.
    """

    step: int
    state: TrainState | None
    rung: str
    open: bool = False
    manifest: Manifest | None = None


def next_rung(snapshot: int | None, checkpoint: int | None) -> Literal["snapshot", "checkpoint", "fresh"]:
    """Choose the source with the newest step; on a tie the snapshot, which is faster.

    Args:
        snapshot, checkpoint: the steps of the newest ones that were not tried yet; None if there is none.
    """
    if snapshot is not None and (checkpoint is None or snapshot >= checkpoint):
        return "snapshot"
    return "fresh" if checkpoint is None else "checkpoint"


def post_restored(link: WorkerLink, step: int, began: float, detail: dict[str, Any]) -> None:
    """Report where the state came from, and the seconds since `began` (monotonic)."""
    seconds = round(time.monotonic() - began, 4)
    detail = {k: v for k, v in detail.items() if v is not None}
    link.event("restored", step, detail, seconds=seconds)


def descend(
    group: Group,
    make: Make | None,
    options: CheckpointOptions,
    storage: Storage,
    link: WorkerLink,
    snapshots: Snapshots,
    lost: str | None,
) -> Found:
    """Restore from the first rung that works on all members.

    Args:
        make: makes an empty state for this worker; its argument says whether the values are initialised.
        lost: why the state is not in memory, if it was there before.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded.
        StorageError: storage cannot be read.
    """
    with in_one_sentence(storage, "read"):
        return _descend(group, make, options, storage, link, snapshots, lost)


def _descend(
    group: Group,
    make: Make | None,
    options: CheckpointOptions,
    storage: Storage,
    link: WorkerLink,
    snapshots: Snapshots,
    lost: str | None,
) -> Found:
    began = time.monotonic()
    if group.place is None or not group.layout.is_first(group.place):
        make = None
    copies, why = snapshots.find(group)
    if lost and snapshots.on and not copies:
        why = why or "no vault has a snapshot"
    reasons, stored = [lost, why], _Stored(group, make, storage, options.convert, link)

    def done(
        step: int,
        state: TrainState | None,
        detail: dict[str, Any],
        *,
        open: bool = False,
        manifest: Manifest | None = None,
    ) -> Found:
        reason = "; ".join(r for r in reasons if r) or None
        if group.leads and (reason is not None or detail["rung"] != "fresh"):
            post_restored(link, step, began, {**detail, "reason": reason})
        return Found(step, state, detail["rung"], open, manifest)

    while True:
        rung = next_rung(copies[0].id.step if copies else None, stored.step)
        if rung == "snapshot":
            found = copies.pop(0)
            stored.drop()
            try:
                state, size = snapshots.load(group, make, found)
            except SnapshotError as error:
                reasons.append(str(error))
                continue
            detail = {"rung": "snapshot", "snapshot": str(found.id), "bytes": size}
            return done(found.id.step, state, detail, open=True)
        if stored.look():
            continue  # the list may hold a checkpoint that is newer than the one the keeper named
        if rung == "fresh":
            break
        checkpoint = stored.pop()
        if copies:
            newer = f"is of step {copies[0].id.step}, a checkpoint of step {checkpoint.step}"
            reasons.append(f"the newest complete snapshot {newer}")
        try:
            state, size, manifest = stored.load(checkpoint)
        except CheckpointError as error:
            reasons.append(f"the checkpoint of step {checkpoint.step} cannot be loaded")
            if group.leads:
                _post_unloadable(link, checkpoint, error)
            continue
        detail = {"rung": "checkpoint", "attempt": checkpoint.attempt, "bytes": size}
        return done(checkpoint.step, state, detail, open=manifest is None or not manifest.metrics, manifest=manifest)
    if stored.problem:
        raise CheckpointError(f"no committed checkpoint can be loaded; the newest problem: {stored.problem}")
    stored.refuse_to_begin_anew()
    state = make(True) if make is not None else None
    if state is not None:
        if state.attributes is not None:
            state.attributes.load({})  # what updates that are lost had changed
        _initialise(state, options, link, post=group.leads)
    return done(0, state, {"rung": "fresh"})


def _initialise(state: TrainState, options: CheckpointOptions, link: WorkerLink, *, post: bool = True) -> None:
    """Give a fresh model (or this worker's part of it) the weights that the run starts from, if the job or an option
    names any.

    Raises:
        CheckpointError: the weights do not fit the model.
        ConfigError: the weights cannot be read.
    """
    began = time.monotonic()
    source = initial_source(state.job, options.init_from)
    if source is None:
        return
    shards, aliases = state.weights()
    named = state.job.weight_name
    found = load_initial(source, shards, partial=options.init_partial, aliases=aliases, named=named)
    if not post:
        return
    link.event("initialised", 0, found.to_json(), seconds=round(time.monotonic() - began, 4))


def _post_unloadable(link: WorkerLink, checkpoint: Committed, error: CheckpointError) -> None:
    """Tell the keeper that this checkpoint counts no more; it is marked as damaged if it is."""
    damaged = isinstance(error, DamagedCheckpoint)
    link.post(Unloadable(checkpoint.step, checkpoint.attempt, str(error), damaged))


class _Stored:
    """The committed checkpoints that were not tried yet, newest first.

    Listing them takes time, and a snapshot may make it needless. So until `look` is called, the newest step is the one
    that the keeper named when the world formed.
    """

    def __init__(self, group: Group, make: Make | None, storage: Storage, convert: bool, link: WorkerLink):
        self._group, self._make, self._storage, self._convert, self._link = group, make, storage, convert, link
        self._said = group.assignment.restore.step
        self._listed: list[Committed] | None = None
        self._state: TrainState | None = None
        self._filled = False
        self.problem = ""  # of the newest checkpoint that could not be loaded

    @property
    def step(self) -> int | None:
        """The step of the newest one; None if there is none."""
        if self._listed is None:
            return self._said
        return self._listed[0].step if self._listed else None

    def look(self) -> bool:
        """List the checkpoints on the lowest rank and tell all members. Returns False if that was done before."""
        if self._listed is not None:
            return False
        group = self._group
        there = [[c.step, c.attempt] for c in newest_first(self._storage)] if group.rank == 0 else None
        self._listed = [Committed(step, attempt) for step, attempt in group.send_json(there, 0)]
        return True

    def pop(self) -> Committed:
        """Take the newest one off the list."""
        assert self._listed, "there is none"
        return self._listed.pop(0)

    def drop(self) -> None:
        """Free the memory of a state that could not be loaded."""
        self._state = None

    def load(self, checkpoint: Committed) -> tuple[TrainState | None, int, Manifest | None]:
        """Load a checkpoint together with all members.

        Returns:
            This worker's part of the state (None if another worker reads it), the number of bytes that it read, and the
            manifest (None if another worker reads the part).

        Raises:
            CheckpointError: on all members, if one of them could not load its part.
        """
        try:
            manifest = self._read(checkpoint)
            return *self._load(checkpoint, manifest), manifest if self._make is not None else None
        except CheckpointError as error:
            self.problem = self.problem or str(error)
            raise

    def _read(self, checkpoint: Committed) -> Manifest:
        manifest = Manifest(checkpoint.step, 0, "", {}, {})
        problem: CheckpointError | None = None
        try:
            if self._make is not None:
                manifest = read_manifest(self._storage, checkpoint)
            if self._group.leads:
                check_objects(self._storage, checkpoint.folder, manifest)
        except CheckpointError as error:
            problem = error
        self._raise_together(problem)
        return manifest

    def _load(self, checkpoint: Committed, manifest: Manifest) -> tuple[TrainState | None, int]:
        group, alone = self._group, weights_alone(manifest.values)
        convert = self._convert or alone
        shards: list[Shard] = []
        problem: CheckpointError | None = None
        if self._make is not None and (self._state is None or (alone and not self._filled)):
            self._state = None  # drop the old one first: two states may not fit in memory
            # A checkpoint of weights alone has values for nothing else: the job must initialise the rest.
            self._state, self._filled = self._make(alone), alone
        state = self._state
        try:
            if state is not None:
                shards = state.destinations(manifest.tensors, manifest.values, convert=convert)
        except CheckpointError as error:
            problem = error
        self._raise_together(problem)
        report = load_together(self._storage, checkpoint.folder, manifest, shards, group.gather_json, convert=convert)
        for block in report.refetched:
            self._link.event("block_refetched", checkpoint.step, block)
        try:
            if state is not None:
                state.load_values(manifest.values)
        except CheckpointError as error:
            problem = error
        self._raise_together(problem)
        return state, report.read_bytes

    def refuse_to_begin_anew(self) -> None:
        """Call `reader.refuse_to_begin_anew` on the lowest rank, and raise its error on all members."""
        problem = None
        try:
            if self._group.rank == 0:
                refuse_to_begin_anew(self._storage)
        except CheckpointError as error:
            problem = error
        self._raise_together(problem)

    def _raise_together(self, problem: CheckpointError | None) -> None:
        raise_first(self._group.gather_json(error_json(problem) if problem else None))
