"""Holds what the stages of a pipeline make of a microbatch against what the whole model makes of it.

Only the layers of `stages()` run in a pipeline. What `forward()` does between them, what `loss()` takes from modules of
other stages, and what a cut does to gradients show in what a step takes from a microbatch, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.compat.torch_sharded import gathered_parameters
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.reduce_scatter import Unsent
from elastic.parallel.replicated import LossFunction
from elastic.parallel.wrapping import fsdp_modules, local

UNLIKE = (
    "{} modules that, called one after another, compute something else than the model's forward(); let "
    "forward() call these modules in this order, each with what the one before returned, and do nothing else, or leave "
    "--parallel.pipeline out"
)
UNLIKE_WHOLE = (
    "with --parallel.pipeline a microbatch has another {} than the whole model gives it: forward() or loss() does "
    "something outside of the layers of stages(), or takes something from layers that may be on other workers; move it "
    "into a layer of stages(), or leave --parallel.pipeline out"
)

#: The loss, the weight and the metrics of a microbatch.
Row = tuple[float, float, dict[str, float]]


def row_of(loss: torch.Tensor, weight: Any, metrics: Mapping[str, Any]) -> Row:
    return float(loss.detach()), float(weight), {name: float(value) for name, value in metrics.items()}


@dataclass
class Taken:
    """What a step takes from one microbatch, as far as a stage knows it.

    Args:
        batch: a copy of the microbatch.
        row: of the last stage.
        gradients: of the parameters that got one, by name.
        buffers: those that changed, by name, with their values after it.
    """

    batch: Any
    row: Row | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def all_zero(self) -> str | None:
        """The first parameter whose gradient is there, but zero."""
        return next((name for name, one in self.gradients.items() if not one.any()), None)


#: The first thing of a stage that differs, for `UNLIKE_WHOLE`, behind its place in the order of such things.
Difference = tuple[int, str]


@dataclass(frozen=True)
class Likeness:
    """How equal two results must be.

    Args:
        exact: outputs, losses, metrics and buffers have the same bits.
        exact_gradients: gradients too.
        eps: of the format that layers compute in. Norms may differ by a share of its root, since a device may sum in
            another order each time.
    """

    exact: bool
    exact_gradients: bool
    eps: float = torch.finfo(torch.float32).eps

    def tensors(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return self._are(a, b, exact=self.exact)

    def gradients(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        return self._are(a, b, exact=self.exact_gradients)

    def numbers(self, a: float, b: float) -> bool:
        return self.tensors(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))

    def _are(self, a: torch.Tensor, b: torch.Tensor, *, exact: bool) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = a.detach(), b.detach()
        if bool(((a == b) | ((a != a) & (b != b))).all()):  # NaN is no error here
            return True
        if exact or not a.is_floating_point():
            return False
        eps = max(self.eps, torch.finfo(a.dtype).eps) if a.dtype != torch.float64 else self.eps
        a, b = a.double(), b.double()
        return bool((a - b).norm() <= eps**0.5 * torch.maximum(a.norm(), b.norm()))


def difference(
    found: Taken,
    model: nn.Module,
    loss: LossFunction,
    *,
    scale: float,
    trained: set[str],
    own_buffers: set[str],
    buffers: StepBuffers,
    like: Likeness,
) -> Difference | None:
    """Run the job's loss on the whole model for the microbatch, and its backward pass. All workers of a row call this.

    Buffers are as before afterwards, and there are no gradients.

    Args:
        found: what the stages made of it.
        trained: the parameters of this stage.
        own_buffers: the buffers of this stage.

    Returns:
        the first thing of this stage that differs; None if all is equal.
    """
    lacking, unlike = set(found.gradients), set[str]()

    def look(name: str, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            gradient = gradient.redistribute(placements=parameter.placements)
        lacking.discard(name)
        if name not in found.gradients or not like.gradients(found.gradients[name], local(gradient)):
            unlike.add(name)

    modules = fsdp_modules(model)
    for module in modules:
        module.set_custom_reduce_scatter(Unsent())  # type: ignore[arg-type]
    modules[0].set_requires_all_reduce(False)
    with buffers.begun(buffers.named) as begun:
        value, weight, metrics = loss(model, found.batch)
        changed = buffers.moved(begun)
        parameters = [pair for module in modules for pair in gathered_parameters(module)]  # type: ignore[arg-type]
        handles = [
            p.register_post_accumulate_grad_hook(partial(look, name)) for name, p in parameters if name in trained
        ]
        try:
            (value * scale).backward()
        finally:
            for handle in handles:
                handle.remove()
    for p in model.parameters():
        p.grad = None
    if found.row is not None and (what := _of_rows(found.row, row_of(value, weight, metrics), like.numbers)):
        return 0, what
    unlike |= lacking
    if name := next((name for name, _ in model.named_parameters() if name in unlike), None):
        return 1, f"gradient of {name}"
    for name in buffers.named:
        before, mine = buffers.before(name), name in own_buffers
        if mine and not like.tensors(found.buffers.get(name, before), changed.get(name, before)):
            return 2, f"buffer {name}"
    return None


def first_difference(told: Sequence[tuple[Difference | None, bool, str | None]]) -> Difference | None:
    """The first thing in which the stages of a pipeline differ from the whole model.

    A layer that does not use what it is given makes no gradient of it, but torch has the stage before go on with zeros;
    as does FSDP2, so that the whole model does not show it. An optimizer tells zeros from no gradient.

    Args:
        told: by each stage: what it found, whether it made no gradient of an input, and `all_zero` of what it took.
    """
    found = [one for one, _, _ in told if one is not None]
    for stage, (_, _, zero) in enumerate(told):
        if zero is not None and any(lacks for _, lacks, _ in told[stage + 1 :]):
            found.append((1, f"gradient of {zero} (zeros, where it may be none)"))
    return min(found, default=None, key=lambda one: one[0])


def _of_rows(found: Row, expected: Row, same: Callable[[float, float], bool]) -> str | None:
    if not same(found[0], expected[0]):
        return "loss"
    if not same(found[1], expected[1]):
        return "weight"
    nan = float("nan")
    for name in {**expected[2], **found[2]}:
        if (name in found[2]) != (name in expected[2]) or not same(found[2].get(name, nan), expected[2].get(name, nan)):
            return f"metric {name}"
    return None
