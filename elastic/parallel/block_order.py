"""Checks that all workers of a row run the same blocks in the same order, since they gather parameters together.

If a model leaves out blocks depending on the microbatch or by chance, one block's parameters would be gathered into
another's, or workers would wait for ever. In the first step of a world every block is compared before it is gathered;
afterwards the order of a whole step is compared through its record. A model that runs different numbers of blocks only
in a later step hangs, and is found as any hang is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import nn

from elastic.compat.torch_groups import all_gather_flat
from elastic.errors import ConfigError
from elastic.parallel.mesh import Mesh
from elastic.parallel.wrapping import fsdp_modules

_END, _RETURNED = -1, -2  # markers: the model's forward() ended; loss() returned
_REFUSED = (
    "blocks of the model run for some microbatches and not for others, but sharded ones must run equally for all; use "
    "--parallel.strategy ddp, or name larger --parallel.blocks"
)

_LEFT_OUT = (
    "loss() returned without a call of the model for some microbatches, but workers call a sharded model together; "
    "call it for every batch, and where one is not to count return (outputs * 0).sum() with the weight 0, or use "
    "--parallel.strategy ddp"
)


class BlockOrder:
    """Watches the blocks of a model that `place_sharded` has sharded. `check` raises if a collective brought no
    result."""

    def __init__(self, model: nn.Module, mesh: Mesh, device: torch.device, check: Callable[[], None]):
        self._mesh, self._device, self._check = mesh, device, check
        self._ran: list[int] = []
        self._compares = False  # each block, before it runs
        self._calls: bool | None = None  # whether the first pass of this world ran any sharded module
        if mesh.layout.shards == 1:
            return
        for index, module in enumerate(fsdp_modules(model)):
            self._watch(module, index)  # type: ignore[arg-type]
        model.register_forward_hook(torch.compiler.disable(lambda *_: self._next(_END)))

    def _watch(self, module: nn.Module, index: int) -> None:
        before = torch.compiler.disable(lambda *_: self._next(index))
        module.register_forward_pre_hook(before, prepend=True)  # before FSDP2's, which gathers

    @contextmanager
    def comparing_blocks(self) -> Iterator[None]:
        """Inside, the workers of the row compare every block before it runs.

        Raises:
            ConfigError: they run different blocks.
        """
        self._compares = self._mesh.layout.shards > 1
        try:
            yield
        finally:
            self._compares = False

    def returned(self, before: int) -> None:
        """The loss of a pass returned; `before`: the value of `count` when the pass began.

        Raises:
            ConfigError: the workers of a row ran different blocks, or no module of the model ran here.
        """
        ran = len(self._ran) > before
        if self._compares:
            self._next(_RETURNED)
        if self._calls is None:
            self._calls = ran
        elif self._calls and not ran:  # the other workers wait for this worker's rows of parameters
            raise ConfigError(_LEFT_OUT)

    @property
    def count(self) -> int:
        """How many modules ran since the last call of `take_hash`."""
        return len(self._ran)

    def runs(self, before: int) -> Counter[int]:
        """How often each of `fsdp_modules` ran, by its index, since `count` was `before`; empty with a single shard."""
        return Counter(self._ran[before:])

    def _next(self, index: int) -> None:
        self._ran.append(index)
        if self._compares:
            mine = torch.tensor([index], dtype=torch.int64, device=self._device)
            everyone = mine.new_empty(self._mesh.layout.shards)
            all_gather_flat(everyone, mine, group=self._mesh.row_group)
            equal = everyone.unique().numel() == 1
            self._check()
            if not equal:
                raise ConfigError(_LEFT_OUT if _RETURNED in everyone else _REFUSED)

    def take_hash(self) -> float:
        """A hash of the order of blocks since the last call, as a number for the step's record."""
        found, self._ran = xxhash.xxh3_64_intdigest(repr(self._ran).encode()) >> 11, []  # a float64 has 53 bits
        return float(found)

    def check(self, orders: Any) -> None:
        """Compare the hashes of all workers of the mesh, given by place.

        Raises:
            ConfigError: those of a row differ.
        """
        shards = self._mesh.layout.shards
        for start in range(0, len(orders), shards):
            if len(set(orders[start : start + shards])) > 1:
                raise ConfigError(_REFUSED)
