"""The blocks of a model: the modules that are sharded, checkpointed and compiled one by one. Any choice gives the same
bits."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from elastic.compat.torch import autotuning, limit_recompiles, own_buffers, version_of
from elastic.errors import ConfigError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: If nothing repeats, a module of at most this many bytes is not divided further.
BLOCK_BYTES = 64 << 20
#: Buffers of at most this size are kept for each recomputed call, whether it writes to them or not.
SMALL_BUFFER_BYTES = 64 << 10
#: Variants of the code of one block: train and eval, with hooks and without, each shape of a batch.
RECOMPILE_LIMIT = 64


def find_blocks(model: nn.Module, classes: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks of a model, in the model's order; none is inside another.

    With `classes`, the modules of these classes. Otherwise repeated modules: children of one container that have the
    same class. Otherwise by size: going down from the root, the first modules of at most `BLOCK_BYTES` (and at least a
    sixteenth of that). A module that shares a parameter with the rest of the model is no block, since both must be
    gathered together.

    Raises:
        ConfigError: no module has that class, or its modules share parameters with others.
    """
    if classes:
        return _named(model, classes)
    repeated = [m for m in _outermost(model, _repeats(model)) if not _shares(model, m)]
    if repeated:
        return repeated
    return [m for m in _by_size(model) if not _shares(model, m)]


def _named(model: nn.Module, classes: Sequence[str]) -> list[nn.Module]:
    known = Counter(type(m).__name__ for m in model.modules() if m is not model)
    for name in classes:
        if name not in known:
            raise ConfigError(
                f"--parallel.blocks names {name!r}, but the model has no module of that class; "
                f"it has {', '.join(sorted(known))}"
            )
    found = _outermost(model, {m for m in model.modules() if type(m).__name__ in classes and m is not model})
    for module in found:
        shared = _shares(model, module)
        if shared:
            raise ConfigError(
                f"--parallel.blocks names {type(module).__name__!r}, which shares the parameter {shared} with modules "
                "outside; leave it out, or name a class that holds all that share it"
            )
    return found


def _repeats(model: nn.Module) -> set[nn.Module]:
    found = set()
    for container in model.modules():
        if isinstance(container, _CONTAINERS):
            children = [c for c in container.children() if _bytes(c) and any(True for _ in c.children())]
            kinds = Counter(type(c) for c in children)
            found |= {c for c in children if kinds[type(c)] > 1 and not isinstance(c, _CONTAINERS)}
    return found


def _outermost(model: nn.Module, chosen: set[nn.Module]) -> list[nn.Module]:
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if child in chosen:
                if child not in found:
                    found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def _by_size(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            size = _bytes(child)
            if size > BLOCK_BYTES and any(True for _ in child.children()):
                visit(child)
            elif size >= BLOCK_BYTES // 16 and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                found.append(child)
            elif size >= BLOCK_BYTES // 16:
                visit(child)

    if _bytes(model) > BLOCK_BYTES:
        visit(model)
    return found


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _shares(model: nn.Module, block: nn.Module) -> str | None:
    """The name of a parameter that the block shares with the rest of the model; None if there is none."""
    inside = {id(m) for m in block.modules()}
    mine = {id(p) for p in block.parameters()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) not in inside:
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(p) in mine:
                    return f"{prefix}.{name}" if prefix else name
    return None


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Make each block drop its activations in forward and compute them again in backward, starting from the buffers
    with
    which the call began: a block may read what it has written, and may be called several times in a pass."""
    for block in blocks:
        block.forward = partial(_again, _Written(block), block.forward)


def _again(written: _Written, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    began = written.begun()
    result = checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), began), **kwargs
    )
    written.look(began)
    return result


class _Written:
    """The buffers of a block that its calls may write to: all small ones, and those large ones that a call wrote to,
    according to their version counters."""

    def __init__(self, block: nn.Module):
        self._block, self._looked = block, False
        self._large: set[str] = set()  # names of large buffers that were written to

    def begun(self) -> _Begun:
        """Copies of these buffers' present values."""
        found = _Begun()
        for prefix, module in self._block.named_modules():
            for key, buffer in own_buffers(module).items():
                if buffer is not None and not _is_small(buffer):
                    found.versions[module, key] = (f"{prefix}.{key}", buffer, version_of(buffer))
                if buffer is not None and (_is_small(buffer) or not self._looked or f"{prefix}.{key}" in self._large):
                    found.values[module, key] = buffer.detach().clone()
        return found

    def look(self, began: _Begun) -> None:
        """The call that `began` so is over: forget copies of large buffers that it did not write to."""
        for (module, key), (name, buffer, version) in began.versions.items():
            if own_buffers(module).get(key) is not buffer or version_of(buffer) != version:
                self._large.add(name)
            else:
                began.values.pop((module, key), None)
        began.versions, self._looked = {}, True


class _Begun(contextlib.AbstractContextManager[None]):
    """While a call is computed again, its buffers have the values with which it began. They are other tensors, since
    autograd may have saved those that the call left."""

    def __init__(self) -> None:
        self.versions: dict[tuple[nn.Module, str], tuple[str, torch.Tensor, int]] = {}
        self.values: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self._now: dict[tuple[nn.Module, str], torch.Tensor | None] = {}

    def __enter__(self) -> None:
        for (module, key), value in self.values.items():
            self._now[module, key] = own_buffers(module)[key]
            own_buffers(module)[key] = value.clone()

    def __exit__(self, *error: object) -> None:
        for (module, key), buffer in self._now.items():
            own_buffers(module)[key] = buffer
        self._now = {}


def _is_small(buffer: torch.Tensor) -> bool:
    return buffer.numel() * buffer.element_size() <= SMALL_BUFFER_BYTES


def compile_blocks(blocks: Sequence[nn.Module], *, exact: bool) -> None:
    """torch.compile each block in place; module names stay as they are.

    Clears what was compiled before, which would count against the limits.

    Args:
        exact: compile each shape by itself. Otherwise torch compiles code for any shape after it has seen some, and
            stops compiling after some models of one class, and such code has other bits. With `exact` the latter fails.
    """
    torch.compiler.reset()
    if exact:
        limit_recompiles(RECOMPILE_LIMIT)
    for block in blocks:
        block.compile(dynamic=False if exact else None)


def check_compiler() -> None:
    """Refuse compiler settings that make the code depend on measurements.

    Raises:
        ConfigError: with the name of the setting.
    """
    setting = autotuning()
    if setting is not None:
        raise ConfigError(
            f"{setting} is on, which takes the kernels that are fastest where they are tried; with --run.exactness "
            "bitwise turn it off, or leave --parallel.compile out"
        )
