"""Takes the gradients of one microbatch, a leaf of the canonical sum, out of a whole model's parameters: all after the
backward pass, or bucket by bucket while it makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.parallel.canonical import CanonicalSum, Tensors
from elastic.parallel.wrapping import local


class GradientTooLate(Exception):
    """A backward pass added to the gradient of a parameter when that had been taken."""

    def __init__(self, name: str):
        super().__init__(f"the gradient of {name} comes in several parts in one backward pass")


class Leaf:
    """The gradients of these parameters in one microbatch after another: zeros where there is none, and a mask that
    says where there is one (float32, 0 or 1 for each parameter).

    Args:
        parameters: by name.
        buckets: of the parameters and the mask.
        device: of the mask.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], buckets: Sequence[slice], device: torch.device):
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._buckets, self._device = buckets, device
        self._bucket_of = [b for b, bucket in enumerate(buckets) for _ in range(bucket.start, bucket.stop)]
        self._used = [True] * len(parameters)
        self._masks: dict[tuple[bool, ...], torch.Tensor] = {}  # made once: copying to a device waits for it
        self._taken = 0  # buckets of the present leaf
        self._lacking: list[set[int]] = []  # for each bucket, the parameters whose gradient is not there yet

    def take(self) -> Tensors:
        """All of it, after a backward pass."""
        return [*self.gradients(), self._mask()]

    def gradients(self) -> Tensors:
        """All of it without the mask, after a backward pass."""
        return list(map(self._gradient, range(len(self._parameters))))

    @property
    def used(self) -> Sequence[bool]:
        """The mask of what was taken last."""
        return self._used

    @contextmanager
    def taking(self, total: CanonicalSum, microbatch: int) -> Iterator[None]:
        """Around the backward pass of a rank's last microbatch: each bucket is given to the sum when the gradients of
        it and of all buckets before it are there. The last one is left: it has the mask.

        Raises:
            GradientTooLate: a gradient came in several parts, as with a layer that is used twice and checkpointed with
                `use_reentrant=True`. The sum must not be used. As the last bucket lacks, no other rank can.
        """
        self._taken = 0
        self._lacking = [set(range(b.start, b.stop)) for b in self._buckets]
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, total, microbatch, i))
            for i, p in enumerate(self._parameters[: self._buckets[-1].start])
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        taken = self._parameters[: self._buckets[self._taken].start]
        late = next((i for i, p in enumerate(taken) if p.grad is not None), None)
        if late is not None:
            raise GradientTooLate(self._names[late])

    def _arrived(self, total: CanonicalSum, microbatch: int, index: int, _: torch.Tensor) -> None:
        self._lacking[self._bucket_of[index]].discard(index)
        while self._taken < len(self._buckets) - 1 and not self._lacking[self._taken]:
            self._give(total, microbatch)

    def take_rest(self, total: CanonicalSum, microbatch: int) -> None:
        """After the backward pass of a rank's last microbatch: give the other buckets to the sum."""
        while self._taken < len(self._buckets):
            self._give(total, microbatch)
        self._taken = 0

    def _give(self, total: CanonicalSum, microbatch: int) -> None:
        bucket = self._buckets[self._taken]
        self._taken += 1
        count = len(self._parameters)
        part = [self._gradient(i) for i in range(bucket.start, min(bucket.stop, count))]
        total.push_last(microbatch, [*part, self._mask()] if bucket.stop > count else part)

    def _gradient(self, index: int) -> torch.Tensor:
        p = self._parameters[index]
        gradient, p.grad = p.grad, None
        self._used[index] = gradient is not None
        if gradient is None:
            return torch.zeros_like(local(p))
        if isinstance(gradient, DTensor) and isinstance(p, DTensor):  # of a cell, whose workers may have terms of it
            gradient = gradient.redistribute(placements=p.placements)
        return local(gradient)

    def _mask(self) -> torch.Tensor:
        used = tuple(self._used)
        if used not in self._masks:
            self._masks[used] = torch.tensor(used, dtype=torch.float32, device=self._device)
        return self._masks[used].clone()  # sums may be made in it
