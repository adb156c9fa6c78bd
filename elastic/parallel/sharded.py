"""Data parallelism with a model that is sharded over the cells of a row: how a step's passes are run and reduced.

The counterparts of `FastReplica` and `BitwiseReplica`. All cells of a row run the same number of passes, since each
pass gathers parameters from all of them; passes beyond a cell's own microbatches are padding and do not count. The
workers of a cell run the same passes.

`FastSharded` uses FSDP2's own reduce-scatter. `BitwiseSharded` replaces it by one that passes on the leaves of a round
instead of summing them, and sums them in the canonical tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from elastic.compat.torch import norm_of_each
from elastic.compat.torch_groups import all_gather_flat
from elastic.parallel.block_order import BlockOrder
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.canonical import CanonicalSum, Link, row_sums, sums_per_row
from elastic.parallel.layout import TENSOR
from elastic.parallel.levels import one_level
from elastic.parallel.mesh import Mesh
from elastic.parallel.moves import average_moves, fingerprint, reduce_moves
from elastic.parallel.records import Metrics, Records, StepRecord
from elastic.parallel.reduce_scatter import Leaves, Look
from elastic.parallel.replicated import LossFunction, Pass
from elastic.parallel.used import Used
from elastic.parallel.wrapping import cut_of, fsdp_modules, let_go, local, reshard
from elastic.parallel.writes import Writes


class _Sharded:
    """Code of both modes.

    Args:
        model: as `place_sharded` left it.
        runs: the microbatches of each cell of the mesh.
        check: raises if a collective brought no result.
    """

    _exact = False

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        runs: list[range],
        mesh: Mesh,
        device: torch.device,
        check: Callable[[], None],
    ):
        self.model, self._loss, self._runs, self._mesh, self._device = model, loss, runs, mesh, device
        self._cell = mesh.cell
        self._root: FSDPModule = fsdp_modules(model)[0]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(trained.values())
        #: Of each parameter, whether each worker of a cell has a part of its own, or all have the same.
        self._cuts = [cut_of(name, p) for name, p in trained.items()]
        self._in_parts = [TENSOR in dict(cut) for cut in self._cuts]
        self._buffers, self._check = StepBuffers(model, exact=self._exact), check
        self._used, self._writes = Used(model), Writes(model, exact=self._exact)
        self._block_order, self._steps, self.metrics = BlockOrder(model, mesh, device, check), 0, Metrics()
        self.wait_s = 0.0
        self.scale = 1.0
        self.recomputes = False  # whether backward passes compute forward passes again

    def _begin(self) -> Records:
        self.model.zero_grad(set_to_none=True)  # also gradients of parameters that were frozen after the last step
        self._used.seen.clear()
        self._block_order.take_hash()
        self._buffers.begin()
        self._writes.begin()
        bits = 64 * self._buffers.words + len(self._parameters)
        return Records(self._runs, self._cell, self._device, (bits + 63) // 64, self.metrics, self._check)

    def _forward(self, batch: Any) -> tuple[torch.Tensor, Any, Any]:
        before = self._block_order.count
        with nullcontext() if self._steps else self._block_order.comparing_blocks():
            result = self._loss(self.model, batch)
            self._block_order.returned(before)
        self._used.look_at_root()
        return result

    def _gather(self, records: Records, *attached: torch.Tensor | float) -> tuple[StepRecord, list[str]]:
        """The step's record, and the buffers that passes changed. Drops the gradients of parameters that no pass used:
        the optimizer is to leave these alone, as it would in one process.

        Args:
            attached: numbers of this worker to put into the record.

        Raises:
            ConfigError: the workers of a row did not run the same blocks, or passes wrote to parameters.
        """
        self._writes.check()
        first = 64 * self._buffers.words
        records.mark(sum(1 << (first + i) for i in self._used.seen))
        records.attach(self._block_order.take_hash(), *attached)
        began = time.perf_counter()
        record = records.gather(self._mesh.one_of_each_cell).result()
        self.wait_s = time.perf_counter() - began
        self._block_order.check([first for first, *_ in record.attached])
        self._steps += 1
        for i, p in enumerate(self._parameters):
            if not record.changed_buffers >> (first + i) & 1:
                p.grad = None
        touched = self._buffers.masked(record.changed_buffers)
        self._buffers.end(touched)
        return record, touched

    def _recomputing(self, changed: Iterable[str]) -> AbstractContextManager[object]:
        return self._buffers.begun(changed) if self.recomputes else nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """This worker's shards of the gradients, except those of parameters that no pass of the step used."""
        return [local(p.grad) for p in self._parameters if p.grad is not None]

    def _counted(self) -> list[bool]:
        """For each gradient, whether this worker counts it: what each worker of a cell has whole, the first counts."""
        first = self._mesh.layout.tensor == 1 or self._mesh.cells.get_local_rank() == 0
        return [first or own for own, p in zip(self._in_parts, self._parameters, strict=True) if p.grad is not None]

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

    def has_finite_gradients(self, batch: Any) -> bool:
        """Whether this worker's own gradients of a batch are finite. All workers of the row call this at the same
        time."""
        look = Look()
        for module in fsdp_modules(self.model):
            module.set_custom_reduce_scatter(look)  # type: ignore[arg-type]
        self._root.set_requires_all_reduce(False)
        for p in self._parameters:
            p.grad = None
        self._loss(self.model, batch)[0].backward()
        return all(bool(torch.isfinite(t).all()) for t in look.seen)

    def reshard(self) -> None:
        """Free parameters that a forward pass without a backward pass left gathered."""
        reshard(self.model)

    def close(self) -> None:
        """Put this worker's shards back in place of parameters that an interrupted pass left gathered."""
        let_go(self.model)


class FastSharded(_Sharded):
    """FSDP2 unchanged: each pass's gradients are reduce-scattered and added up; copies are summed in the last pass."""

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this worker's passes; see `FastReplica.run`."""
        records, buffers = self._begin(), self._buffers
        after: list[dict[str, torch.Tensor]] = []
        counts: list[int] = []
        for one in passes:
            self._root.set_requires_all_reduce(one.last)
            versions = buffers.versions()
            loss, weight, metrics = self._forward(one.batch)
            changed = buffers.copies_since(versions)
            if not one.padding:
                after.append(changed)
                counts.append(len(one.digests))
                records.add(loss, weight, metrics, one.digests, buffers.mask(changed))
            with self._used.only_if(not one.padding), self._recomputing(changed):
                (loss * 0 if one.padding else loss * self.scale).backward()
            buffers.passed(versions, changed)
        record, touched = self._gather(records, self._square(), fingerprint(buffers, after))
        self._squares = [square for _, square, _ in record.attached]
        if touched:
            fingerprints = [last for *_, last in record.attached]
            average_moves(
                buffers, touched, after, counts, sum(map(len, self._runs)), fingerprints, self._mesh.one_of_each_cell
            )
        return record, record.weight * self.scale

    def _square(self) -> torch.Tensor:
        """The sum of squares of the gradients that this worker's cell has: of its shard of a copy of the model."""
        kept = self._counted()
        here = [g for g, mine in zip(self.gradients(), kept, strict=True) if mine and g.numel()]
        found = torch.zeros((), device=self._device)
        if here:
            found = torch.stack(norm_of_each(here)).float().square().sum().to(self._device)
        if self._mesh.layout.tensor > 1:
            dist.all_reduce(found, group=self._mesh.cells.get_group())
        return found

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The global L2 norm of the gradients: of the first copy, so that it is equal on all workers."""
        return torch.tensor(self._squares[: self._mesh.layout.shards], dtype=torch.float64).sum().sqrt()


class BitwiseSharded(_Sharded):
    """One microbatch per pass; the same sums, in the same order, as `BitwiseReplica`."""

    _exact = True

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        runs: list[range],
        rows: list[range],
        mesh: Mesh,
        device: torch.device,
        bucket_mb: int,
        check: Callable[[], None],
    ):
        """`rows`: the microbatches of each row of the mesh; `runs`: their deal in rounds, as by `lockstep`."""
        super().__init__(model, loss, runs=runs, mesh=mesh, device=device, check=check)
        self._rows, self._bucket_bytes = rows, bucket_mb << 20
        #: For each parameter, the number of row sums on each shard of it, or of this worker's part in its cell.
        row = mesh.parts_of_row
        self._row_sums = [
            [part.box(p.shape, cut).sizes[0] * sums_per_row(local(p).shape, p.dtype) for part in row]
            for p, cut in zip(self._parameters, self._cuts)
        ]
        self._leaves = []
        for module in fsdp_modules(model):
            leaves = Leaves(mesh.layout.shards)
            module.set_custom_reduce_scatter(leaves)  # type: ignore[arg-type]
            self._leaves.append(leaves)

    def run(self, passes: Iterable[Pass]) -> tuple[StepRecord, float]:
        """Run this worker's passes, one microbatch each; see `FastReplica.run`."""
        records, mesh = self._begin(), self._mesh
        buffers, run = self._buffers, self._rows[mesh.replica]
        columns = [Link(one_level(len(self._rows), mesh.replica), mesh.column_group)]
        sums = [CanonicalSum(columns, self._rows, self._bucket_bytes) for _ in self._leaves]
        after: list[dict[str, torch.Tensor]] = []
        indices: list[int] = []
        first, count = run.start, 0
        for one in passes:
            versions = buffers.versions()
            before = self._block_order.count
            loss, weight, metrics = self._forward(one.batch)
            runs, size = self._block_order.runs(before), min(mesh.layout.shards, run.stop - first)
            for i, leaves in enumerate(self._leaves):
                leaves.begin(first, size, runs_once=runs[i] == 1)
            changed = buffers.copies_since(versions)
            if not one.padding:
                records.add(loss, weight, metrics, one.digests, buffers.mask(changed))
                after.append(changed)
                indices.append(one.first)
            with self._used.only_if(not one.padding), self._recomputing(changed):
                (loss * self.scale if self.scale != 1 else loss).backward()
            buffers.passed(versions, changed)
            if not one.last:
                for p in self._parameters:
                    p.grad = None  # FSDP2 would add to it, which is not the canonical tree
            for leaves, total in zip(self._leaves, sums):
                leaves.push(total, keep=one.last)
            first, count = first + mesh.layout.shards, count + 1
        for leaves, total in zip(self._leaves, sums):
            leaves.put(total, count)
        record, touched = self._gather(records, fingerprint(buffers, after))
        if touched:
            cells = [Link(one_level(len(self._runs), self._cell), mesh.one_of_each_cell)]
            moves = CanonicalSum(cells, self._runs, self._bucket_bytes)
            fingerprints = [last for *_, last in record.attached]
            reduce_moves(
                buffers, touched, after, indices, moves, sum(map(len, self._runs)), fingerprints, mesh.one_of_each_cell
            )
        return record, record.weight * self.scale

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The global L2 norm of the gradients, with the bits of `canonical_norm` of the whole gradients; where a cell
        has several workers, with bits that are the same at every number of cells."""
        shards = self._mesh.layout.shards
        held = [counts for p, counts in zip(self._parameters, self._row_sums) if p.grad is not None]
        lengths = [[counts[s] for counts in held] for s in range(shards)]
        mine = row_sums(gradients)
        longest = max(map(sum, lengths))
        padded = mine.new_zeros(longest)
        padded[: len(mine)] = mine
        gathered = mine.new_empty(shards * longest)
        if shards > 1:
            all_gather_flat(gathered, padded, group=self._mesh.row_group)
        else:
            gathered = padded
        by_shard = [row[: sum(ls)].split(ls) for row, ls in zip(gathered.view(shards, longest), lengths)]
        counted = [i for i, own in enumerate(self._counted()) if own]
        total = torch.cat([mine.new_empty(0), *(by_shard[s][i] for i in counted for s in range(shards))]).sum()
        if self._mesh.layout.tensor > 1:
            of_cell = total.new_empty(self._mesh.layout.tensor)
            all_gather_flat(of_cell, total.reshape(1), group=self._mesh.cells.get_group())
            total = of_cell.sum()
        return total.sqrt()
