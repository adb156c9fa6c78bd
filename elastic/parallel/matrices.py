"""Muon on a cut model: its update has a product over a whole matrix, of which each worker of a row has some rows.

So the matrix is gathered, each worker computes the whole product, and keeps its rows: the same bits for every cut. That
is done while the step is prepared, as an update that passed the fence needs nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from elastic.parallel.mesh import Mesh
from elastic.parallel.optimizers import parts_of
from elastic.parallel.wrapping import cut_of, local, whole
from elastic.placement import Box, narrowed


def is_muon(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's own Muon."""
    return type(optimizer) is torch.optim.Muon


class Matrices:
    """The products of one optimizer's next update. Costs nothing where no Muon has cut parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, mesh: Mesh | None):
        self._parts = [part for part in parts_of(optimizer) if is_muon(part)] if mesh is not None else []
        self._mesh = mesh
        self._ready: list[tuple[torch.Tensor, torch.Tensor]] = []  # what was multiplied, here, and the product's rows

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self._parts)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the products of the gradients that are there. Everyone of the row calls this at one time."""
        from elastic.compat.torch_muon import product

        assert self._mesh is not None
        self._ready = []
        for group, given, state in self._trained():
            gradient = local(given)
            momentum, buffer = group["momentum"], state.get("momentum_buffer")
            moved = torch.zeros_like(gradient) if buffer is None else local(buffer).clone()
            moved.lerp_(gradient, 1 - momentum)
            update = gradient.lerp(moved, momentum) if group["nesterov"] else moved
            cut = torch.empty_like(given)
            local(cut).copy_(update)
            found = product(whole(cut, self._mesh), group["ns_coefficients"], group["ns_steps"], group["eps"])
            shape = tuple(cut.shape)
            box = self._mesh.part.box(shape, cut_of("a gradient", cut))
            self._ready.append((update, narrowed(found, box, Box.whole(shape)).clone()))

    def _trained(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, dict[str, Any]]]:
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        yield group, parameter.grad, part.state.get(parameter, {})

    def used(self) -> AbstractContextManager[None]:
        """To be entered for the update: its products are those that were prepared."""
        if not self._ready:
            return nullcontext()
        from elastic.compat.torch_muon import replaced

        waiting = iter(self._ready)
        self._ready = []

        def rows(update: torch.Tensor, *_: Any) -> torch.Tensor:
            multiplied, product = next(waiting)
            if not torch.equal(local(update), multiplied):
                raise RuntimeError(
                    f"Muon of torch {torch.__version__} multiplies another matrix than was prepared for parameters "
                    "that are cut over the workers; use another version of torch, or --parallel.strategy ddp"
                )
            if not isinstance(update, DTensor):
                return product
            return DTensor.from_local(
                product, update.device_mesh, update.placements, shape=update.shape, stride=update.stride()
            )

        return replaced(rows)
