"""The layers of a model that pipelines run one after another, and how they are cut into stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from elastic.errors import ConfigError, one_line
from elastic.parallel.planned import Call, Planned, planned
from elastic.seeds import derive, seed_all


@dataclass(frozen=True)
class Chain:
    """The layers that `stages()` returned: each gets what the one before returned."""

    modules: Sequence[nn.Module] = ()

    named = False
    said = "stages() returns"

    def run(self, mine: range, call: Call, sent: tuple[Any, ...] | None) -> Any:
        """Run some of the layers; see `Planned.run`."""
        return chained(self.modules[mine.start : mine.stop], call[0] if sent is None else sent)


#: The layers of a model, and how a stage runs some of them. Attributes beside `modules`: `named`, whether each stage
#: calls the model itself, with inputs by name too; `said`, how messages begin.
Layers = Chain | Planned


def layers_of(job: Any, model: nn.Module) -> Layers:
    """What the job's `stages()` returned, or else what the model's `pp_plan` names; none if it has neither.

    Raises:
        ConfigError: it raised, one of them is no module, or the plan names what is not there.
    """
    try:
        returned = job.stages(model)
    except Exception as error:
        raise ConfigError(f"stages() raised {one_line(error)}; return modules of the model") from error
    if returned is None:
        return planned(model) or Chain()
    if not isinstance(returned, Iterable):
        raise ConfigError(
            f"stages() returns a {type(returned).__name__}, which is no list; return the modules of the model that "
            "forward() calls one after another, in a list"
        )
    found = list(returned)
    other = next((one for one in found if not isinstance(one, nn.Module)), None)
    if other is not None:
        raise ConfigError(
            f"stages() returns a {type(other).__name__}, which is no torch.nn.Module; return modules of the model"
        )
    return Chain(found)


def check_layers(model: nn.Module, layers: Layers, stages: int, given: str | None = None) -> None:
    """Refuse layers that do not make stages of a model, which may be on meta.

    Args:
        given: what the option says, if that is no number.

    Raises:
        ConfigError: there are too few, one is no module of the model, parameters or buffers belong to several of
            them, or trained parameters to none; with the name, and what to do.
    """
    modules, said = layers.modules, layers.said
    if not modules:
        raise ConfigError(
            f"--parallel.pipeline is {given or stages}, but the job has no stages(), and the model no pp_plan; return "
            "the modules that the model's forward() calls one after another, such as [model.embedding, *model.blocks, "
            "model.head], or leave --parallel.pipeline out"
        )
    names = {id(module): name for name, module in model.named_modules()}
    for layer in modules:
        if names.get(id(layer), "") == "":
            raise ConfigError(
                f"stages() returns a {type(layer).__name__} that is no part of the model; return modules of the model"
            )
    if len(modules) < stages:
        raise ConfigError(
            f"--parallel.pipeline is {stages}, but {said} {len(modules)} modules; give at most {len(modules)}, or "
            "return smaller modules from stages()"
        )
    twice = next((layer for i, layer in enumerate(modules) if any(layer is other for other in modules[:i])), None)
    if twice is not None:
        raise ConfigError(f"stages() returns {names[id(twice)]} twice; return each module once")
    _check_owners(model, [(names[id(layer)], layer) for layer in modules], said)


def _check_owners(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], said: str) -> None:
    owner: dict[int, str] = {}
    known = {id(p): name for name, p in model.named_parameters()}
    for name, layer in layers:
        for parameter in layer.parameters():
            if (other := owner.setdefault(id(parameter), name)) != name:
                raise ConfigError(
                    f"{other} and {name} share the parameter {known[id(parameter)]}, and {said} them as two modules, "
                    "which may be on different workers; give each a parameter of its own, return one module from "
                    "stages() that holds both, or leave --parallel.pipeline out"
                )
    saved = {id(b): name for name, b in model.state_dict(keep_vars=True).items() if id(b) not in known}
    owner_of_buffer: dict[int, str] = {}
    for name, layer in layers:
        for buffer in layer.buffers():
            if id(buffer) in saved and (other := owner_of_buffer.setdefault(id(buffer), name)) != name:
                raise ConfigError(
                    f"{other} and {name} share the buffer {saved[id(buffer)]}, and {said} them as two modules, which "
                    "may be on different workers; give each a buffer of its own, return one module from stages() that "
                    "holds both, or leave --parallel.pipeline out"
                )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owner:
            raise ConfigError(
                f"the parameter {name} is trained, but no module that {said} has it; return all modules that the "
                "model's forward() calls from stages(), or freeze it"
            )


def cut(costs: Sequence[int], stages: int) -> list[range]:
    """Cut layers into so many runs, none empty, such that the costliest run costs as little as is possible; of several
    such cuts, the one whose first stages have the most layers.

    Args:
        costs: of each layer, at least as many as stages, none negative.
    """
    sums = [0, *accumulate(costs)]
    count = len(costs)
    least = [*sums[1:]]  # of the first i + 1 layers in so many stages as were looked at, the cost of the costliest
    for stage in range(1, stages):
        least = [
            min((max(least[i - 1], sums[end + 1] - sums[i]) for i in range(stage, end + 1)), default=sums[-1] + 1)
            for end in range(count)
        ]
    most, bounds = least[-1], [0]
    for left in range(stages - 1, 0, -1):  # as many layers as fit, and one for each stage that is left
        end = bounds[-1] + 1
        while end < count - left and sums[end + 1] - sums[bounds[-1]] <= most:
            end += 1
        bounds.append(end)
    return [range(a, b) for a, b in pairwise([*bounds, count])]


def stages_of_buffers(model: nn.Module, stages: Sequence[Sequence[nn.Module]]) -> dict[str, int]:
    """The stage of each buffer of the model, by its name; those outside of all layers are of the first."""
    stage_of = {id(b): s for s, layers in enumerate(stages) for layer in layers for b in layer.buffers()}
    return {name: stage_of.get(id(buffer), 0) for name, buffer in model.named_buffers()}


def seed_each(layers: Iterable[nn.Module]) -> None:
    """Have each layer draw from a seed that follows from that of the layer before it, in training mode: so what it
    draws does not depend on which layers run in the same process."""

    def seed(layer: nn.Module, _: Any) -> None:
        if layer.training:
            seed_all(seed_behind(1))

    for layer in layers:
        layer.register_forward_pre_hook(torch.compiler.disable(seed), prepend=True)


def seed_behind(layers: int) -> int:
    """The seed of the last of so many layers that follow each other from the present seed on."""
    seed = torch.initial_seed()
    for _ in range(layers):
        seed = derive("layer", seed)
    return seed


def chained(layers: Iterable[nn.Module], inputs: tuple[Any, ...]) -> Any:
    """Call layers one after another, each with what the one before returned; returns what the last one returned.

    Raises:
        ConfigError: one returns a tensor twice. Its gradient is one sum in one process, but two sums that are added
            where the cut is behind this layer.
    """
    found: Any = inputs
    for layer in layers:
        found = layer(*inputs)
        inputs = as_tuple(found)
        tensors = [one for one in inputs if isinstance(one, torch.Tensor)]
        if len({id(one) for one in tensors}) < len(tensors):
            raise ConfigError(
                f"a {type(layer).__name__} of stages() returns one tensor twice, whose gradient would be summed in "
                "another order on each number of stages; let it return each tensor once"
            )
    return found


def as_tuple(found: Any) -> tuple[Any, ...]:
    """What a layer returned, as the inputs of the next one."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


class _Handed(torch.autograd.Function):
    """The same values, in the same memory."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.data

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def handed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What another stage has sent, as tensors to which a layer may write: autograd takes them for no leaves."""
    return tuple(_Handed.apply(t) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in inputs)
