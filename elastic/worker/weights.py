"""The weights of a model alone: their hash, and whether a checkpoint has nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from elastic.checkpoint.tensors import tensor_bytes
from elastic.worker.naming import persistent_entries


def weights_alone(values: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with these values has weights and nothing else, as `elastic checkpoints import` makes it."""
    return "weights_only" in values


def weights_sha256(model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor] | None = None) -> str:
    """sha256 over name, dtype, shape and little-endian bytes of the persistent entries, in name order.

    Args:
        whole: makes a sharded tensor whole, together with all workers that hold a part of it.
    """
    digest = hashlib.sha256()
    for name, value in persistent_entries(model).items():
        head = f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{list(value.shape)}\0"
        digest.update(head.encode())
        digest.update(tensor_bytes(whole(value) if whole else value))
    return digest.hexdigest()
