"""Tries the job's code without changing what is trained: restores random numbers, modes, buffers and attributes."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from elastic.compat.torch import counting_data, is_compiled, is_compiler_loaded, version_of
from elastic.compat.torch_sharded import hook_inside
from elastic.errors import ConfigError
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.stage_parameters import Elsewhere
from elastic.parallel.wrapping import fsdp_modules, is_gathered, local
from elastic.parallel.writes import WRITTEN
from elastic.worker.belongings import SAMPLED, digest
from elastic.worker.user_code import UserCode

_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None))
_CONTAINERS = (list, dict, set, deque, Counter, OrderedDict, defaultdict)
_MOST_ENTRIES, _MOST_BYTES = 10_000, 1 << 20  # larger ones hold data; what changes from pass to pass is small
_MOVED = 1.125  # a power of two and an eighth of it: times that nothing of a short number is lost
_OF_MODULES = frozenset(vars(nn.Module()))


class Parameters:
    """Copies of a model's parameters. They take as much memory as gradients will take later."""

    def __init__(self, model: nn.Module):
        self._kept = {name: (p, p.data, local(p).detach().clone()) for name, p in model.named_parameters()}
        self._factor = 1.0
        self._versions: dict[str, int] = {}

    def move(self) -> None:
        """Change what is trained by a little, as an update does: what follows it from pass to pass moves then too."""
        self._factor = _MOVED
        for parameter, _, _ in self._kept.values():
            if self._is_moved(parameter):
                local(parameter).detach().mul_(_MOVED)

    def written(self) -> list[str]:
        """The names of those that are others now than they were, or than `move` has made them."""
        return [
            name
            for name, (parameter, _, before) in self._kept.items()
            if not torch.equal(
                local(parameter).detach(), before * self._factor if self._is_moved(parameter) else before
            )
        ]

    def begin(self) -> None:
        """From here on `touched` counts."""
        self._versions = {name: version_of(p) for name, (p, _, _) in self._kept.items()}

    def touched(self) -> set[str]:
        """The names of those whose counters say that they were written to, perhaps with the values that they had."""
        return {name for name, was in self._versions.items() if version_of(self._kept[name][0]) != was}

    def copies(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The present values of these."""
        return {name: local(self._kept[name][0]).detach().clone() for name in names}

    def others(self, copies: Mapping[str, torch.Tensor]) -> list[str]:
        """The names of those that are others now than these copies, by more than rounding."""
        return [name for name, copy in copies.items() if _differ(local(self._kept[name][0]).detach(), copy)]

    def put_back(self) -> None:
        for parameter, data, before in self._kept.values():
            if local(parameter).data_ptr() != local(data).data_ptr():  # `p.data = ...` was called
                parameter.data = data
            if not torch.equal(here := local(parameter).detach(), before):
                here.copy_(before)
        self._factor = 1.0

    def _is_moved(self, parameter: nn.Parameter) -> bool:
        return self._factor != 1 and parameter.requires_grad and parameter.is_floating_point()


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.is_floating_point() or not one.numel():
        return not torch.equal(one, other)
    apart = (one.float() - other.float()).abs().max()
    return not bool(apart <= 8 * torch.finfo(one.dtype).eps * other.float().abs().max())


class GatheredWrites:
    """Which parameters of a cut model a pass writes to while they are gathered. Such writes are lost."""

    def __init__(self, model: nn.Module):
        self._model = model
        cut = {id(m) for m in fsdp_modules(model) if m is not model}
        self._blocks = [(name, module) for name, module in model.named_modules() if id(module) in cut]
        self._begun: dict[str, dict[str, str]] = {}
        self.names: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """To be entered where what belongs to no block is gathered."""
        if not isinstance(self._model, FSDPModule):
            yield
            return
        with ExitStack() as stack:
            for name, block in self._blocks:
                before, after = self._hooks(name)
                stack.callback(hook_inside(block, before, after))
            self._begin("", self._model)
            yield
            self._end("", self._model)

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        return (lambda module, _: self._begin(name, module)), (lambda module, *_: self._end(name, module))

    def _begin(self, name: str, module: nn.Module) -> None:
        self._begun[name] = _digests(name, module)

    def _end(self, name: str, module: nn.Module) -> None:
        before, now = self._begun.pop(name, {}), _digests(name, module)
        self.names |= {key for key, was in before.items() if now.get(key, was) != was}


class LateWrites:
    """Looks by value whether the passes of a step write to parameters, which version counters may not show.

    Args:
        allowed: names of parameters that passes may write to.
    """

    def __init__(self, model: nn.Module, allowed: Collection[str]):
        self._gathered = GatheredWrites(model)
        self._kept = {name: local(p) for name, p in model.named_parameters() if name not in allowed}
        self._before = {name: digest(p) for name, p in self._kept.items()}
        self._model = model

    def watching(self) -> AbstractContextManager[None]:
        """To be entered right around the job's loss."""
        return self._gathered.watching()

    def check(self) -> None:
        """The passes are over.

        Raises:
            ConfigError: they have written to parameters.
        """
        named = {name: local(p) for name, p in self._model.named_parameters() if name in self._before}
        found = {name for name, p in named.items() if digest(p) != self._before[name]} | self._gathered.names
        if found:
            raise ConfigError(f"parameter {min(found)} {WRITTEN}")


@contextmanager
def watching_for_writes(model: nn.Module, allowed: Collection[str], code: UserCode) -> Iterator[None]:
    """Inside are the passes of a step, whose writes to parameters are looked for by value: such as go through `.data`
    may begin long after the trials. It costs a digest of every parameter, so few steps are watched.

    Raises:
        ConfigError: as `LateWrites.check` does.
    """
    with counting_writes(model, allowed, code):
        if any(map(is_compiled, model.modules())):
            yield
            return
        late = LateWrites(model, allowed)
        code.watching = late.watching
        try:
            yield
        finally:
            code.watching = nullcontext
        late.check()


def counting_writes(model: nn.Module, allowed: Collection[str], code: UserCode) -> AbstractContextManager[None]:
    """In place of `watching_for_writes`, in most steps: `parallel.writes.Writes` sees writes through `.data` too."""
    return counting_data({id(p) for name, p in model.named_parameters() if name in allowed} if allowed else ())


def _digests(name: str, module: nn.Module) -> dict[str, str]:
    """Return digests of the tensors of a module that are gathered now, and have values here.

    FSDP2 must be able to resize them, and a tensor that numpy has seen cannot be resized.
    """
    named = module.named_parameters(prefix=name)
    gathered = {key: local(p).detach() for key, p in named if is_gathered(p) and not isinstance(p, Elsewhere)}
    return {
        key: f"{version_of(p)} {digest(p.reshape(-1)[:: max(1, p.numel() // SAMPLED)].clone())}"
        for key, p in gathered.items()
    }


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
    names = [
        n
        for n in here
        if isinstance(n, str) and not n.startswith("__") and not (isinstance(owner, nn.Module) and n in _OF_MODULES)
    ]
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
        for name in [n for n in here if isinstance(n, str) and n not in known and not n.startswith("__")]:
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
