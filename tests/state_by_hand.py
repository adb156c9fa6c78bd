"""Saving and loading named tensors without a run.

saved = save_state("s3://bucket/models", step=7, tensors={"w": w})
tensors, manifest = load_state("s3://bucket/models")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from elastic.checkpoint.format import Manifest
from elastic.checkpoint.loader import load_all
from elastic.checkpoint.reader import Committed, newest_first, read_manifest
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import Shard
from elastic.checkpoint.writer import commit
from elastic.errors import CheckpointError
from elastic.storage import Storage

SAVE_S = 3600.0


def save_state(
    url: str,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    values: dict[str, Any] | None = None,
    *,
    attempt: str = "0-0-0",
) -> Manifest:
    """Save tensors and JSON values as the checkpoint of `step` in the folder at `url`, and wait until it is committed.

    Raises:
        FileExistsError: there is a checkpoint of this step and attempt.
        CheckpointError: the tensors could not be saved.
    """
    storage = Storage(url)
    saver = Saver(storage)
    try:
        saver.start(step, attempt, [Shard.whole(name, tensor) for name, tensor in tensors.items()])
        save = saver.wait(SAVE_S)
    finally:
        saver.close()
    if save.index is None:
        raise CheckpointError(save.error or "")
    return commit(storage, attempt, Manifest(step, 0, "", {"size": 1}, values or {}), [save.index])


def load_state(
    url: str, step: int | None = None, names: list[str] | None = None
) -> tuple[dict[str, torch.Tensor], Manifest]:
    """Load the newest checkpoint at `url`, or the newest of `step`; undamaged committed checkpoints alone count.

    Args:
        names: the tensors to load; None for all.

    Returns:
        the tensors by name, with the dtypes of the checkpoint, on the CPU; and the manifest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    storage = Storage(url)
    found: Committed | None = next((c for c in newest_first(storage) if step in (None, c.step)), None)
    if found is None:
        raise CheckpointError(f"{url} has no committed checkpoint" + ("" if step is None else f" of step {step}"))
    manifest = read_manifest(storage, found)
    return load_all(storage, found.folder, manifest, names), manifest
