"""Checks that the contents of a checkpoint can be read back: planned, encoded and decoded once, before training."""

from __future__ import annotations

import json

import torch
from torch.distributed.tensor import DTensor

from elastic.checkpoint.plan import plan_save
from elastic.compat.torch import is_traceable_wrapper_subclass
from elastic.errors import CheckpointError, ConfigError
from elastic.values import same
from elastic.worker.state import TrainState

MAX_VALUES_BYTES = 16 << 20  # values are part of each manifest, and are sent to each worker that joins
_LIVE = ("model/", "optimizer/", "extra/")  # only sharded tensors of these have a place in a new mesh


def check_comes_back(state: TrainState) -> None:
    """Refuse parts of the state that would not be read back equal and with their type. Takes milliseconds: tensors are
    planned, and none of their bytes are read.

    Raises:
        ConfigError: with the part, and what to do.
    """
    tensors, values = state.collect()
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, state)
    try:
        plan_save([shard.held for shard in state.shards(0, 1)])
    except CheckpointError as error:
        raise ConfigError(f"the training state cannot be saved: {error}") from error
    text = json.dumps(values, allow_nan=False)
    if len(text) > MAX_VALUES_BYTES:
        raise ConfigError(
            f"the values of the training state take {len(text)} bytes, and at most {MAX_VALUES_BYTES} are "
            "kept; keep large lists as tensors"
        )
    again = state.read_and_written(json.loads(text))
    for part, coded in again.items():
        if not same(coded, values[part]):
            raise ConfigError(f"the training state cannot be saved: its {part} would not come back equal")


def _check_tensor(name: str, tensor: torch.Tensor, state: TrainState) -> None:
    if isinstance(tensor, DTensor):
        if not name.startswith(_LIVE) or (name.startswith("extra/") and name not in state.began_with):
            raise ConfigError(
                f"{name} lies over the workers, and was not there when optimizer() returned, so it has no place in "
                "another world; begin it in optimizer(), from the model's parameters"
            )
        return
    what = ""
    if tensor.is_meta:
        what = "has no values (it is on the meta device); give it some"
    elif tensor.layout is not torch.strided:
        what = f"is {tensor.layout}, and only dense tensors are saved; keep it dense, or its parts"
    elif is_traceable_wrapper_subclass(tensor):
        what = f"is a {type(tensor).__name__}, whose parts are not saved; keep plain tensors"
    if what:
        raise ConfigError(f"the training state cannot be saved: {name} {what}")
