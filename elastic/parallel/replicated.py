"""Data parallelism with a whole model on every worker: how a step's forward and backward passes are run and reduced.

`FastReplica` wraps the model in torch's DDP and runs several microbatches in one pass; `BitwiseReplica` runs one
microbatch per pass and reduces canonically. Both leave in `.grad` the sum over the global batch, times a divisor that
`run` returns, equal on every rank, and return the record of the step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic.compat.torch import norm_of_each, values_of_sparse, version_of
from elastic.compat.torch_groups import NO_BUFFER_SYNC, check_reduced
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.canonical import CanonicalSum, Link, buckets_of, canonical_norm
from elastic.parallel.carrier import Carrier
from elastic.parallel.leaf import Leaf
from elastic.parallel.moves import average_moves, fingerprint, reduce_moves
from elastic.parallel.records import Metrics, PendingRecord, Records, StepRecord
from elastic.parallel.writes import Writes

_BUCKETS = 4  # of the gradients, at least, so that some travel while others are made,
_LEAST_BUCKET = 1 << 20  # bytes, but none smaller than this: each costs a round trip or two

#: Runs the user's loss on a model and a batch; returns (sum, weight, metrics).
LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, Any, Any]]


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: its batch, its first microbatch, and the sample digest of each of its
    microbatches.

    A padding pass repeats the pass before, since other workers of the row still run theirs; it does not count.
    """

    batch: Any
    first: int
    digests: tuple[int, ...]
    last: bool
    padding: bool = False


class NotReduced(Exception):
    """DDP summed no gradients in a step, because the parameters `names` got none in the last pass."""

    def __init__(self, names: list[str]):
        super().__init__(f"no gradient for {', '.join(names[:3]) or 'some parameters'} in the last pass of a step")
        self.names = names


class _Replica:
    """Code of both modes."""

    model: nn.Module
    _loss: LossFunction
    _buffers: StepBuffers
    scale = 1.0  # factor on the loss in backward passes; the divisor that `run` returns contains it
    recomputes = False  # whether backward passes compute forward passes again
    #: Called before the last backward pass of a whole model; the record has the largest of each number.
    says: Callable[[], Sequence[int]]

    def _recomputing(self, changed: Iterable[str]) -> AbstractContextManager[object]:
        return self._buffers.begun(changed) if self.recomputes else contextlib.nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of all parameters that have one."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def has_finite_gradients(self, batch: Any) -> bool:
        """Whether the gradients of this batch alone are finite."""
        self.model.zero_grad(set_to_none=True)
        self._loss(self.model, batch)[0].backward()
        return all(bool(torch.isfinite(dense(g)).all()) for g in self.gradients())

    def reshard(self) -> None:
        """Does nothing: no parameter is sharded."""

    @property
    def unsaved(self) -> set[str]:
        """Buffers that passes change although they are registered with persistent=False."""
        return self._buffers.unsaved

    def undo_buffers(self) -> None:
        """Restore buffers to their values before the step's forward passes."""
        self._buffers.undo()

    def unmoved(self) -> AbstractContextManager[None]:
        """Restores buffers afterwards, for forward passes that do not train."""
        return self._buffers.unmoved()


class _LossOf(nn.Module):
    """A model with the job's loss as its forward pass, which DDP wraps.

    So the loss gets the bare model with its attributes, methods and class, as with one worker, and DDP sees everything
    that the loss calls.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, carrier: Carrier):
        super().__init__()
        self.model, self._loss, self.carrier = model, loss, carrier
        self.batch: Any = None
        self.rest: tuple[Any, Any] = (None, None)

    def forward(self, *, last: bool) -> torch.Tensor:
        """`last`: gradients are summed over all ranks in the backward pass."""
        loss, *self.rest = self._loss(self.model, self.batch)  # type: ignore[assignment]
        found: torch.Tensor = self.carrier(loss) if last else loss
        return found


class FastReplica(_Replica):
    """Native DDP: gradients accumulate without synchronisation until the last pass of the step.

    Args:
        find_unused: parameters may get no gradient in a step; costs a walk through the graph of its last pass.
        compression: "bf16" sends gradients as bfloat16.
        written: parameters that passes may write to, as it comes to the same however often they do.
        check: raises if a collective brought no result.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        runs: list[range],
        rank: int,
        device: torch.device,
        bucket_mb: int,
        find_unused: bool,
        compression: str,
        written: Collection[str] = (),
        check: Callable[[], None],
    ):
        self.model, self._loss, self._runs, self._rank, self._device = model, loss, runs, rank, device
        self._world_size, self._count, self.metrics = len(runs), sum(map(len, runs)), Metrics()
        self._buffers, self._check = StepBuffers(model, exact=False), check
        self._writes = Writes(model, allowed=written)
        self.says = tuple
        self._norm: torch.Tensor | None = None
        self.wait_s = 0.0  # seconds of the last step in exchanges that no computation hides
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        self._carrier: Carrier | None = None
        self._find_unused = find_unused
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if self._world_size > 1 and self._trained:
            height, words = max(map(len, runs)), self._buffers.words
            self._carrier = Carrier(self._world_size, rank, height, words, device, rounds=compression != "off")
            self._ddp = nn.parallel.DistributedDataParallel(
                _LossOf(model, loss, self._carrier),
                bucket_cap_mb=bucket_mb,
                gradient_as_bucket_view=True,
                **NO_BUFFER_SYNC,
                find_unused_parameters=find_unused,
                init_sync=False,  # every member has the state already
            )
            if compression == "bf16":
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                # A lambda, because DDP refuses the hook by name on gloo, which does sum bfloat16 correctly.
                self._ddp.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this rank's passes.

        Returns:
            the step's record, and the divisor that turns `.grad` into the mean over the global batch.

        Raises:
            NotReduced: a parameter got no gradient in the last pass here; other workers may still wait for it.
        """
        buffers = self._buffers
        self.model.zero_grad(set_to_none=True)
        records = Records(self._runs, self._rank, self._device, buffers.words, self.metrics, self._check)
        buffers.begin()
        self._writes.begin()
        after: list[dict[str, torch.Tensor]] = []
        counts: list[int] = []
        pending: PendingRecord | None = None
        before: list[tuple[int, int]] = []
        for one in passes:
            sync = contextlib.nullcontext() if one.last or self._ddp is None else self._ddp.no_sync()
            versions = buffers.versions()
            with sync:
                loss, weight, metrics = self._forward(one.batch, last=one.last)
                changed = buffers.copies_since(versions)
                after.append(changed)
                counts.append(len(one.digests))
                records.add(loss, weight, metrics, one.digests, buffers.mask(changed))
                if one.last:
                    records.attach(fingerprint(buffers, after))
                    records.say(self.says())
                    pending = records.gather(None, self._carrier)
                    before = self._written() if self._ddp is not None and not self._find_unused else []
                with self._recomputing(changed):
                    (loss * self.scale if self.scale != 1 else loss).backward()
            buffers.passed(versions, changed)
        assert pending is not None, "a rank without a microbatch"
        self._check_reduced(before)
        self._writes.check()
        began = time.perf_counter()
        self._norm = norm_of_all(self.gradients())  # enqueued before the host waits for the record, and so for both
        record = pending.result()
        buffers.end(touched := buffers.masked(record.changed_buffers))
        if touched:
            average_moves(buffers, touched, after, counts, self._count, [last for *_, last in record.attached])
        self.wait_s = time.perf_counter() - began
        return record, record.weight * self.scale / self._world_size

    def _forward(self, batch: Any, *, last: bool) -> tuple[torch.Tensor, Any, Any]:
        if self._ddp is None:
            return self._loss(self.model, batch)
        inner: Any = self._ddp.module
        inner.batch = batch
        loss = self._ddp(last=last)
        weight, metrics = inner.rest
        inner.batch, inner.rest = None, (None, None)
        return loss, weight, metrics

    def _written(self) -> list[tuple[int, int]]:
        """Identity and version counter of each gradient."""
        grads = [p.grad for p in self._trained]
        return [(0, 0) if g is None else (id(g), version_of(g)) for g in grads]

    def _check_reduced(self, before: list[tuple[int, int]]) -> None:
        if self._ddp is None:
            return
        try:
            check_reduced(self._ddp)
        except RuntimeError as error:
            raise self._not_reduced() from error
        if not self._find_unused and self._written() == before:  # the loss reached no parameter, which DDP cannot know
            raise self._not_reduced()

    def _not_reduced(self) -> NotReduced:
        named = self.model.named_parameters()
        return NotReduced([name for name, p in named if p.requires_grad and p.grad is None])

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._trained if p.grad is not None]

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The global L2 norm of the gradients that the step has left."""
        found, self._norm = self._norm, None
        return norm_of_all(gradients) if found is None else found

    def close(self) -> None:
        """Drop the wrapper, whose reducer holds the process group."""
        self._ddp = None


def norm_of_all(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of whole gradients together, a scalar."""
    each = norm_of_each([dense(g) for g in gradients])
    return torch.linalg.vector_norm(torch.stack(each)) if each else torch.tensor(0.0)


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """The values of a gradient; those of a sparse one with each row once."""
    return values_of_sparse(gradient) if gradient.is_sparse else gradient


class BitwiseReplica(_Replica):
    """One pass per microbatch; canonical sums of gradients and of what forward passes did to buffers.

    In the last backward pass of a step the exchange of a bucket begins as soon as all gradients of it and of the
    buckets before are there. Buckets are in the reverse order of parameters, as the gradients mostly come; the last one
    has the mask of the parameters that were used, and is exchanged after the pass.

    Args:
        links: how gradients are exchanged.
        early: exchanges begin in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        runs: list[range],
        rank: int,
        links: Sequence[Link],
        device: torch.device,
        bucket_mb: int,
        early: bool,
        check: Callable[[], None],
    ):
        self.model = model
        self._loss, self._runs, self._rank, self._device = loss, runs, rank, device
        self._links, self._bucket_bytes = links, bucket_mb << 20
        named = dict(model.named_parameters())
        self._writes = Writes(model, exact=True)
        trained = {name: p for name, p in reversed(named.items()) if p.requires_grad}
        self._parameters = list(trained.values())
        like = [*self._parameters, torch.empty(len(self._parameters))]  # the mask
        largest = max(sum(t.nbytes for t in like) // _BUCKETS, _LEAST_BUCKET)
        self._gradient_buckets = buckets_of(like, min(largest, self._bucket_bytes))
        self._leaf = Leaf(trained, self._gradient_buckets, device)
        self._early = early and len(runs) > 1
        self._buffers, self._check = StepBuffers(model, exact=True), check
        self._count, self.metrics = sum(map(len, runs)), Metrics()
        self.says = tuple
        self.wait_s = 0.0

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this rank's passes (one microbatch each); see `FastReplica.run`.

        Raises:
            GradientTooLate: exchanges may not begin in backward passes of this model.
        """
        self.model.zero_grad(set_to_none=True)  # also gradients of parameters that were frozen after the last step
        buffers = self._buffers
        records = Records(self._runs, self._rank, self._device, buffers.words, self.metrics, self._check)
        self._writes.begin()
        gradients = CanonicalSum(self._links, self._runs, self._gradient_buckets)
        buffers.begin()
        after: list[dict[str, torch.Tensor]] = []
        indices: list[int] = []
        pending: PendingRecord | None = None
        for one in passes:
            assert len(one.digests) == 1, "bitwise runs one microbatch a pass"
            versions = buffers.versions()
            loss, weight, metrics = self._loss(self.model, one.batch)
            changed = buffers.copies_since(versions)
            after.append(changed)
            records.add(loss, weight, metrics, one.digests, buffers.mask(changed))
            if one.last:
                records.attach(fingerprint(buffers, after))
                records.say(self.says())
                pending = records.gather(None)
            early = self._leaf.taking(gradients, one.first) if one.last and self._early else contextlib.nullcontext()
            with self._recomputing(changed), early:
                (loss * self.scale if self.scale != 1 else loss).backward()
            buffers.passed(versions, changed)
            indices.append(one.first)
            if not one.last:
                gradients.push(one.first, self._leaf.take())
        assert pending is not None, "a rank without a microbatch"
        self._writes.check()
        began = time.perf_counter()
        self._leaf.take_rest(gradients, indices[-1])
        record = pending.result()
        self._put_gradients(gradients.reduce())
        buffers.end(touched := buffers.masked(record.changed_buffers))
        if touched:
            sums = CanonicalSum(self._links, self._runs, self._bucket_bytes)
            reduce_moves(buffers, touched, after, indices, sums, self._count, [last for *_, last in record.attached])
        self.wait_s = time.perf_counter() - began
        return record, record.weight * self.scale

    def _put_gradients(self, total: list[torch.Tensor]) -> None:
        *gradients, used = total
        for p, gradient, count in zip(self._parameters, gradients, used.tolist()):
            p.grad = gradient if count else None  # no microbatch used it, so the optimizer must leave it alone

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The global L2 norm of the gradients; it does not depend on sharding."""
        return canonical_norm(gradients)

    def close(self) -> None:
        """Does nothing: it holds no resources."""
