"""Whether an optimizer works element by element: only then does sharding a parameter not change its bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from elastic.errors import ConfigError
from elastic.parallel.optimizers import Together, parts_of

_SHAPES = ((7, 13), (5,))
_MATRICES = ((7, 13), (5, 3))  # for those that take nothing else
_STEPS = 10  # norms of whole tensors and of pieces are often equal by chance


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Update made-up parameters whole and cut in two, with this optimizer's class and settings, and compare the bits.

    Raises:
        ConfigError: the bits differ, or the class cannot be built from parameter groups.
    """
    kind = type(optimizer).__name__
    try:
        whole, cut = _train(optimizer, pieces=1), _train(optimizer, pieces=2)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the optimizer {kind} cannot be tried out on parameters that are cut ({error}); let its class take "
            "parameter groups alone, or use --parallel.strategy ddp or --run.exactness fast"
        ) from error
    if not all(torch.equal(a, b) for a, b in zip(whole, cut)):
        raise ConfigError(
            f"the optimizer {kind} gives other bits when a parameter {_in_16_bits(optimizer)}is cut; with "
            "--run.exactness bitwise use --parallel.strategy ddp, or an optimizer that works element by element, such "
            "as AdamW"
        )


def _in_16_bits(optimizer: torch.optim.Optimizer) -> str:
    found = {_like(group)["dtype"] for group in optimizer.param_groups} & {torch.bfloat16, torch.float16}
    return f"in {str(found.pop()).removeprefix('torch.')} " if found else ""


def state_share(optimizer: torch.optim.Optimizer) -> list[float]:
    """Bytes that this optimizer keeps per byte of a parameter after its first step, for each group.

    If its class cannot be tried out, the values of Adam.
    """
    if isinstance(optimizer, Together):
        return [share for part in parts_of(optimizer) for share in state_share(part)]
    try:
        built, found = _build(optimizer, pieces=1)
    except (TypeError, ValueError, AttributeError):
        return [2.0] * len(optimizer.param_groups)
    for of_group in found:
        for p in (p for ps in of_group for p in ps):
            p.grad = torch.zeros_like(p)
    built.step()
    shares = []
    for group in built.param_groups:
        kept = [v for p in group["params"] for v in built.state[p].values() if isinstance(v, torch.Tensor)]
        shares.append(_bytes(v for v in kept if v.dim()) / _bytes(group["params"]))
    return shares


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _train(optimizer: torch.optim.Optimizer, pieces: int) -> list[torch.Tensor]:
    built, found = _build(optimizer, pieces)
    generator = torch.Generator().manual_seed(1)
    for _ in range(_STEPS):
        for of_group in found:
            for shape, ps in zip(_shapes(optimizer), of_group):
                gradient = torch.randn(shape, generator=generator)
                for p, g in zip(ps, gradient.chunk(pieces)):
                    p.grad = g.to(p, copy=True)
        built.step()
    kept = [[[p, *_of_its_shape(built, p)] for p in ps] for of_group in found for ps in of_group]
    return [torch.cat(same).detach() for parts in kept for same in zip(*parts)]


def _of_its_shape(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> list[torch.Tensor]:
    return [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor) and v.shape == p.shape]


def _shapes(optimizer: torch.optim.Optimizer) -> tuple[tuple[int, ...], ...]:
    return _MATRICES if all(p.dim() == 2 for g in optimizer.param_groups for p in g["params"]) else _SHAPES


def _like(group: dict[str, Any]) -> dict[str, Any]:
    """The dtype and the device of a group's parameters: of one that is trained, if any is."""
    trained = [p for p in group["params"] if p.requires_grad]
    first = trained[0] if trained else torch.zeros(())
    return {"dtype": first.dtype, "device": "cpu" if first.is_meta else first.device}


def _build(
    optimizer: torch.optim.Optimizer, pieces: int
) -> tuple[torch.optim.Optimizer, list[list[list[torch.Tensor]]]]:
    """An optimizer of the same class and settings for made-up parameters, and these by group, parameter and piece."""
    generator = torch.Generator().manual_seed(0)
    known = set(inspect.signature(type(optimizer).__init__).parameters)
    found, groups = [], []
    for group in optimizer.param_groups:
        # in 16 bits, kernels of CPUs round what does not fill a register in another way
        values = [torch.randn(shape, generator=generator).to(**_like(group)) for shape in _shapes(optimizer)]
        of_group = [[piece.clone().requires_grad_() for piece in value.chunk(pieces)] for value in values]
        settings = {k: v for k, v in group.items() if k in known and k != "params"}
        groups.append({"params": [p for ps in of_group for p in ps], **settings})
        found.append(of_group)
    return type(optimizer)(groups), found  # type: ignore[call-arg]
