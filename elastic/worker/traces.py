"""Tries the job's code without changing what is trained: restores random numbers, modes, buffers and attributes."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from elastic.compat.torch import is_compiler_loaded, version_of
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.wrapping import local

_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None))
_CONTAINERS = (list, dict, set, deque, Counter, OrderedDict, defaultdict)
_MOST_ENTRIES, _MOST_BYTES = 10_000, 1 << 20  # larger ones hold data; values that change in each pass are small
_OF_MODULES = frozenset(vars(nn.Module()))


class Parameters:
    """Copies of a model's parameters. They take as much memory as gradients will take later."""

    def __init__(self, model: nn.Module):
        here = {name: local(p).detach() for name, p in model.named_parameters()}
        self._kept = {name: (tensor, tensor.clone()) for name, tensor in here.items()}

    def written(self) -> list[str]:
        """The names of parameters whose values have changed."""
        return [name for name, (here, before) in self._kept.items() if not torch.equal(here, before)]

    def put_back(self) -> None:
        for name in self.written():
            here, before = self._kept[name]
            here.copy_(before)


@contextmanager
def without_trace(
    model: nn.Module, *owners: object, training: bool = False, first: bool = True
) -> Iterator[Parameters]:
    """Inside, run forward passes without a graph; afterwards the model and `owners` are as they were.

    Restored are parameters and buffers, and attributes that are plain values, small tensors, or small containers of
    anything. Other changes that a job makes (files, objects of its own) stay.

    Args:
        training: the modules stay in their modes; otherwise they are put into evaluation mode.
        first: restore parameters too. Later it is known whether a job writes to them, and gradients need the memory.
    """
    held = [value for owner in owners for value in _own(owner).values() if isinstance(value, nn.Module)]
    modules = [module for top in (model, *held) for module in top.modules()]
    modes = [(module, module.training) for module in modules]
    undo = [_random(), *(_attributes(o) for o in (*modules, *owners))]
    try:
        with ExitStack() as stack:
            for top in (model, *held):
                stack.enter_context(StepBuffers(top, exact=True).unmoved())
            if is_compiler_loaded():  # code compiled now would be for shapes that no step has
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            parameters = Parameters(model if first else nn.Module())
            stack.callback(parameters.put_back)
            if not training:
                model.eval()
            yield parameters
    finally:
        for back in undo:
            back()
        for module, mode in modes:  # parents come first
            if module.training != mode:
                module.train(mode)


def _random() -> Callable[[], None]:
    own, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def back() -> None:
        random.setstate(own)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)

    return back


def _attributes(owner: object) -> Callable[[], None]:
    """Returns a function that restores attributes, except those that every module has: parameters, buffers, hooks."""
    here = _own(owner)
    names = [n for n in here if isinstance(n, str) and not (isinstance(owner, nn.Module) and n in _OF_MODULES)]
    undo: list[Callable[[], None]] = []
    for name in names:
        value = here[name]
        if isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter) and value.nbytes <= _MOST_BYTES and type(value) is torch.Tensor:
                undo.append(_tensor(value))
        elif type(value) in _CONTAINERS and len(value) <= _MOST_ENTRIES:
            undo.append(_container(value))
    known = frozenset(here)
    kept = {n: here[n] for n in names if isinstance(here[n], (*_PLAIN, *_CONTAINERS, torch.Tensor))}

    def back() -> None:
        for one in undo:
            one()
        for name, value in kept.items():
            if here.get(name, here) is not value:
                here[name] = value
        for name in [n for n in here if isinstance(n, str) and n not in known]:
            del here[name]

    return back


def _own(owner: object) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _tensor(value: torch.Tensor) -> Callable[[], None]:
    version, before = version_of(value), value.detach().clone()

    def back() -> None:
        if version_of(value) != version:
            with torch.no_grad():
                value.copy_(before)

    return back


def _container(value: Any) -> Callable[[], None]:
    before = value.copy()

    def back() -> None:
        if len(value) != len(before) or any(a is not b for a, b in zip(_items(value), _items(before), strict=True)):
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(before)

    return back


def _items(value: Any) -> Iterator[Any]:
    for item in value:
        yield item
        if isinstance(value, dict):
            yield value[item]
