"""Where a state comes from when nobody holds all of it in memory: snapshots and checkpoints, newest first.

Everyone of a world goes down together, spares too: a rung that one of them cannot take, none takes. Each part of the
state is read once, by the first worker that is to hold it; who else is to hold it takes it from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from elastic.checkpoint.format import Manifest
from elastic.checkpoint.initial import initial_source, load_initial
from elastic.checkpoint.loader import check_objects, load_together, raise_first, told
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
    """What the rungs had; `state` is None where others read this worker's part. `open`: what belongs after the step, an
    evaluation, may not have been done."""

    step: int
    state: TrainState | None
    rung: str
    open: bool = False
    manifest: Manifest | None = None  # of the checkpoint that the state is from


def next_rung(snapshot: int | None, checkpoint: int | None) -> Literal["snapshot", "checkpoint", "fresh"]:
    """What leaves the least to be done again; of equals the snapshot, which is faster.

    Args:
        snapshot, checkpoint: steps of the newest ones that were not tried yet, if any.
    """
    if snapshot is not None and (checkpoint is None or snapshot >= checkpoint):
        return "snapshot"
    return "fresh" if checkpoint is None else "checkpoint"


def post_restored(link: WorkerLink, step: int, began: float, detail: dict[str, Any]) -> None:
    """Say where the state came from, and how long that took since `began` (monotonic)."""
    seconds = round(time.monotonic() - began, 4)
    detail = {k: v for k, v in detail.items() if v is not None}
    link.event("restored", step, detail, seconds=seconds)


def descend(
    group: Group,
    make: Make,
    options: CheckpointOptions,
    storage: Storage,
    link: WorkerLink,
    snapshots: Snapshots,
    lost: str | None,
) -> Found:
    """Take the first rung that holds.

    Args:
        lost: why the state is not in memory, if any of it was.

    Raises:
        CheckpointError: there are checkpoints, and nothing can be loaded.
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
            continue  # now it is known which there are
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
        _initialise(state, options, link, post=group.leads)
    return done(0, state, {"rung": "fresh"})


def _initialise(state: TrainState, options: CheckpointOptions, link: WorkerLink, *, post: bool = True) -> None:
    """A fresh start: give the model (or this worker's part of it) the weights that the run is to start from, if it is.

    Raises:
        CheckpointError: they do not fit.
        ConfigError: they cannot be read.
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
    """Tell the keeper: nothing is to count this checkpoint any more; it is marked if it is damaged."""
    damaged = isinstance(error, DamagedCheckpoint)
    link.post(Unloadable(checkpoint.step, checkpoint.attempt, str(error), damaged))


class _Stored:
    """The committed checkpoints that were not tried yet, newest first. Before they are listed, the newest is what the
    keeper says: listing takes its time, and a snapshot may do."""

    def __init__(self, group: Group, make: Make | None, storage: Storage, convert: bool, link: WorkerLink):
        self._group, self._make, self._storage, self._convert, self._link = group, make, storage, convert, link
        self._said = group.assignment.restore.step
        self._listed: list[Committed] | None = None
        self._state: TrainState | None = None
        self._filled = False
        self.problem = ""  # of the newest that could not be loaded

    @property
    def step(self) -> int | None:
        """Of the newest."""
        if self._listed is None:
            return self._said
        return self._listed[0].step if self._listed else None

    def look(self) -> bool:
        """List them; the lowest rank says which there are. Returns False where that was done before."""
        if self._listed is not None:
            return False
        group = self._group
        there = [[c.step, c.attempt] for c in newest_first(self._storage)] if group.rank == 0 else None
        self._listed = [Committed(step, attempt) for step, attempt in group.send_json(there, 0)]
        return True

    def pop(self) -> Committed:
        assert self._listed, "there is none"
        return self._listed.pop(0)

    def drop(self) -> None:
        """Give back the memory of a state that could not be loaded."""
        self._state = None

    def load(self, checkpoint: Committed) -> tuple[TrainState | None, int, Manifest | None]:
        """This worker's part and the checkpoint's manifest (None where others read it), and the bytes that it read.

        Raises:
            CheckpointError: on all workers, if any of them could not load.
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
            self._state = None  # one at a time
            self._state, self._filled = self._make(alone), alone  # of weights alone, all else is as the job makes it
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
        """As `reader.refuse_to_begin_anew`, on all workers; the lowest rank looks."""
        problem = None
        try:
            if self._group.rank == 0:
                refuse_to_begin_anew(self._storage)
        except CheckpointError as error:
            problem = error
        self._raise_together(problem)

    def _raise_together(self, problem: CheckpointError | None) -> None:
        raise_first(self._group.gather_json(told(problem) if problem else None))
