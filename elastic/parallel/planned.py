"""Layers that a model's own `forward()` runs, as `pp_plan` of a model of Hugging Face names them.

Such a `forward()` makes masks and positions, and gives them to each layer beside the hidden states. So each stage calls
it as a whole, with the inputs of the model. Layers of the stages before are left out: they return what was sent. The
first layer of the stage gets what was sent as its first input. Where the first layer of the next stage is called, its
first input is what is sent on, and `forward()` is left. So what happens between two layers happens where the first of
them is. Whatever else `forward()` makes of activations is wrong; the comparison with the whole model finds that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic.errors import ConfigError

#: The inputs of a call of a model: in order, and by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(BaseException):
    """Leaves a model's `forward()` where the next stage begins; no error, so that nobody handles it."""

    def __init__(self, hidden: Any):
        self.hidden = hidden


@dataclass(frozen=True)
class Planned:
    """The layers that a plan names.

    Args:
        model: whose `forward()` runs them.
        modules: in order.
        takes: the name of the first input of each.
    """

    model: nn.Module
    modules: Sequence[nn.Module]
    takes: Sequence[str]

    named = True
    said = "pp_plan of the model names"

    def run(self, mine: range, call: Call, sent: tuple[torch.Tensor, ...] | None) -> Any:
        """Run some of the layers.

        Args:
            call: how the job's loss calls the model.
            sent: by the stage before; None for the first one.

        Returns:
            what is to be sent on, or what the model returns if the last layer is one of them.
        """
        others: dict[int, Callable[..., Any]] = {}
        if sent is not None:
            others |= dict.fromkeys(range(mine.start), lambda *_, **__: sent[0])
            others[mine.start] = self._entered(mine.start, sent[0])
        if mine.stop < len(self.modules):
            others[mine.stop] = self._reached(mine.stop)
        inputs, named = call
        with _calling({id(self.modules[i]): (self.modules[i], forward) for i, forward in others.items()}):
            try:
                found = self.model(*inputs, **named)
            except _Reached as reached:
                return reached.hidden
        if mine.stop < len(self.modules):
            raise ConfigError(
                f"pp_plan of the model names a {type(self.modules[mine.stop]).__name__} that forward() does not call; "
                "write stages() in the job, or leave --parallel.pipeline out"
            )
        return found

    def _entered(self, layer: int, sent: torch.Tensor) -> Callable[..., Any]:
        own, name = self.modules[layer].forward, self.takes[layer]

        def forward(*inputs: Any, **named: Any) -> Any:
            return own(sent, *inputs[1:], **named) if inputs else own(**{**named, name: sent})

        return forward

    def _reached(self, layer: int) -> Callable[..., Any]:
        name = self.takes[layer]

        def forward(*inputs: Any, **named: Any) -> Any:
            raise _Reached(inputs[0] if inputs else named.get(name))

        return forward


@contextmanager
def _calling(others: dict[int, tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, these modules have another `forward()`; their hooks run as ever."""
    kept = [(module, vars(module).get("forward")) for module, _ in others.values()]
    for module, forward in others.values():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in kept:
            if before is None:
                del module.forward
            else:
                module.forward = before


def planned(model: nn.Module) -> Planned | None:
    """The layers of a model that brings a plan, or whose part does, as under adapters; None if it has none.

    Raises:
        ConfigError: the plan names what is not there.
    """
    of, plan = next(((name, p) for name, m in model.named_modules() if (p := _plan_of(m))), ("", {}))
    if not plan:
        return None
    everything = enumerate(model.named_modules(remove_duplicate=False))
    places = {name: (number, module) for number, (name, module) in everything}
    found: list[tuple[int, nn.Module, str]] = []
    for key, value in plan.items():
        name = f"{of}.{key}".lstrip(".")
        if name not in places:
            raise ConfigError(
                f"pp_plan of the model names {name}, which the model does not have; write stages() in the job, or "
                "leave --parallel.pipeline out"
            )
        number, module = places[name]
        several = [*module.named_children()] if isinstance(module, nn.ModuleList) else []
        parts = [places[f"{name}.{child}"] for child, _ in several] or [(number, module)]
        found += [(at, one, str(value[0][0])) for at, one in parts]
    found.sort(key=lambda one: one[0])
    return Planned(model, [module for _, module, _ in found], [name for *_, name in found])


def _plan_of(module: nn.Module) -> dict[str, Any]:
    """A module's own plan; what wrappers pass on is that of another one."""
    return dict(getattr(module, "pp_plan", None) or {}) if hasattr(type(module), "pp_plan") else {}
