"""Moves parameters and gradients between the parts of the state that workers hold and the stages that need them whole.

Once a step, each worker sends its rows of every parameter to the workers of the stage that has it; and after the passes
each stage sends rows of its gradients to the workers that sum or hold these rows ([stage_sums.py](stage_sums.py)). So
what a worker holds does not depend on how the model is cut into stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.compat.torch import own_parameters, version_of
from elastic.errors import ConfigError
from elastic.parallel.canonical import UNDER_WAY, Exchange, Tensors, buckets_of, use_on_current_stream
from elastic.parallel.layout import TENSOR
from elastic.parallel.levels import blocks_of
from elastic.parallel.mesh import Mesh
from elastic.parallel.recording import tensors_in
from elastic.parallel.stage_sums import Grid, Rows, StageSums
from elastic.parallel.tree import TreeSum
from elastic.parallel.wrapping import cut_of, local, placement_in_cell
from elastic.parallel.writes import WRITTEN
from elastic.placement import Cut, Part, narrowed


@dataclass(frozen=True)
class _Owned:
    """A parameter, and the stage that has it."""

    name: str
    cut: nn.Parameter
    stage: int
    places: tuple[tuple[nn.Module, str], ...]  # where modules have it: (module, its name there)

    def rows(self, part: Part, of: torch.Tensor) -> torch.Tensor:
        """The rows that a worker with this part holds, of all of it that the workers with its place in their cells
        have."""
        shape, lies = tuple(self.cut.shape), cut_of(self.name, self.cut)
        return narrowed(of, part.box(shape, lies), part.box(shape, _in_cell(lies)))


def _in_cell(lies: Cut) -> Cut:
    """How a tensor lies over the workers of a cell, of one that lies so over all."""
    return tuple((axis, dimension) for axis, dimension in lies if axis == TENSOR)


_ALIGN = 16  # bytes, of which each dtype's size is a divisor

_ELSEWHERE = (
    "loss() computes with the parameter {}, but with --parallel.pipeline each worker has parameters of its own stage "
    "only; compute with it in forward() of a layer of stages(), or in after_step(), or leave --parallel.pipeline out"
)
_ASKED = ("__get__", "__set__", "size", "dim", "numel", "nelement", "stride", "is_floating_point", "element_size")


class Elsewhere(nn.Parameter):
    """Stands for a parameter of another stage while passes run: it has its shape and format, but no values.

    Computing with the rows that this worker holds would give another number, or wait for workers that do not compute.
    """

    name = ""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _ASKED:
            return super().__torch_function__(function, types, args, kwargs or {})
        raise ConfigError(_ELSEWHERE.format(next(one.name for one in tensors_in((args, kwargs)) if type(one) is cls)))


def elsewhere(name: str, like: torch.Tensor, device: torch.device) -> Elsewhere:
    nothing = torch.full((), float("nan") if like.is_floating_point() else 0, dtype=like.dtype, device=device)
    found = Elsewhere(nothing.expand(like.shape), requires_grad=like.requires_grad)
    found.name = name
    return found


class StageParameters:
    """The parameters of a worker's stage.

    Args:
        model: as `place_sharded` left it.
        stages: the layers of each stage.
        bucket_bytes: the most gradients of a stage that are exchanged at once.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Sequence[nn.Module]],
        mesh: Mesh,
        device: torch.device,
        bucket_bytes: int,
    ):
        self._mesh, self._device = mesh, device
        stage_of = {id(p): s for s, layers in enumerate(stages) for layer in layers for p in layer.parameters()}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, p in own_parameters(module).items():
                if p is not None:
                    places.setdefault(id(p), []).append((module, leaf))
        self._all = [
            _Owned(name, p, stage_of[id(p)], tuple(places[id(p)]))
            for name, p in model.named_parameters()
            if id(p) in stage_of
        ]
        self._mine = [one for one in self._all if one.stage == mesh.stage]
        trained = [one for one in self._all if one.cut.requires_grad]
        self._trained, self._rounds = trained, _rounds(trained, mesh, bucket_bytes)
        self._versions: list[int] = []
        mine = {one.name for one in self._mine}
        #: Of each other parameter of the model, what stands for it, itself, and where modules have it.
        self._others = [
            (elsewhere(name, p, device), p, places[id(p)]) for name, p in model.named_parameters() if name not in mine
        ]
        #: The whole parameters of this stage, by name; they stay the same objects.
        self.whole = {
            one.name: nn.Parameter(self._room_for(one), requires_grad=one.cut.requires_grad) for one in self._mine
        }
        layout = mesh.layout
        row = layout.row_of(mesh.cell * layout.tensor)
        self._stages_of_row = [cell % layout.stages for cell in row]
        #: Of each worker of the row, where its rows of this stage's parameters go.
        self._rows = [
            [one.rows(part, local(self.whole[one.name]).detach()) for one in self._mine] for part in mesh.parts_of_row
        ]
        sizes = [sum(map(_padded, rows)) for rows in self._rows]
        self._coming = [0 if cell == mesh.cell else size for cell, size in zip(row, sizes, strict=True)]
        self._padding = torch.zeros(_ALIGN, dtype=torch.uint8, device=device)

    def _room_for(self, one: _Owned) -> torch.Tensor:
        """Memory for all of a parameter, or for this worker's part of it in its cell."""
        shape = self._mesh.part.box(one.cut.shape, _in_cell(cut_of(one.name, one.cut))).sizes
        made, within = torch.empty(shape, dtype=one.cut.dtype, device=self._device), placement_in_cell(one.cut)
        if within is None:
            return made
        return DTensor.from_local(
            made, self._mesh.cells, [within], run_check=False, shape=one.cut.shape, stride=one.cut.stride()
        )

    def gather(self) -> None:
        """Bring the parameters of this stage here, and put them into the modules. All workers of the row call this."""
        mesh, own = self._mesh, self._mesh.row_group
        place = mesh.layout.row_of(mesh.cell * mesh.layout.tensor).index(mesh.cell)
        with torch.no_grad():
            going = [[] if i == place else self._bytes_for(stage) for i, stage in enumerate(self._stages_of_row)]
            lengths = [sum(t.numel() for t in one) for one in going]
            sent = torch.cat([self._padding[:0], *(t for one in going for t in one)])
            received = sent.new_empty(sum(self._coming))
            work = None
            if len(going) > 1:
                work = dist.all_to_all_single(received, sent, self._coming, lengths, group=own, async_op=True)
            for one, rows in zip(self._mine, self._rows[place], strict=True):
                rows.copy_(local(one.cut).detach())
            if work is not None:
                work.wait()
            at = 0
            for i, rows_of in enumerate(self._rows):
                for rows, size in zip(rows_of, map(_padded, rows_of), strict=True) if i != place else ():
                    if rows.numel():
                        rows.copy_(received[at : at + rows.nbytes].view(rows.dtype).view(rows.shape))
                    at += size
        self._put_in()  # not before: if a worker was lost meanwhile, nobody puts anything back
        self._versions = [version_of(p) for p in self.whole.values()]

    def _bytes_for(self, stage: int) -> list[torch.Tensor]:
        """This worker's rows of a stage's parameters, as bytes; each begins at a multiple of `_ALIGN`."""
        found = []
        for one in self._all:
            if one.stage == stage:
                rows = local(one.cut).detach()
                if rows.numel():
                    found.append(rows.contiguous().reshape(-1).view(torch.uint8))
                if rest := -rows.nbytes % _ALIGN:
                    found.append(self._padding[:rest])
        return found

    def _put_in(self) -> None:
        """Put the parameters of this stage into the modules, and what stands for others."""
        for one in self._mine:
            for module, leaf in one.places:
                own_parameters(module)[leaf] = self.whole[one.name]
        for stand, _, places in self._others:
            for module, leaf in places:
                own_parameters(module)[leaf] = stand

    def put_back(self) -> None:
        """Put this worker's rows back into the modules."""
        for one in self._mine:
            for module, leaf in one.places:
                own_parameters(module)[leaf] = one.cut
        for _, p, places in self._others:
            for module, leaf in places:
                own_parameters(module)[leaf] = p

    def check_unwritten(self) -> None:
        """
        Raises:
            ConfigError: passes have written to a parameter.
        """
        for (name, p), version in zip(self.whole.items(), self._versions, strict=True):
            if version_of(p) != version:
                raise ConfigError(f"parameter {name} {WRITTEN}")

    def begin_sums(self, total: TreeSum[Tensors], runs: Sequence[range]) -> None:
        """Begin to sum gradients over pipelines. All workers of the mesh call this.

        Args:
            total: of the own pipeline: of the gradients of the trained parameters of this stage, in order; whole, or
                this worker's parts in its cell.
            runs: the microbatches of each pipeline.
        """
        mesh = self._mesh
        parts = total.parts() if mesh.layout.pipelines > 1 else [((0, 1), total.total())]
        blocks = [blocks_of([run]) for run in runs] if mesh.layout.pipelines > 1 else [[(0, 1)]]
        groups = (mesh.one_of_each_cell, mesh.column_group)
        self._under_way: deque[tuple[Exchange[Tensors], _Round]] = deque()
        self._sums: dict[str, torch.Tensor] = {}
        for one in self._rounds:
            mine = [(block, [tensors[i] for i in one.mine]) for block, tensors in parts]
            uses = [t for _, tensors in mine for t in tensors]
            like = torch.empty(0, dtype=one.dtype, device=self._device)
            steps = one.sums.exchange(mine, blocks, like)
            self._under_way.append((Exchange(steps, groups, self._device, uses), one))
            if len(self._under_way) > UNDER_WAY:
                self._finish()

    def _finish(self) -> None:
        """Wait for the oldest sums under way."""
        exchange, one = self._under_way.popleft()
        for flat, sizes, owned in zip(exchange.result(), one.sums.sizes, one.by_stage, strict=True):
            use_on_current_stream(flat)
            self._sums |= zip((each.name for each in owned), flat.split(sizes), strict=True)

    def give(self, used: Sequence[bool]) -> None:
        """Set this worker's rows of all gradients, after `begin_sums`.

        Args:
            used: of all trained parameters of the model in their order, whether they have a gradient.
        """
        while self._under_way:
            self._finish()
        for one, is_used in zip(self._trained, used, strict=True):
            cut = one.cut
            cut.grad = None
            if is_used:
                assert isinstance(cut, DTensor)
                cut.grad = DTensor.from_local(
                    self._sums[one.name].view(local(cut).shape),
                    cut.device_mesh,
                    cut.placements,
                    run_check=False,
                    shape=cut.shape,
                    stride=cut.stride(),
                )
        self._sums = {}


@dataclass(frozen=True)
class _Round:
    """Parameters whose gradients are exchanged together: of one dtype, and of each stage at most one bucket.

    Args:
        by_stage: all of them.
        mine: those of the own stage, counted over its trained parameters.
    """

    dtype: torch.dtype
    by_stage: list[list[_Owned]]
    mine: list[int]
    sums: StageSums


def _rounds(owned: Sequence[_Owned], mesh: Mesh, limit: int) -> list[_Round]:
    """The rounds of all trained parameters; equal on all workers.

    Args:
        limit: the most bytes that a stage brings into a round.
    """
    layout = mesh.layout
    grid, found = Grid(layout.replicas, layout.shards, layout.stages), []
    numbers = {one.name: i for i, one in enumerate(one for one in owned if one.stage == mesh.stage)}
    for dtype in dict.fromkeys(one.cut.dtype for one in owned):
        of_stages = [[one for one in owned if one.stage == s and one.cut.dtype == dtype] for s in range(layout.stages)]
        buckets = [[mine[b] for b in buckets_of([_meta(one) for one in mine], limit)] for mine in of_stages]
        for number in range(max(map(len, buckets))):
            by_stage = [of[number] if number < len(of) else [] for of in buckets]
            rows = [Rows(one.stage, _shards(one, mesh)) for mine in by_stage for one in mine]
            mine = [numbers[one.name] for one in by_stage[mesh.stage]]
            found.append(_Round(dtype, by_stage, mine, StageSums(rows, grid, mesh.cell)))
    return found


def _meta(one: _Owned) -> torch.Tensor:
    return torch.empty(one.cut.shape, dtype=one.cut.dtype, device="meta")


def _shards(one: _Owned, mesh: Mesh) -> tuple[range, ...]:
    """The elements of a parameter that each shard holds, counted over what the workers with this one's place in their
    cells have of it."""
    shape, lies = tuple(one.cut.shape), cut_of(one.name, one.cut)
    within = mesh.part.box(shape, _in_cell(lies))
    each = within.volume // max(1, within.sizes[0]) if shape else 1
    found = []
    for part in mesh.parts_of_row:
        box = part.box(shape, lies)
        begin = (box.offsets[0] - within.offsets[0]) * each if shape else 0
        found.append(range(begin, begin + box.volume))
    return tuple(found)


def _padded(rows: torch.Tensor) -> int:
    return rows.nbytes + -rows.nbytes % _ALIGN
