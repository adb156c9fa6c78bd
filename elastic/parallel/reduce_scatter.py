"""What stands in for FSDP2's reduce-scatter: one that hands on the leaves of a round, one that only looks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from elastic.parallel.canonical import CanonicalSum
from elastic.parallel.tree import TreeSum


class Leaves:
    """A reduce-scatter for one group of parameters that sums nothing: it hands on the leaves of a round.

    FSDP2 calls it with what `allocate` gave: first the input, then the output, whose views become `.grad`. With a
    single shard FSDP2 does not call it, and the output holds the leaf. A group that runs several times in one pass is
    reduced as often; those add up to one leaf.
    """

    def __init__(self, shards: int):
        self._shards = shards
        self._allocations = 0
        self._outputs: list[torch.Tensor] = []
        self._received: torch.Tensor | None = None
        self._pushed = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = torch.empty(*size, dtype=dtype, device=device)
        self._allocations += 1
        if self._allocations % 2 == 0:
            self._outputs.append(made)
        return made

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        leaves = torch.empty_like(input_tensor)
        dist.all_to_all_single(leaves, input_tensor, group=group)
        self._received = leaves if self._received is None else self._received.add_(leaves)

    def push(self, total: CanonicalSum, first: int, count: int, *, keep: bool) -> None:
        """After a pass: its `count` leaves, of microbatches from `first` on, go into the sum. The rest is padding.

        Args:
            keep: the output of this pass is where `put` will write the sum.
        """
        if not self._outputs:
            return
        received = self._outputs[0] if self._received is None else self._received
        if received.is_cuda:  # it was made on FSDP2's own stream
            received.record_stream(torch.cuda.current_stream(received.device))
        leaves = received.view(self._shards, -1)
        round_: TreeSum[torch.Tensor] = TreeSum(lambda a, b: a.add_(b))
        for i in range(count):
            round_.push((first + i, 1), leaves[i])
        for (start, size), value in round_.parts():
            total.push(start, [value.clone()], size)
        self._pushed += 1
        self._kept = self._outputs[0] if keep else None
        self._outputs, self._received = [], None

    def put(self, total: CanonicalSum, passes: int) -> None:
        """After the last pass: write the sum to where `.grad` looks.

        Raises:
            RuntimeError: the group ran in some passes only.
        """
        pushed, self._pushed = self._pushed, 0
        if pushed not in (0, passes):
            raise RuntimeError(
                f"a block of the model ran in {pushed} of {passes} passes of a step, but sharded blocks must run in "
                "all; use --parallel.strategy ddp, or name larger --parallel.blocks"
            )
        if pushed:
            assert self._kept is not None
            self._kept.copy_(total.reduce()[0])
            self._kept = None

    _kept: torch.Tensor | None = None


class Look:
    """A reduce-scatter that sends nothing and keeps what it was to send."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.seen.append(torch.zeros(*size, dtype=dtype, device=device))
        return self.seen[-1]

    def __call__(self, output_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        output_tensor.zero_()
