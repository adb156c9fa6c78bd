"""A model's buffers during a step: which ones forward passes changed, and their values when the step began."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from elastic.compat.torch import NormWithStatistics, version_of
from elastic.errors import ConfigError

_MULTIPLIER = 2_654_435_761  # odd, so that moves at two places do not cancel those at two others (Knuth's hash)


class StepBuffers:
    """Watches the buffers of a model from step to step.

    A change shows in the tensor's version counter, or by another tensor in its place (`self.mean = ...`). Kernels of
    running statistics in normalisation layers do not count, so these are assumed to change in every forward pass in
    train mode. An unsaved buffer that another tensor replaces is a cache, and left alone.

    Writes through `.data`, and by kernels, do not change the counter. So values are compared too: of all buffers in the
    first step, and later of those for which that found such a write.

    Args:
        exact: compare the values of saved buffers in every step.
    """

    def __init__(self, model: nn.Module, *, exact: bool):
        self._exact = exact
        saved = model.state_dict(keep_vars=True).keys()
        self._first = dict(model.named_buffers())
        self._places = {
            name: (model.get_submodule(path), key)
            for path, _, key, name in ((*name.rpartition("."), name) for name in self._first)
        }
        self._owners = {name: place for name, place in self._places.items() if name in saved}
        self._norms = running_statistics(model)
        #: Buffers that passes change although they are registered with persistent=False.
        self.unsaved: set[str] = set()
        #: Buffers that were infinite or NaN somewhere when the first step began.
        self.unbounded: set[str] = set()
        self._hidden: set[str] = set()  # buffers that are written to without a change of their counters
        self._looks = True  # whether this is the first step
        self._kept: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._weights: dict[str, torch.Tensor] = {}

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """The present buffers by name, in the model's order."""
        now = {name: getattr(module, key) for name, (module, key) in self._owners.items()}
        return {name: now.get(name, first) for name, first in self._first.items()}

    def begin(self) -> None:
        """A step begins: keep copies of the buffers. Without `exact`, copy only those whose counter has changed."""
        for name, buffer in self.named.items():
            if self._looks and buffer.is_floating_point() and not buffer.isfinite().all():
                self.unbounded.add(name)
            kept = self._kept.get(name)
            if (
                self._counts_nothing(name)
                or self._is_compared(name)
                or kept is None
                or kept[0] is not buffer
                or kept[1] != version_of(buffer)
            ):
                self._kept[name] = (buffer, version_of(buffer), buffer.detach().clone())

    def before(self, name: str) -> torch.Tensor:
        """The buffer when the step began."""
        return self._kept[name][2]

    def versions(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Version counters, for `changed_since`."""
        return {name: (buffer, version_of(buffer)) for name, buffer in self.named.items()}

    def changed_since(self, versions: dict[str, tuple[torch.Tensor, int]]) -> list[str]:
        """Names of buffers that were written to or replaced since `versions`, in the model's order."""
        return [
            name
            for name, buffer in self.named.items()
            if self._counts_nothing(name)
            or buffer is not versions[name][0]
            or version_of(buffer) != versions[name][1]
            or (self._is_compared(name) and not torch.equal(buffer, self._kept[name][2]) and self._hides(name))
        ]

    def _is_compared(self, name: str) -> bool:
        return self._looks or name in self._hidden or (self._exact and name in self._owners)

    def _hides(self, name: str) -> bool:
        self._hidden.add(name)
        return True

    def end(self, touched: Iterable[str]) -> None:
        """The passes of a step are over; `touched`: the buffers that they changed on any worker."""
        self._looks = False
        self.unsaved |= {name for name in touched if name not in self._owners}

    def _counts_nothing(self, name: str) -> bool:
        """Whether passes may write to this buffer without changing its counter."""
        module = self._norms.get(name)
        return module is not None and module.training

    def copies_since(self, versions: dict[str, tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        """Copies of the buffers that changed since `versions`, by name."""
        return {name: self.named[name].detach().clone() for name in self.changed_since(versions)}

    def passed(self, versions: dict[str, tuple[torch.Tensor, int]], changed: Collection[str]) -> None:
        """A pass is over: restore the buffers that its forward pass changed, so that the next one begins with those of
        the step's beginning.

        Args:
            versions: what `versions` returned before the pass.

        Raises:
            ConfigError: its backward pass wrote to others.
        """
        for name, (buffer, version) in versions.items():
            if name not in changed and (
                version_of(buffer) != version
                or (name in self._owners and getattr(*self._owners[name]) is not buffer)
                or (self._is_compared(name) and not torch.equal(buffer, self._kept[name][2]))
            ):
                raise ConfigError(
                    f"buffer {name} is written to in backward passes, but only what forward passes write is averaged "
                    "over the passes of a step; write to it in forward passes, or in after_step(), which sees gradients"
                )
        self.undo(changed)

    def mask(self, names: Iterable[str]) -> int:
        """One bit for each of these buffers. In the step's record it tells every worker which buffers changed
        anywhere."""
        order = list(self._first)
        return sum(1 << order.index(name) for name in names)

    def masked(self, mask: int) -> list[str]:
        """The names of the bits in `mask`, in the model's order."""
        return [name for i, name in enumerate(self._first) if mask >> i & 1]

    @property
    def words(self) -> int:
        """The number of 64-bit words of such a mask."""
        return (len(self._first) + 63) // 64

    def weight(self, name: str) -> torch.Tensor:
        """The weights of a buffer's fingerprint: int64, one for each element, different for each buffer."""
        if name not in self._weights:
            buffer = self.before(name)
            places = torch.arange(1, buffer.numel() + 1, device=buffer.device)
            self._weights[name] = places * _MULTIPLIER + list(self._first).index(name)
        return self._weights[name]

    def undo(self, names: Iterable[str] | None = None) -> None:
        """Restore buffers (by default all) to their values when the step began."""
        with torch.no_grad():
            for name in self._kept if names is None else names:
                buffer, _, value = self._kept[name]
                if name in self._owners:
                    setattr(*self._owners[name], buffer)
                buffer.copy_(value)

    @contextmanager
    def begun(self, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
        """While backward computes a forward pass again, these buffers have the values with which that pass began. They
        are other tensors, since autograd may have saved those that it left; these are what it gives, by name."""
        left = {name: getattr(*self._places[name]) for name in names}
        given = {name: self.before(name).clone() for name in left}
        for name, buffer in given.items():
            setattr(*self._places[name], buffer)
        try:
            yield given
        finally:
            for name, buffer in left.items():
                setattr(*self._places[name], buffer)

    def moved(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inside `begun`, which gave these: copies of the buffers with other values now. A cache is none of them."""
        now = {name: getattr(*self._places[name]) for name in given}
        return {
            name: buffer.detach().clone()
            for name, buffer in now.items()
            if (name in self._owners or buffer is given[name]) and not torch.equal(buffer, self.before(name))
        }

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Between steps: undo all changes of buffers made inside, also if an exception ends it."""
        self.begin()
        try:
            yield
        finally:
            self.undo()

    def set(self, name: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.named[name].copy_(value)


def running_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layer of each running statistic, by the name of the buffer."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        if isinstance(module, NormWithStatistics) and module.track_running_stats
        for name, _ in module.named_buffers(recurse=False)
    }
