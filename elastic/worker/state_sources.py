"""Where a worker's training state comes from: initial weights, the newest checkpoint that can be loaded, or a peer."""

from __future__ import annotations

import time

from elastic.checkpoint.format import Manifest
from elastic.checkpoint.initial import load_initial, open_initial
from elastic.checkpoint.loader import check_objects, load
from elastic.checkpoint.patience import in_one_sentence
from elastic.checkpoint.reader import Committed, newest_first, read_manifest, refuse_to_begin_anew
from elastic.config import CheckpointOptions
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.membership.client import WorkerLink
from elastic.membership.protocol import Unloadable
from elastic.parallel.layout import sources
from elastic.storage import Storage
from elastic.worker.group import Group
from elastic.worker.state import TrainState
from elastic.worker.weights import weights_alone


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
