"""Taking over the state of another run. A trial of a sweep does this to continue from another trial's checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from elastic.checkpoint.format import Manifest
from elastic.checkpoint.loader import load
from elastic.checkpoint.reader import Committed, newest_first, read_manifest
from elastic.checkpoint.tensors import DTYPES, Shard
from elastic.errors import CheckpointError
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from elastic.tools.exporting import WEIGHTS
from elastic.tools.importing import Source, write_checkpoint
from elastic.tools.target import claimed

POLL_S = 0.05


def adopted(storage: Storage, step: int, source: str) -> bool:
    """Whether the run has taken over the state of `source` at this step, or has a checkpoint of a later step."""
    for checkpoint in newest_first(storage):
        if checkpoint.step > step:
            return True
        if checkpoint.step == step and checkpoint.attempt.endswith(_tag(source)):
            return True
    return False


def adopt(folder: RunFolder, source: RunFolder, step: int, *, timeout_s: float) -> None:
    """Make the checkpoint of `source` at `step` the newest one of the run in `folder`, which the caller must drive.

    The optimizer's tensors are taken over, but not its options such as weight decay: the run keeps its own. The ledger
    continues: it counts the samples of this run up to here, although the state comes from the source's steps over the
    same samples.

    Raises:
        CheckpointError: the source has no such checkpoint within `timeout_s` seconds, or the checkpoint is damaged or
            of another model.
    """
    if adopted(folder.storage, step, source.storage.url):
        return
    checkpoint = _await(source.storage, step, timeout_s)
    manifest = read_manifest(source.storage, checkpoint)
    _check_fits(folder.storage, manifest, source.storage.url)
    values = {**manifest.values, "groups": _without_options(manifest.values)}
    tensors = {name: (entry.dtype, tuple(entry.shape)) for name, entry in manifest.tensors.items()}

    def read(names: list[str]) -> Iterator[torch.Tensor]:
        found = [torch.empty(tensors[name][1], dtype=DTYPES[tensors[name][0]]) for name in names]
        load(source.storage, checkpoint.folder, manifest, [Shard.whole(n, t) for n, t in zip(names, found)])
        return iter(found)

    names = {name: name for name in sorted(tensors)}
    with claimed(folder, take_over=True) as held:
        attempt = f"{held.epoch}-0-{_tag(source.storage.url)}"
        whole = Manifest(
            step,
            manifest.seed,
            manifest.config_digest,
            {"size": 1, "generation": f"{held.epoch}-0"},
            values,
            metrics=manifest.metrics,
        )
        write_checkpoint(
            folder.storage, attempt, whole, Source(tensors, read, None), names, held, lambda total: _nothing
        )


def _check_fits(storage: Storage, theirs: Manifest, source: str) -> None:
    """Refuse a checkpoint with other weights than the run's. The run could not load it and would silently go on from
    its own last checkpoint."""
    own = next(newest_first(storage), None)
    if own is None:
        return
    mine = read_manifest(storage, own)
    shapes, wanted = ({n: e.shape for n, e in m.tensors.items() if n.startswith(WEIGHTS)} for m in (theirs, mine))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{source} has {name} of shape {shapes.get(name)}, but {storage.url} of {wanted.get(name)}: its state "
                "can only be taken over by a run of the same model"
            )


def _without_options(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups; those that `optimizer()` makes are without their options."""
    groups = values.get("groups", [])
    made = len(values.get("began", groups))
    return [{k: v for k, v in group.items() if k == "params"} for group in groups[:made]] + groups[made:]


def _nothing(done: int) -> None:
    return None


def _tag(source: str) -> str:
    """Return the part of an attempt's name that stands for `source`, of letters and digits only."""
    return "adopts" + "".join(c for c in source.rpartition("/")[2] if c.isalnum())[-30:]


def _await(storage: Storage, step: int, timeout_s: float) -> Committed:
    """Wait for the commit of the step's checkpoint, because a save may end after its step."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = next((c for c in newest_first(storage) if c.step == step), None)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise CheckpointError(f"waited {timeout_s:.0f} s for the checkpoint of step {step} of {storage.url}")
        time.sleep(POLL_S)
