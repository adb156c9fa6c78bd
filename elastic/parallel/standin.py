"""What the job's loss gets in place of a model whose layers run elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elastic.compat.torch import tree_map_only
from elastic.errors import ConfigError
from elastic.parallel.planned import Call

_TWICE = (
    "loss() calls the model several times, but with --parallel.pipeline each microbatch passes the stages once; call "
    "it once, with all inputs"
)
_NAMED = (
    "loss() calls the model with named inputs, which with --parallel.pipeline stages do not take; give tensors in order"
)
_NEVER = (
    "loss() returned without a call of the model, but with --parallel.pipeline other workers wait for what it makes; "
    "call it for every batch, and where one is not to count return (outputs * 0).sum() with the weight 0"
)


class Standin(nn.Module):
    """Looks like a model, but a call of it is a call of `forward`, once.

    Args:
        named: it may be called with inputs by name.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], *, named: bool = False):
        super().__init__()
        self._standin: list[Any] = [model, forward, False, named]  # in a list, so that it is no module of this one
        self.training = model.training

    def forward(self, *inputs: Any, **named: Any) -> Any:
        _, call, called, by_name = self._standin
        if called:
            raise ConfigError(_TWICE)
        if named and not by_name:
            raise ConfigError(_NAMED)
        self._standin[2] = True
        return call(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_standin"][0], name)

    def train(self, mode: bool = True) -> Standin:
        self._standin[0].train(mode)
        self.training = mode
        return self


def _of_model(name: str) -> Callable[..., Any]:
    def ask(self: Standin, *arguments: Any, **named: Any) -> Any:
        return getattr(self._standin[0], name)(*arguments, **named)

    return ask


#: What `nn.Module` has for all modules, so that `__getattr__` is not asked.
for _name in (
    *("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children"),
    *("named_children", "state_dict", "get_submodule", "get_parameter", "get_buffer", "apply", "requires_grad_"),
):
    setattr(Standin, _name, _of_model(_name))


def copied(batch: Any) -> Any:
    """A batch for a further call of loss(), which may write to it."""
    return tree_map_only(torch.Tensor, torch.clone, batch)


class _Called(BaseException):
    """Leaves the job's loss where it calls the model; no error, so that nobody handles it."""

    def __init__(self, call: Call):
        self.call = call


def calls_of(loss: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any, *, named: bool = False) -> Call:
    """The inputs with which the job's loss calls the model for a batch.

    Args:
        named: there may be inputs by name.

    Raises:
        ConfigError: it does not call it.
    """

    def forward(*inputs: Any, **by_name: Any) -> Any:
        raise _Called((inputs, by_name))

    try:
        loss(Standin(model, forward, named=named), batch)
    except _Called as found:
        return found.call
    raise ConfigError(_NEVER)
