"""Moves parameters and gradients between the parts of the state that workers hold and the stages that need them whole.

Once a step, each worker sends its rows of every parameter to the workers of the stage that has it; and after the passes
each stage sends rows of its gradients to the workers that hold these rows. So what a worker holds does not depend on
how the model is cut into stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.compat.torch import own_parameters, version_of
from elastic.errors import ConfigError
from elastic.parallel.layout import TENSOR
from elastic.parallel.mesh import Mesh
from elastic.parallel.recording import tensors_in
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
    """

    def __init__(self, model: nn.Module, stages: Sequence[Sequence[nn.Module]], mesh: Mesh, device: torch.device):
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
        layout, mesh, row = self._mesh.layout, self._mesh, self._mesh.parts_of_row
        stages = [cell % layout.stages for cell in layout.row_of(mesh.cell * layout.tensor)]
        going = [[local(one.cut).detach() for one in self._all if one.stage == stage] for stage in stages]
        coming = [[one.rows(part, local(self.whole[one.name]).detach()) for one in self._mine] for part in row]
        with torch.no_grad():
            _exchange(going, coming, mesh.row_group, self._device)
        for one in self._mine:
            for module, leaf in one.places:
                own_parameters(module)[leaf] = self.whole[one.name]
        for stand, _, places in self._others:
            for module, leaf in places:
                own_parameters(module)[leaf] = stand
        self._versions = [version_of(p) for p in self.whole.values()]

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

    def give(self, gradients: Sequence[torch.Tensor], used: Sequence[bool]) -> None:
        """Set this worker's rows of all gradients. All workers of the pipeline call this.

        Args:
            gradients: of the trained parameters of this stage, whole or this worker's parts in its cell, in order.
            used: of all trained parameters of the model in their order, whether they have a gradient.
        """
        layout, mesh = self._mesh.layout, self._mesh
        first = mesh.pipeline * layout.stages
        trained = [one for one in self._all if one.cut.requires_grad]
        whole = dict(zip((one.name for one in self._mine if one.cut.requires_grad), gradients, strict=True))
        mine = [one for one in trained if one.name in whole]
        index = mesh.cells.get_local_rank() if layout.tensor > 1 else 0
        parts = [layout.part(cell * layout.tensor + index) for cell in range(first, first + layout.stages)]
        going = [[one.rows(part, whole[one.name]) for one in mine] for part in parts]
        found = {one.name: torch.empty_like(local(one.cut), device=self._device) for one in trained}
        coming = [[found[one.name] for one in trained if one.stage == stage] for stage in range(layout.stages)]
        _exchange(going, coming, mesh.pipeline_group, self._device)
        for one, is_used in zip(trained, used, strict=True):
            one.cut.grad = None
            if is_used:
                whole_of = one.cut
                assert isinstance(whole_of, DTensor)
                one.cut.grad = DTensor.from_local(
                    found[one.name],
                    whole_of.device_mesh,
                    whole_of.placements,
                    run_check=False,
                    shape=whole_of.shape,
                    stride=whole_of.stride(),
                )


def _exchange(
    going: Sequence[Sequence[torch.Tensor]],
    coming: Sequence[Sequence[torch.Tensor]],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Send tensors to each worker of a group, and receive others, whose memory is given."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for one in going for t in one if t.numel()]
    sent = torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *flat])
    lengths = [sum(t.nbytes for t in one) for one in coming]
    received = sent.new_empty(sum(lengths))
    if len(going) == 1:
        received = sent
    else:
        dist.all_to_all_single(received, sent, lengths, [sum(t.nbytes for t in one) for one in going], group=group)
    at = 0
    for place in (t for one in coming for t in one if t.numel()):
        place.copy_(received[at : at + place.nbytes].clone().view(place.dtype).view(place.shape))  # aligned by the copy
        at += place.nbytes
