"""Finds parameters that passes write to: nothing sums such changes over microbatches, and nothing undoes them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from elastic.compat.torch import version_of
from elastic.compat.torch_sharded import gathered_parameters
from elastic.errors import ConfigError
from elastic.parallel.wrapping import fsdp_modules, local

WRITTEN = (
    "is written to in forward or backward passes, so its values depend on which worker runs which microbatch; "
    "change it in after_step(), or make it a buffer"
)


class Writes:
    """Compares the version counters of parameters around the passes of a step: 40 ns for each parameter.

    Writes through `.data` move them inside `compat.torch.counting_data`.

    Args:
        allowed: names of parameters that passes may write to.
        exact: compare addresses too, which `parameter.data = ...` changes.
    """

    def __init__(self, model: nn.Module, *, allowed: Collection[str] = (), exact: bool = False):
        self._exact, self._cut = exact, fsdp_modules(model)
        named = [(name, p) for name, p in model.named_parameters() if name not in allowed]
        self._names = [name for name, _ in named]
        self._parameters = [local(p).detach() if self._cut else p for _, p in named]  # which shares its counter
        self._gathered: list[tuple[str, torch.Tensor]] = []
        self._before: list[int] = []
        self._addresses: list[int] = []

    def begin(self) -> None:
        """The passes of a step begin."""
        if self._cut and not self._gathered:
            self._gathered = [pair for m in self._cut for pair in gathered_parameters(m)]  # type: ignore[arg-type]
        self._before, self._addresses = self._versions(), self._places()

    def check(self) -> None:
        """The passes are over.

        Raises:
            ConfigError: they have written to a parameter.
        """
        now, places = self._versions(), self._places()
        if now == self._before and places == self._addresses:
            return
        names = [*self._names, *(name for name, _ in self._gathered)]
        name = next((n for n, a, b in zip(names, now, self._before) if a != b), None)
        name = name or next(n for n, a, b in zip(self._names, places, self._addresses) if a != b)
        raise ConfigError(f"parameter {name} {WRITTEN}")

    def _versions(self) -> list[int]:
        return [*map(version_of, self._parameters), *(version_of(p) for _, p in self._gathered)]

    def _places(self) -> list[int]:
        return [p.data_ptr() for p in self._parameters] if self._exact else []
