"""The blocks of a model: what is sharded, checkpointed and compiled one by one. Any choice gives the same bits."""

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
#: Where nothing repeats, a module of at most this many bytes is not cut further.
BLOCK_BYTES = 64 << 20
#: Buffers of at most this size are kept for each call that is computed again, whether it writes to them or not.
SMALL_BUFFER_BYTES = 64 << 10
#: Variants of the code of one block: train and eval, with hooks and without, each shape of a batch.
RECOMPILE_LIMIT = 64


def find_blocks(model: nn.Module, classes: Sequence[str] = ()) -> list[nn.Module]:
    """The blocks, outermost first found, in the model's order.

    By class name where `classes` are given. Else what repeats: children of one container that are of one class. Else
    by size: going down from the root, the first modules of at most `BLOCK_BYTES` (and at least a sixteenth of that).
    A found module that shares a parameter with the rest of the model is no block: both must be gathered together.

    Raises:
        ConfigError: a class that the model has no module of, or whose modules share parameters with others.
    """
    if classes:
        return _named(model, classes)
    repeated = [m for m in _outermost(model, _repeats(model)) if not _shares(model, m)]
    if repeated:
        return repeated
    return [m for m in _by_size(model) if not _shares(model, m)]


def _named(model: nn.Module, classes: Sequence[str]) -> list[nn.Module]:
    there = Counter(type(m).__name__ for m in model.modules() if m is not model)
    for name in classes:
        if name not in there:
            raise ConfigError(
                f"--parallel.blocks names {name!r}, but the model has no module of that class; "
                f"it has {', '.join(sorted(there))}"
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
    """The name of a parameter of the block that the rest of the model has too, or that has no rows to shard."""
    inside = {id(m) for m in block.modules()}
    mine = {id(p) for p in block.parameters()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) not in inside:
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(p) in mine:
                    return f"{prefix}.{name}" if prefix else name
    return None


def checkpoint_activations(blocks: Sequence[nn.Module]) -> None:
    """Make each block forget its activations in forward and compute them again in backward, with the buffers that the
    call began with: a block may read what it has written, and be called several times in a pass."""
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
    """The buffers of a block that its calls may write to: small ones, and of large ones those that a call has written
    to, as their version counters say."""

    def __init__(self, block: nn.Module):
        self._block, self._looked = block, False
        self._large: set[str] = set()  # names of large ones that were written to

    def begun(self) -> _Begun:
        """What they are now."""
        found = _Begun()
        for prefix, module in self._block.named_modules():
            for key, buffer in own_buffers(module).items():
                if buffer is not None and not _is_small(buffer):
                    found.versions[module, key] = (f"{prefix}.{key}", buffer, version_of(buffer))
                if buffer is not None and (_is_small(buffer) or not self._looked or f"{prefix}.{key}" in self._large):
                    found.values[module, key] = buffer.detach().clone()
        return found

    def look(self, began: _Begun) -> None:
        """A call that began so is over: forget the large ones that it left alone."""
        for (module, key), (name, buffer, version) in began.versions.items():
            if own_buffers(module).get(key) is not buffer or version_of(buffer) != version:
                self._large.add(name)
            else:
                began.values.pop((module, key), None)
        began.versions, self._looked = {}, True


class _Begun(contextlib.AbstractContextManager[None]):
    """While a call is computed again its buffers are what it began with. They are other tensors, since autograd may
    have kept those that it left."""

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
    """torch.compile each block in place; names in the model stay as they are.

    Compiles afresh: what was compiled before would count.

    Args:
        exact: each shape by itself. After some shapes torch would compile for any shape, and after some models of one
            class stop compiling; such code has other bits. So the latter fails instead.
    """
    torch.compiler.reset()
    if exact:
        limit_recompiles(RECOMPILE_LIMIT)
    for block in blocks:
        block.compile(dynamic=False if exact else None)


def check_compiler() -> None:
    """Refuse what makes compiled code depend on what was fast where it was compiled.

    Raises:
        ConfigError: by name.
    """
    setting = autotuning()
    if setting is not None:
        raise ConfigError(
            f"{setting} is on, which takes the kernels that are fastest where they are tried; with --run.exactness "
            "bitwise turn it off, or leave --parallel.compile out"
        )
