"""Finds what a job, an optimizer and a model hold besides their known state: tensors, arrays, generators and numbers,
by their place."""

from __future__ import annotations

import itertools
import random
import sys
import types
from collections import ChainMap, UserDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from elastic.compat.torch import OWN_DICTS
from elastic.errors import ConfigError
from elastic.parallel.optimizers import parts_of
from elastic.parallel.wrapping import local

MAX_DEPTH = 8
MAX_THINGS = 50_000
MAX_ITEMS = 2_000  # of one container
SAMPLED = 1 << 16  # elements of a tensor that a digest covers
_CLOSED = sys.stdlib_module_names | {"torch", "numpy", "elastic", "ray", "fsspec", "tensorboardX", "rich"}
_OPEN = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, types.SimpleNamespace)
#: Mappings with values in memory. Other mappings may read values from a file, so they are not searched.
_IN_MEMORY = (dict, UserDict, ChainMap, types.MappingProxyType)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_KNOWN_OF_OPTIMIZERS = ("state", "param_groups", "defaults")

Leaf = torch.Tensor | np.ndarray | int | float | Any


class Attributes:
    """The attributes of an object without its class: a job may be a data set too, and these are not searched."""

    def __init__(self, owner: object):
        self.__dict__.update(getattr(owner, "__dict__", {}))


Attributes.__module__ = "job"  # a module whose objects are searched


def leaves(roots: Mapping[str, Any], skip: Iterable[int], main: object) -> dict[str, Leaf]:
    """Tensors, arrays, generators and numbers that can be reached from `roots` through attributes and containers.

    Args:
        skip: ids of objects that are not searched.
        main: the optimizer whose state is known, as is that of its parts; other optimizers are searched.
    """
    found: dict[str, Leaf] = {}
    seen = set(skip)
    waiting = deque((name, one, 0) for name, one in roots.items())
    while waiting and len(seen) < MAX_THINGS:
        name, one, depth = waiting.popleft()
        if isinstance(one, (int, float)) and type(one) in (int, float):
            found[name] = one
            continue
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (torch.Tensor, np.ndarray, *GENERATORS)):
            found[name] = one
        elif depth < MAX_DEPTH:
            waiting.extend((path, inner, depth + 1) for path, inner in _inside(name, one, main))
    return found


def _inside(name: str, one: Any, main: object) -> Iterator[tuple[str, Any]]:
    if isinstance(one, _IN_MEMORY):
        for i, (k, v) in enumerate(list(itertools.islice(one.items(), MAX_ITEMS))):
            yield (f"{name}[{k!r}]" if isinstance(k, (str, int)) else f"{name}[{i}]"), v
    elif isinstance(one, (list, tuple, set, frozenset, deque)):
        yield from ((f"{name}[{i}]", v) for i, v in zip(range(MAX_ITEMS), one))
    elif is_open(one):
        is_main = isinstance(main, torch.optim.Optimizer) and any(one is part for part in (main, *parts_of(main)))
        known = _KNOWN_OF_OPTIMIZERS if is_main else ()
        for key, value in list(vars(one).items()):
            if key in OWN_DICTS and isinstance(value, dict):
                yield from ((f"{name}.{k}", v) for k, v in value.items())
            elif key not in known and not key.endswith("hooks"):
                yield f"{name}.{key}", value


def is_open(one: Any) -> bool:
    """Whether an object is searched: users' own objects, modules and optimizers, but no data sets and no libraries."""
    if not hasattr(one, "__dict__") or isinstance(one, (type, types.ModuleType)) or callable_only(one):
        return False
    if isinstance(one, _OPEN):
        return True
    if hasattr(one, "__getitem__") and hasattr(one, "__len__"):
        return False
    return type(one).__module__.partition(".")[0] not in _CLOSED


def movable(owners: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """Generators and numbers in some objects, by place: whether it is a generator, and a digest of its state."""
    found = leaves({name: Attributes(one) for name, one in owners.items()}, (), None)
    return {
        name: (isinstance(leaf, GENERATORS), digest(leaf))
        for name, leaf in found.items()
        if isinstance(leaf, (*GENERATORS, int, float))
    }


def models_of(job: object) -> dict[str, nn.Module]:
    """The models in a job's attributes, such as a teacher that its `__init__` made, by their place."""
    found: dict[str, nn.Module] = {}
    for name, value in vars(job).items():
        if isinstance(value, (list, tuple)):
            found.update((f"{name}[{i}]", one) for i, one in enumerate(value) if isinstance(one, nn.Module))
        elif isinstance(value, Mapping):
            found.update((f"{name}[{k!r}]", one) for k, one in value.items() if isinstance(one, nn.Module))
        elif isinstance(value, nn.Module):
            found[name] = value
    return found


def globals_of(job: object) -> list[types.ModuleType]:
    """The modules in which the job's class and its bases are defined, without those of libraries."""
    names = dict.fromkeys(c.__module__ for c in type(job).__mro__ if c.__module__.partition(".")[0] not in _CLOSED)
    return [sys.modules[name] for name in names if name in sys.modules]


def globals_named(job: object) -> dict[str, Any]:
    """Numbers, containers and generators in these modules, by their place."""
    kinds = (int, float, list, dict, set, deque, *GENERATORS)
    return {
        f"{module.__name__}.{name}": value
        for module in globals_of(job)
        for name, value in vars(module).items()
        if isinstance(value, kinds) and not name.startswith("__")
    }


def frozen_of(job: Any) -> dict[str, nn.Module]:
    """What the job's `frozen()` returned, by name: in evaluation mode, and without gradients.

    Raises:
        ConfigError: it is no module, or has no values.
    """
    found = job.frozen()
    if isinstance(found, (list, tuple)):
        found = {str(i): one for i, one in enumerate(found)}
    elif not isinstance(found, Mapping):
        found = {} if found is None else {"": found}
    for name, model in found.items():
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"frozen() returned a {type(model).__name__}, which is no torch.nn.Module; return modules, by name"
            )
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise ConfigError(f"frozen() {name} has tensors on the meta device, which have no values; load them there")
        model.eval().requires_grad_(False)
    return dict(found)


def callable_only(one: Any) -> bool:
    return isinstance(one, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))


def digest(leaf: Leaf) -> str:
    """A text that is equal for equal contents. Of large tensors and arrays it covers a sample."""
    if isinstance(leaf, torch.Tensor):
        here = local(leaf).detach()
        if here.is_meta or here.layout is not torch.strided:
            return f"{here.layout}"
        flat = here.reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        data = flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return f"{leaf.dtype}{tuple(leaf.shape)}{xxhash.xxh3_64_hexdigest(data)}"
    if isinstance(leaf, np.ndarray):
        some = leaf.reshape(-1)[:: max(1, leaf.size // SAMPLED)]
        data = repr(some.tolist()).encode() if leaf.dtype.hasobject else np.ascontiguousarray(some).tobytes()
        return f"{leaf.dtype}{leaf.shape}{xxhash.xxh3_64_hexdigest(data)}"
    if isinstance(leaf, torch.Generator):
        return xxhash.xxh3_64_hexdigest(leaf.get_state().numpy().tobytes())
    if isinstance(leaf, np.random.Generator):
        return repr(leaf.bit_generator.state)
    if isinstance(leaf, np.random.RandomState):
        return repr(leaf.get_state(legacy=False))
    return repr(leaf.getstate()) if isinstance(leaf, random.Random) else repr(leaf)
