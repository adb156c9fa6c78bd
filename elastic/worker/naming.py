"""Names of a model's live tensors and modules, without the names of known wrappers; each name occurs once."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from elastic.compat.torch import EXTRA_STATE, WRAPPERS, own_buffers, own_children, own_parameters, unsaved_buffers
from elastic.errors import ConfigError


@dataclass(frozen=True)
class Live:
    """A tensor of a model, and its place: `module` has it as its attribute `leaf`."""

    name: str
    tensor: torch.Tensor
    module: nn.Module
    leaf: str

    @property
    def is_parameter(self) -> bool:
        return self.leaf in own_parameters(self.module)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by all of its names. A wrapper and the module that it wraps have one name."""
    yield from _modules(model, "", ())


def _modules(module: nn.Module, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if id(module) in above:
        return
    inner = _wrapped(module)
    for leaf, child in own_children(module).items():
        if child is not None:
            path = name if leaf == inner else f"{name}.{leaf}" if name else leaf
            yield from _modules(child, path, (*above, id(module)))


def _wrapped(module: nn.Module) -> str | None:
    return next((w for c in type(module).__mro__ if (w := WRAPPERS.get((c.__module__, c.__name__)))), None)


def in_order(model: nn.Module) -> Iterator[Live]:
    """Parameters and persistent buffers in the model's order, by all of their names."""
    for prefix, module in named_modules(model):
        kept = {k: b for k, b in own_buffers(module).items() if k not in unsaved_buffers(module)}
        for leaf, tensor in [*own_parameters(module).items(), *kept.items()]:
            if tensor is not None:
                yield Live(f"{prefix}.{leaf}" if prefix else leaf, tensor, module, leaf)


def live_tensors(model: nn.Module) -> list[Live]:
    """Parameters and persistent buffers in name order, by all of their names.

    Raises:
        ConfigError: two tensors have one name.
    """
    found: dict[str, Live] = {}
    for one in in_order(model):
        if one.name in found and found[one.name].tensor is not one.tensor:
            raise ConfigError(
                f"the model has two tensors of the name {one.name} once wrappers are left out; rename one of them"
            )
        found[one.name] = one
    return [found[name] for name in sorted(found)]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Names of parameters by id; if a parameter has several, the first in the model's order."""
    found: dict[int, str] = {}
    for one in in_order(model):
        if one.is_parameter:
            found.setdefault(id(one.tensor), one.name)
    return found


def persistent_entries(model: nn.Module) -> dict[str, torch.Tensor]:
    """Live tensors in name order; tied ones once, by their first name."""
    entries: dict[str, torch.Tensor] = {}
    seen: set[Hashable] = set()
    for one in live_tensors(model):
        identity = identity_of(one.tensor)
        if identity not in seen:
            seen.add(identity)
            entries[one.name] = one.tensor
    return entries


def identity_of(tensor: torch.Tensor) -> Hashable:
    """A value that is equal for tied tensors. Sharded parameters are identified by object: empty shards have no
    address."""
    if isinstance(tensor, DTensor) or tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def with_state_of_their_own(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that override `get_extra_state`, by their first name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def check_state_dict(model: nn.Module) -> None:
    """Refuse entries that only the model's state dict has: they would not be saved.

    Raises:
        ConfigError: with the entry, and what to do.
    """
    live = live_tensors(model)
    names, identities = {one.name for one in live}, {identity_of(one.tensor) for one in live}
    path = {id(module): name for name, module in named_modules(model)}
    for key, value in model.state_dict(keep_vars=True).items():
        name = _plain(model, key, path)
        known = name in names or key.rpartition(".")[2] == EXTRA_STATE
        if not known and not (isinstance(value, torch.Tensor) and identity_of(value) in identities):
            raise ConfigError(
                f"the model's state_dict() has {name!r} (a {type(value).__name__}), which is neither a parameter nor a "
                "buffer, so it would not be saved; register it as a buffer, or return it from get_extra_state()"
            )


def _plain(model: nn.Module, key: str, path: dict[int, str]) -> str:
    """A key of the state dict without the names of wrappers."""
    module, parts = model, key.split(".")
    for i, part in enumerate(parts):
        children = own_children(module)
        child = children[part] if part in children else None  # noqa: SIM401 - a ScriptModule's has no get
        if child is None:
            return ".".join([p for p in (path[id(module)],) if p] + parts[i:])
        module = child
    return path[id(module)]


def check_same_names(model: nn.Module, made: Collection[str]) -> None:
    """Refuse a model that has other parameters or persistent buffers than it was made with.

    Raises:
        ConfigError: which, and what to do.
    """
    now = persistent_entries(model).keys()
    if more := [name for name in now if name not in made]:
        raise ConfigError(
            f"the model has {more[0]}{_others(more)}, which model() did not make, so a resumed run or a worker that "
            "joins would have no place for it; make it in model(), with its shape, and use it when it is needed"
        )
    if fewer := [name for name in made if name not in now]:
        raise ConfigError(
            f"the model no longer has {fewer[0]}{_others(fewer)}, which model() makes, so the state of a resumed run "
            "or of a worker that joins would be another; keep it, and leave it out of forward()"
        )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if names[1:] else ""


def registrations() -> int:
    """Return how often anything was registered with a module in this process. While it is the same, no model has new
    parts."""
    return _counter()[0]


@cache
def _counter() -> list[int]:
    count = [0]

    def note(module: nn.Module, name: str, value: Any) -> None:
        count[0] += 1

    register_module_parameter_registration_hook(note)
    register_module_buffer_registration_hook(note)
    register_module_module_registration_hook(note)
    return count
