"""Tensor parallelism: cuts modules of a model over the workers of a cell, as the job's plan says.

The plan names modules by patterns, `*` for one part of a name:
`{"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}`.
A value is one of the words below, which are those of Hugging Face's plans, or one of torch's own `ParallelStyle`
objects. With "sequence" in a plan, activations between such modules are cut along the sequence (Korthikanti et al.,
"Reducing activation recomputation in large transformer models", 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from elastic.compat.torch import is_unfit_view
from elastic.errors import ConfigError
from elastic.seeds import derive

GATHERED = "colwise_gather_output"
_SEQUENCE = Shard(1)
#: The dimensions of weight and bias that a word divides.
_OF_LINEAR: dict[str, tuple[int | None, ...]] = {"colwise": (0, 0), GATHERED: (0, 0), "rowwise": (1, None)}
_OF_EMBEDDING: dict[str, tuple[int | None, ...]] = {"rowwise": (0,), "embedding_rowwise": (0,), "colwise": (1,)}
WORDS = ("colwise", GATHERED, "rowwise", "embedding_rowwise", "sequence")

Plan = Mapping[str, Any]


def check_plan(model: nn.Module, plan: Plan, tensor: int) -> None:
    """Refuse a plan that does not fit a model, which may be on meta.

    Args:
        tensor: workers of a cell.

    Raises:
        ConfigError: it is empty, names no module, has a word that is not known or does not fit a module, or a parameter
            cannot be divided; with the name, and what to do.
    """
    if not isinstance(plan, Mapping) or not plan:
        raise ConfigError(
            f"--parallel.tensor is {tensor}, but tensor_plan() names no module; return patterns of module names with "
            'what is done to them, such as {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}, or leave '
            "--parallel.tensor out"
        )
    for pattern in plan:
        if not any(matches(pattern, name) for name, _ in model.named_modules() if name):
            some = ", ".join([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:3])
            raise ConfigError(
                f"tensor_plan() has {pattern!r}, but no module of the model is called so; name its modules"
                + (f", such as {some}" if some else "")
            )
    for name, module, style in named(model, plan):
        _check_one(name, module, style, tensor)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is of this module; `*` stands for one part of a name, as in `parallelize_module`."""
    patterns, parts = pattern.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatchcase, parts, patterns))


def named(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, Any]]:
    """The modules that a plan names, each with what is done to it."""
    for name, module in model.named_modules():
        for pattern, style in plan.items():
            if name and matches(pattern, name):
                yield name, module, style


def _check_one(name: str, module: nn.Module, style: Any, tensor: int) -> None:
    if isinstance(style, ParallelStyle):
        return
    kind = type(module).__name__
    if style not in WORDS:
        raise ConfigError(
            f"tensor_plan() says {style!r} of {name}, which is not known; say one of {', '.join(WORDS)}, or give a "
            "ParallelStyle of torch.distributed.tensor.parallel"
        )
    if style == "sequence":
        return
    cuts = _cuts_of(module, style)
    if not cuts:
        raise ConfigError(
            f"tensor_plan() says {style!r} of {name}, which is a {kind}; linear layers are cut so "
            f"({', '.join(_OF_LINEAR)}), and embeddings ({', '.join(_OF_EMBEDDING)}); give a ParallelStyle of torch's"
        )
    for leaf, dimension in zip(("weight", "bias"), cuts):
        parameter = getattr(module, leaf, None)
        if dimension is not None and parameter is not None:
            check_divides(f"{name}.{leaf}", parameter.shape, dimension, tensor)


def check_divides(name: str, shape: torch.Size, dimension: int, tensor: int) -> None:
    """
    Raises:
        ConfigError: a cell's workers would have unequal parts of a parameter.
    """
    if shape[dimension] % tensor:
        raise ConfigError(
            f"--parallel.tensor is {tensor}, which does not divide the {shape[dimension]} of dimension {dimension} of "
            f"{name} (its shape is {tuple(shape)}); give a number that does, or leave that module out of tensor_plan()"
        )


def refused_in_cells(error: BaseException, tensor: int) -> str | None:
    """The explanation of an error that comes because a worker of a cell has a part of what a layer returns; None for
    other errors."""
    if tensor == 1 or not (isinstance(error, RuntimeError) and is_unfit_view(error)):
        return None
    return (
        f"a view or reshape in the model does not fit what --parallel.tensor {tensor} leaves of a layer's outputs on "
        f"each worker ({str(error).splitlines()[0]}); it must divide the number of heads, which the view is to leave "
        "open (view(..., -1, head_width)); give a number that does, or leave those layers out of tensor_plan()"
    )


def parts_of_plan(model: nn.Module, plan: Plan) -> dict[str, int]:
    """The parameters that a plan's words cut, by name: along which dimension. Those of torch's styles are not known."""
    found: dict[str, int] = {}
    for name, module, style in named(model, plan):
        if isinstance(style, str):
            cuts = zip(("weight", "bias"), _cuts_of(module, style))
            found |= {
                f"{name}.{leaf}": d for leaf, d in cuts if d is not None and getattr(module, leaf, None) is not None
            }
    return found


def plan_of(job: Any, model: nn.Module) -> Plan:
    """What of a model is cut over the workers of a cell: by the job, or by the model itself."""
    given: Plan | None = job.tensor_plan()
    return (getattr(model, "tp_plan", None) or {}) if given is None else given


def _cuts_of(module: nn.Module, style: str) -> tuple[int | None, ...]:
    """Along which dimensions a word cuts a module's weight and bias; empty if it does not fit the module."""
    if isinstance(module, nn.Linear):
        return _OF_LINEAR.get(style, ())
    return _OF_EMBEDDING.get(style, ()) if isinstance(module, nn.Embedding) else ()


def is_sequential(plan: Plan) -> bool:
    """Whether activations between modules are cut along the sequence."""
    return any(style == "sequence" or isinstance(style, SequenceParallel) for style in plan.values())


def styles(model: nn.Module, plan: Plan) -> dict[str, ParallelStyle]:
    """Torch's style for each module that a plan names."""
    between: Placement = _SEQUENCE if is_sequential(plan) else Replicate()
    return {name: _style(module, style, between) for name, module, style in named(model, plan)}


def _style(module: nn.Module, style: Any, between: Placement) -> ParallelStyle:
    """
    Args:
        between: how activations lie over a cell between the modules that are cut.
    """
    if isinstance(style, ParallelStyle):
        return style
    if style == "sequence":
        return SequenceParallel(use_local_output=True)
    if isinstance(module, nn.Embedding):
        if style == "colwise":
            return ColwiseParallel(output_layouts=between)
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    if style == "rowwise":
        return RowwiseParallel(output_layouts=between)
    return ColwiseParallel(input_layouts=between, output_layouts=Replicate() if style == GATHERED else None)


def cut_over_cells(model: nn.Module, plan: Plan, cells: DeviceMesh, ties: Mapping[str, str]) -> None:
    """Cut modules of a model on meta over the workers of each cell. No worker waits for another.

    Args:
        cells: the mesh of this worker's cell.
        ties: parameters that several modules share: further name -> first name.

    Raises:
        ConfigError: parts would be unequal, or two modules that share a parameter are to be cut otherwise.
    """
    wanted = styles(model, plan)
    draws = Draws(cells.get_local_rank(), has_sequence=is_sequential(plan))
    for name, style in wanted.items():
        module = model.get_submodule(name)
        parallelize_module(module, cells, style, src_data_rank=None)
        draws.watch(name, module, style)
    for name, first in ties.items():
        _tie(model, name, first)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            for placement in parameter.placements:
                if isinstance(placement, Shard):
                    check_divides(name, parameter.shape, placement.dim, cells.size())
    model.register_forward_pre_hook(lambda *_: draws.follow(Replicate(), training=model.training), prepend=True)


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Have two modules share a parameter again, of which each was cut by itself."""
    path, _, leaf = name.rpartition(".")
    other, _, kept = first.rpartition(".")
    one, two = getattr(model.get_submodule(other), kept), getattr(model.get_submodule(path), leaf)
    if one is two:
        return
    cuts = [t.placements if isinstance(t, DTensor) else None for t in (one, two)]
    if cuts[0] != cuts[1]:
        raise ConfigError(
            f"{first} and {name} are one parameter, but tensor_plan() cuts them otherwise; cut both along the same "
            'dimension (an embedding "rowwise" and a head "colwise_gather_output"), or leave both out'
        )
    setattr(model.get_submodule(path), leaf, one)


@dataclass
class Draws:
    """The random numbers of a cell: its workers draw alike where each has all of the activations, since these must stay
    equal, and apart where each has a part of them, since otherwise all parts would lose the same elements to dropout.

    How activations lie is known from the module that ran last. Where they begin to be cut, a worker's generators go on
    from a seed that all workers draw, and its place in the cell; where they are whole again, from where they were. Who
    seeds them meanwhile, as each pass does, begins with whole activations.

    Args:
        index: this worker's place in its cell.
        has_sequence: activations are cut along the sequence between modules.
    """

    index: int
    has_sequence: bool = False
    _sequence_is_cut: bool = False
    _own_seed: int | None = None  # from which the generators draw for a part
    _before: tuple[torch.Tensor, torch.Tensor | None] | None = None  # their state when activations began to be cut

    def watch(self, name: str, module: nn.Module, style: ParallelStyle) -> None:
        """Follow how activations lie after this module."""
        takes, gives = layouts(style)
        if takes == _SEQUENCE and self.has_sequence:
            module.register_forward_pre_hook(lambda *_: self._check_is_cut(name), prepend=True)
        if gives is not None:
            module.register_forward_hook(lambda *_: self.follow(gives, training=module.training))

    def _check_is_cut(self, name: str) -> None:
        if not self._sequence_is_cut:
            raise ConfigError(
                f'{name} takes its input cut along the sequence, as "sequence" in tensor_plan() has it, but no module '
                'cuts it before; let the plan begin with the embedding ("rowwise")'
            )

    def follow(self, layout: Placement, *, training: bool) -> None:
        """Activations lie so from now on."""
        apart = self._own_seed is not None and torch.default_generator.initial_seed() == self._own_seed
        cut = not isinstance(layout, Replicate)
        if layout == _SEQUENCE or not cut:
            self._sequence_is_cut = cut
        if cut and not apart and training:
            seed = int(torch.randint(1 << 62, (), dtype=torch.int64))
            self._before = torch.get_rng_state(), _device_state()
            self._own_seed = derive("cell", seed, self.index)
            _seed(self._own_seed)
        elif not cut and apart and self._before is not None:
            host, device = self._before
            torch.set_rng_state(host)
            if device is not None:
                torch.cuda.set_rng_state(device)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _device_state() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def layouts(style: ParallelStyle) -> tuple[Placement | None, Placement | None]:
    """How what a module takes and what it gives lies over a cell; None where the style does not say."""
    if isinstance(style, SequenceParallel):
        cut = getattr(style, "sequence_sharding", (_SEQUENCE,))
        return cut[0], cut[0]
    return _first(getattr(style, "input_layouts", None)), _first(
        getattr(style, "output_layouts", getattr(style, "desired_output_layouts", None))
    )


def _first(layouts: Any) -> Placement | None:
    found = layouts[0] if isinstance(layouts, (tuple, list)) and layouts else layouts
    return found if isinstance(found, Placement) else None
