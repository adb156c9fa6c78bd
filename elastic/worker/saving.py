"""Saving and restoring a worker's training state through checkpoints and through peers."""

from __future__ import annotations

import time
from typing import Any

import torch

from elastic import fault
from elastic.checkpoint.reader import newest_first, read_manifest, read_tensor
from elastic.checkpoint.writer import share, write_pack
from elastic.errors import CheckpointError
from elastic.membership.client import WorkerLink
from elastic.membership.state import Generation
from elastic.storage import Storage
from elastic.worker.group import Group, collective
from elastic.worker.state import TrainState


def save(
    state: TrainState, step: int, link: WorkerLink, storage: Storage, *, generation: Generation, rank: int, size: int,
    seed: int, config_digest: str,
) -> dict[str, Any]:  # fmt: skip
    """Write this rank's share of the state; the keeper commits when all shares are reported to it.

    Returns:
        the report, to be posted after everything that the checkpoint must not come before.

    Raises:
        OSError: the share could not be written.
    """
    fault.point("checkpoint.before_pack", rank, step)
    attempt = f"{generation}-{size:x}x{step:x}"
    tensors = state.tensors()
    mine = _whole(state, share(tensors, size)[rank])
    index = write_pack(storage, step, attempt, rank, mine)
    fault.point("checkpoint.after_pack", rank, step)
    message = {"kind": "pack", "step": step, "attempt": attempt, "index": index, "shares": size}
    if rank == 0:
        message["header"] = {"seed": seed, "config_digest": config_digest, "values": state.values()}
    return message


def _whole(state: TrainState, names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of these names, whole. Of a cut state everyone calls this at one time."""
    found = dict.fromkeys(names, torch.empty(0))
    with collective("gathering the state to save"):
        for name, tensor in state.tensors().items():
            value = state.whole(tensor)
            if name in found:
                found[name] = value
    return found


def restore_newest(state: TrainState, storage: Storage, link: WorkerLink) -> int:
    """Load the newest committed checkpoint that verifies; a damaged one is reported, and the one before is used.

    Returns:
        its step, or 0 where there is none: a fresh start.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded.
    """
    problem: CheckpointError | None = None
    for checkpoint in newest_first(storage):
        began = time.monotonic()
        try:
            manifest = read_manifest(storage, checkpoint)
            tensors: dict[str, torch.Tensor] = {
                name: read_tensor(storage, checkpoint, name, entry) for name, entry in manifest.tensors.items()
            }
        except CheckpointError as error:
            problem = error
            link.post({"kind": "event", "event": "checkpoint_failed", "step": checkpoint.step, "detail": str(error)})
            continue
        state.load(tensors, manifest.values)
        link.post(
            {
                "kind": "event", "event": "restored", "step": manifest.step,
                "seconds": round(time.monotonic() - began, 4),
                "detail": {"rung": "checkpoint", "attempt": checkpoint.attempt},
            }
        )  # fmt: skip
        return manifest.step
    if problem is not None:
        raise CheckpointError(f"no committed checkpoint can be loaded; the newest problem: {problem}") from problem
    return 0


def restore_from_peer(state: TrainState, group: Group, source: int, step: int, link: WorkerLink, wanted: bool) -> int:
    """Give (as `source`) or take the whole training state.

    Returns:
        the step of the state that every member now has.
    """
    began = time.monotonic()
    giving = group.rank == source
    values = group.send_json({"step": step, "values": state.values()} if giving else None, source)
    tensors = group.send_tensors(state.tensors() if giving else None, source)
    if wanted:
        state.load(tensors, values["values"])
        link.post(
            {
                "kind": "event", "event": "restored", "step": values["step"],
                "seconds": round(time.monotonic() - began, 4), "detail": {"rung": "peer", "source": source},
            }
        )  # fmt: skip
    return int(values["step"])
