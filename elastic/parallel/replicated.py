"""Data parallelism with a whole model on every worker: how a step's forward and backward passes are run and reduced.

`FastReplica` wraps the model in torch's DDP and runs several microbatches in one pass; `BitwiseReplica` runs one
microbatch a pass and reduces canonically. Both leave `.grad` holding the sum over the global batch divided by
`grad_divisor`, equal on every rank, and the record of the step.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from elastic.errors import ConfigError
from elastic.parallel.buffers import StepBuffers, check_alike, reduce_moves
from elastic.parallel.canonical import CanonicalSum, canonical_norm
from elastic.parallel.records import Metrics, PendingRecord, Records, StepRecord

#: Runs the user's loss on a model and a batch: (sum, weight, metrics).
LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, Any, Any]]


#: DDP is not to send buffers in forward passes, under the name that this torch has for it (renamed in 2.13).
_SYNC_NAME = "forward_sync_buffers"
_KNOWS_NAME = _SYNC_NAME in inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {_SYNC_NAME if _KNOWS_NAME else "broadcast_buffers": False}


@dataclass(frozen=True)
class Pass:
    """One forward/backward: its batch, its first microbatch, and the sample digest of each microbatch in it.

    A padding pass repeats the one before, since others of the row still run theirs; it counts for nothing.
    """

    batch: Any
    first: int
    digests: tuple[int, ...]
    last: bool
    padding: bool = False


class _Replica:
    """What both modes share."""

    model: nn.Module
    _loss: LossFunction
    _buffers: StepBuffers
    scale = 1.0  # factor on the loss of backward passes; the divisor that `run` returns contains it
    recomputes = False  # backward passes run forward code again, which is not to move buffers twice

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of all parameters that have one."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def has_finite_gradients(self, batch: Any) -> bool:
        """Whether the gradients of a batch by itself are finite."""
        self.model.zero_grad(set_to_none=True)
        self._loss(self.model, batch)[0].backward()
        return all(bool(torch.isfinite(g).all()) for g in self.gradients())

    def reshard(self) -> None:
        """Nothing is sharded."""

    def undo_buffers(self) -> None:
        """Put buffers back to what they were before the step's forward passes."""
        self._buffers.undo()

    def unmoved(self) -> AbstractContextManager[None]:
        """Buffers are afterwards what they were before: for forward passes that are no training."""
        return self._buffers.unmoved()


class FastReplica(_Replica):
    """Native DDP: gradients accumulate without synchronisation until the last pass of the step.

    Args:
        compression: "bf16" sends gradients as bfloat16.
    """

    def __init__(
        self, model: nn.Module, loss: LossFunction, *, runs: list[range], rank: int, device: torch.device,
        bucket_mb: int, find_unused: bool, compression: str,
    ):  # fmt: skip
        self.model, self._loss, self._runs, self._rank, self._device = model, loss, runs, rank, device
        self._world_size, self._metrics = len(runs), Metrics()
        self._buffers = StepBuffers(model, exact=False)
        self.wait_s = 0.0  # seconds of the last step spent in exchanges that nothing hides
        self.wrapped: nn.Module = model
        if self._world_size > 1:
            ddp = nn.parallel.DistributedDataParallel(
                model, device_ids=[device.index] if device.type == "cuda" else None, bucket_cap_mb=bucket_mb,
                gradient_as_bucket_view=True, **_NO_BUFFER_SYNC, find_unused_parameters=find_unused,
                init_sync=False,  # every member has the state already
            )  # fmt: skip
            if compression == "bf16":
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                # As a lambda, because DDP refuses it by name on gloo, which sums bfloat16 well.
                ddp.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
            self.wrapped = ddp

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this rank's passes.

        Returns:
            the step's record, and the divisor that turns `.grad` into the mean over the global batch.
        """
        self.wrapped.zero_grad(set_to_none=True)
        records = Records(self._runs, self._rank, self._device, metrics=self._metrics)
        self._buffers.begin()
        versions = self._buffers.versions()
        pending: PendingRecord | None = None
        for one in passes:
            sync = contextlib.nullcontext() if one.last or self._world_size == 1 else self.wrapped.no_sync()  # type: ignore[operator]
            with sync:
                loss, weight, metrics = self._loss(self.wrapped, one.batch)
                records.add(loss, weight, metrics, one.digests)
                if one.last:
                    pending = records.gather(None)
                with self._buffers.still() if self.recomputes else contextlib.nullcontext():
                    (loss * self.scale if self.scale != 1 else loss).backward()
        assert pending is not None, "a rank without a microbatch"
        changed = [self._buffers.named[n] for n in self._buffers.changed_since(versions)]
        floating = [b for b in changed if b.is_floating_point()]
        if floating and self._world_size > 1:
            average(floating, self._world_size)
        began = time.perf_counter()
        record = pending.result()
        self.wait_s = time.perf_counter() - began
        return record, record.weight * self.scale / self._world_size

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Global L2 norm of the gradients."""
        return nn.utils.get_total_norm(gradients)

    def close(self) -> None:
        """Drop the wrapper, whose reducer holds the process group."""
        self.wrapped = self.model


def average(buffers: list[torch.Tensor], world_size: int, group: dist.ProcessGroup | None = None) -> None:
    """Replace floating buffers by their mean over the group; none loses digits on the way."""
    for wide in (torch.float32, torch.float64):
        some = [b for b in buffers if (b.dtype == torch.float64) == (wide == torch.float64)]
        if not some:
            continue
        flat = torch.cat([b.reshape(-1).to(wide) for b in some])
        dist.all_reduce(flat, group=group)
        flat /= world_size
        with torch.no_grad():
            for b, mean in zip(some, flat.split([b.numel() for b in some])):
                b.copy_(mean.view(b.shape))


class BitwiseReplica(_Replica):
    """One pass a microbatch, canonical sums of gradients and of what forward passes did to buffers."""

    def __init__(
        self, model: nn.Module, loss: LossFunction, *, runs: list[range], rank: int, device: torch.device,
        bucket_mb: int,
    ):  # fmt: skip
        self.model = self.wrapped = model
        self._loss, self._runs, self._rank, self._device = loss, runs, rank, device
        self._bucket_bytes = bucket_mb << 20
        named = dict(model.named_parameters())
        self._names, self._all_parameters = list(named), list(named.values())
        self._parameters = [p for p in self._all_parameters if p.requires_grad]
        self._buffers = StepBuffers(model, exact=True)
        self._count, self._metrics = sum(map(len, runs)), Metrics()
        self.wait_s = 0.0

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this rank's passes (one microbatch each); see `FastReplica.run`."""
        for p in self._parameters:
            p.grad = None
        names = list(self._buffers.named)
        records = Records(self._runs, self._rank, self._device, (len(names) + 63) // 64, self._metrics)
        before = [p._version for p in self._all_parameters]
        gradients = CanonicalSum(self._runs, self._rank, None, self._bucket_bytes)
        self._buffers.begin()
        after: list[dict[str, torch.Tensor]] = []
        indices: list[int] = []
        pending: PendingRecord | None = None
        for one in passes:
            assert len(one.digests) == 1, "bitwise runs one microbatch a pass"
            versions = self._buffers.versions()
            loss, weight, metrics = self._loss(self.model, one.batch)
            changed = {n: self._buffers.named[n].detach().clone() for n in self._buffers.changed_since(versions)}
            records.add(loss, weight, metrics, one.digests, sum(1 << names.index(n) for n in changed))
            if one.last:
                records.tell(self._buffers.digest([*after, changed]))
                pending = records.gather(None)
            (loss * self.scale if self.scale != 1 else loss).backward()
            self._buffers.undo(changed)  # every microbatch starts from the buffers of the step's beginning
            after.append(changed)
            indices.append(one.first)
            gradients.push(one.first, self._take_gradients())
        assert pending is not None, "a rank without a microbatch"
        self._check_unwritten(before)
        began = time.perf_counter()
        record = pending.result()
        check_alike([digest for (digest,) in record.told])
        self._put_gradients(gradients.reduce())
        if record.changed_buffers:
            touched = [n for i, n in enumerate(names) if record.changed_buffers >> i & 1]
            sums = CanonicalSum(self._runs, self._rank, None, self._bucket_bytes)
            reduce_moves(self._buffers, touched, after, indices, sums, self._count)
        self.wait_s = time.perf_counter() - began
        return record, record.weight * self.scale

    def _check_unwritten(self, versions: list[int]) -> None:
        """Refuse parameters that forward passes write to: only buffers are summed over microbatches, and undone."""
        for name, p, version in zip(self._names, self._all_parameters, versions):
            if p._version != version:
                raise ConfigError(
                    f"parameter {name} is written to in forward passes, so its values depend on who runs which "
                    "microbatch; change it in after_step(), make it a buffer, or use --run.exactness fast"
                )

    def _take_gradients(self) -> list[torch.Tensor]:
        """The gradients of one microbatch, zeros where there is none, then one 0/1 for each parameter: has it any."""
        used = torch.tensor(
            [float(p.grad is not None) for p in self._parameters], dtype=torch.float32, device=self._device
        )
        leaf = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        return [*leaf, used]

    def _put_gradients(self, total: list[torch.Tensor]) -> None:
        *gradients, used = total
        for p, gradient, count in zip(self._parameters, gradients, used.tolist()):
            p.grad = gradient if count else None  # unused in the whole batch: the optimizer leaves it alone

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Global L2 norm of the gradients, independent of any cut."""
        return canonical_norm(gradients)

    def close(self) -> None:
        """Nothing is held."""
