"""Replacements of FSDP2's reduce-scatter: one passes on the leaves of a round, one only keeps gradients to look at."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from elastic.parallel.canonical import CanonicalSum, use_on_current_stream
from elastic.parallel.tree import TreeSum


class Leaves:
    """A reduce-scatter for one group of parameters that sums nothing over workers: it passes on the leaves of a round.

    FSDP2 calls it with tensors from `allocate`: first the input, then the output, whose views become `.grad`. With a
    single shard FSDP2 does not call it, and the output holds the leaf. A group that runs several times in one pass is
    reduced as often, and these add up to one leaf, so its leaves are summed after the pass. Leaves of a group that runs
    once are summed as they arrive: the leaves of a whole model would take as much memory as all its gradients.
    """

    def __init__(self, shards: int):
        self._shards = shards
        self._allocations = 0
        self._outputs: list[torch.Tensor] = []
        self._received: torch.Tensor | None = None  # leaves of this pass
        self._round: TreeSum[torch.Tensor] | None = None  # or their sums
        self._first, self._count, self._runs_once = 0, 0, False
        self._pushed = 0
        self._kept: torch.Tensor | None = None

    def begin(self, first: int, count: int, *, runs_once: bool) -> None:
        """Called before a backward pass that makes the leaves of `count` microbatches from `first` on; others are
        padding.

        Args:
            runs_once: the group ran at most once in the forward pass.
        """
        self._first, self._count, self._runs_once = first, count, runs_once
        self._allocations, self._outputs, self._received, self._round = 0, [], None, None  # of an interrupted pass

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
        """
        Raises:
            RuntimeError: the group runs several times in the backward pass, but ran once in the forward pass.
        """
        if self._round is not None:
            raise RuntimeError(
                "a block of the model ran once in a forward pass and several times in its backward pass; "
                "use --parallel.strategy ddp"
            )
        leaves = torch.empty_like(input_tensor)
        dist.all_to_all_single(leaves, input_tensor, group=group)
        if self._runs_once:
            self._round = self._summed(leaves)
        else:
            self._received = leaves if self._received is None else self._received.add_(leaves)

    def push(self, total: CanonicalSum, *, keep: bool) -> None:
        """Called after a backward pass: add the sums of its leaves to the sum of the step.

        Args:
            keep: `put` will write the sum into the output of this pass.
        """
        if not self._outputs:
            return
        if self._round is None:
            received = self._outputs[0] if self._received is None else self._received
            use_on_current_stream(received)
            self._round = self._summed(received)
        for (start, size), value in self._round.parts():
            use_on_current_stream(value)
            total.push(start, [value], size)
        self._pushed += 1
        self._kept = self._outputs[0] if keep else None
        self._outputs, self._received, self._round = [], None, None

    def put(self, total: CanonicalSum, passes: int) -> None:
        """Called after the last pass: write the sum to where `.grad` is a view.

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

    def _summed(self, received: torch.Tensor) -> TreeSum[torch.Tensor]:
        """The sums of the leaves in `received`, as copies: its memory may be reused."""
        leaves, found = received.view(self._shards, -1), TreeSum[torch.Tensor](lambda a, b: a.add_(b))
        for i in range(self._count):
            found.push((self._first + i, 1), leaves[i])
        return found.map(torch.clone)


class Unsent:
    """A reduce-scatter that sends nothing, and keeps nothing."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        output_tensor.zero_()


class Look(Unsent):
    """A reduce-scatter that sends nothing, and keeps its inputs."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.seen.append(super().allocate(size, dtype=dtype, device=device))
        return self.seen[-1]
