"""Where a worker's training state comes from: initial weights, the newest checkpoint that can be loaded, or a peer."""

from __future__ import annotations

import time

from elastic.checkpoint.initial import load_initial, open_initial
from elastic.checkpoint.reader import Committed
from elastic.config import CheckpointOptions
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.membership.client import WorkerLink
from elastic.membership.protocol import Unloadable
from elastic.worker.state import TrainState


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


def tell_unloadable(link: WorkerLink, checkpoint: Committed, error: CheckpointError) -> None:
    """Tell the keeper: nothing is to count this checkpoint any more; it is marked if it is damaged."""
    damaged = isinstance(error, DamagedCheckpoint)
    link.post(Unloadable(checkpoint.step, checkpoint.attempt, str(error), damaged))
