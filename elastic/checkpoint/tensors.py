"""Tensors as the checkpoint engine takes them: named boxes with their place in the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from elastic.checkpoint.fields import ITEM_BYTES
from elastic.checkpoint.plan import Held, Wanted
from elastic.errors import CheckpointError
from elastic.placement import Box, Pieces

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A box of a named tensor that this rank holds (to save) or wants (to load into).

    Args:
        name: of the tensor, the same on all ranks.
        tensor: the local box, live: any device, any strides. A load writes into it.
        shape: of the whole tensor.
        offsets: of the box in it.
        replica, replicas: this rank holds the box as one of `replicas`; those that share a box also hold the same list
            of boxes with that many replicas. The bytes are written once, spread over them.
        stable: nothing writes to it before `Saver.settle`, so it can be copied behind the next forward and backward
            pass: parameters and the optimizer's state are, buffers that a forward pass moves are not.
        frozen: it hardly ever changes; where its bytes are those of the newest committed checkpoint, they are not
            written again.
        cut: how the box is cut out of the whole, of one that is saved.
    """

    name: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    replica: int = 0
    replicas: int = 1
    stable: bool = False
    frozen: bool = False
    cut: Pieces = ()

    @staticmethod
    def whole(
        name: str,
        tensor: torch.Tensor,
        *,
        replica: int = 0,
        replicas: int = 1,
        stable: bool = False,
        frozen: bool = False,
    ) -> Shard:
        """A tensor that this rank holds whole."""
        shape = tuple(tensor.shape)
        return Shard(name, tensor, shape, (0,) * len(shape), replica, replicas, stable, frozen)

    @property
    def box(self) -> Box:
        return Box(self.offsets, tuple(self.tensor.shape))

    @property
    def held(self) -> Held:
        return Held(
            self.name, dtype_name(self.name, self.tensor), self.shape, self.box, self.replica, self.replicas, self.cut
        )

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.name, self.box)


def dtype_name(name: str, tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype.

    Raises:
        CheckpointError: a dtype that checkpoints do not have.
    """
    found = NAMES.get(tensor.dtype)
    if found is None:
        raise CheckpointError(f"tensor {name!r} has the dtype {tensor.dtype}; use one of {', '.join(sorted(DTYPES))}")
    return found


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's little-endian bytes, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def from_bytes(data: torch.Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    """A view of bytes (uint8, contiguous, any alignment) as a tensor; a copy where torch needs it aligned."""
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(sizes) if math.prod(sizes) else torch.empty(sizes, dtype=dtype)
