"""A model's buffers during a step: which ones forward passes changed, and what they were when the step began."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class StepBuffers:
    """Watches the buffers of a model from step to step.

    A change is seen by the tensor's version counter, except for running statistics of normalisation layers, whose
    kernels do not count: those are taken to change in every forward pass.
    """

    def __init__(self, model: nn.Module):
        self.named = dict(model.named_buffers())
        self._norms = _running_statistics(model)
        self._kept: dict[str, tuple[int, torch.Tensor]] = {}

    def begin(self) -> None:
        """A step begins: keep what the buffers are now. Copies only what may have changed since the last time."""
        for name, buffer in self.named.items():
            if name in self._norms or name not in self._kept or self._kept[name][0] != buffer._version:
                self._kept[name] = (buffer._version, buffer.detach().clone())

    def before(self, name: str) -> torch.Tensor:
        """The buffer when the step began."""
        return self._kept[name][1]

    def versions(self) -> dict[str, int]:
        """To be given to `changed_since`."""
        return {name: buffer._version for name, buffer in self.named.items()}

    def changed_since(self, versions: dict[str, int]) -> list[str]:
        """Names of buffers that something wrote to, in the model's order."""
        return [n for n, b in self.named.items() if n in self._norms or b._version != versions[n]]

    def undo(self, names: Iterable[str] | None = None) -> None:
        """Put buffers (all of them by default) back to what they were when the step began."""
        with torch.no_grad():
            for name in self._kept if names is None else names:
                self.named[name].copy_(self._kept[name][1])

    def set(self, name: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.named[name].copy_(value)


def _running_statistics(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for name, _ in module.named_buffers(recurse=False)
    }
