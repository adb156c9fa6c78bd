"""A model's buffers during a step: which ones forward passes changed, and what they were when the step began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import xxhash
from torch import nn

from elastic.errors import ConfigError
from elastic.parallel.canonical import CanonicalSum


class StepBuffers:
    """Watches the buffers of a model from step to step.

    A change is seen by the tensor's version counter, or by another tensor in its place (`self.mean = ...`), except for
    running statistics of normalisation layers, whose kernels do not count: those are taken to change in every forward
    pass. A buffer that is not saved and has another tensor put in its place is a cache, and is left alone.

    Args:
        exact: values are compared too, since writes through `.data`, and by kernels, move no counter.
    """

    def __init__(self, model: nn.Module, *, exact: bool):
        self._exact = exact
        saved = model.state_dict(keep_vars=True).keys()
        self._first = dict(model.named_buffers())
        self._owners = {
            name: (model.get_submodule(path), key)
            for path, _, key, name in ((*name.rpartition("."), name) for name in self._first)
            if name in saved
        }
        self._norms = _running_statistics(model)
        self._kept: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """The buffers by name, in the model's order, as they are now."""
        now = {name: getattr(module, key) for name, (module, key) in self._owners.items()}
        return {name: now.get(name, first) for name, first in self._first.items()}

    def begin(self) -> None:
        """A step begins: keep what the buffers are now. Of those that are not saved, only what a counter says moved."""
        for name, buffer in self.named.items():
            kept = self._kept.get(name)
            if name in self._owners or kept is None or kept[0] is not buffer or kept[1] != buffer._version:
                self._kept[name] = (buffer, buffer._version, buffer.detach().clone())

    def before(self, name: str) -> torch.Tensor:
        """The buffer when the step began."""
        return self._kept[name][2]

    def versions(self) -> dict[str, tuple[torch.Tensor, int]]:
        """To be given to `changed_since`."""
        return {name: (buffer, buffer._version) for name, buffer in self.named.items()}

    def changed_since(self, versions: dict[str, tuple[torch.Tensor, int]]) -> list[str]:
        """Names of buffers that something wrote to or replaced, in the model's order."""
        return [
            name for name, buffer in self.named.items()
            if name in self._norms or buffer is not versions[name][0] or buffer._version != versions[name][1]
            or (self._exact and name in self._owners and not torch.equal(buffer, self._kept[name][2]))
        ]  # fmt: skip

    def digest(self, after: list[dict[str, torch.Tensor]]) -> float:
        """Of the integer buffers that one worker's microbatches moved, and their values: an integer below 2**53.

        Args:
            after: what each microbatch left in the buffers that it changed; they are alike, or the step is refused.
        """
        moved = {
            n: value for n, value in sorted(after[0].items())
            if not value.is_floating_point() and value.shape == self.before(n).shape
        }  # fmt: skip
        if not moved:
            return 0.0
        both = [_joined(list(moved.values())), _joined([self.before(n) for n in moved])]
        now, before = torch.stack(both).cpu().numpy()  # one copy for all of them
        found, at = xxhash.xxh3_64(), 0
        for name, value in moved.items():
            here = slice(at, at := at + value.numel())
            if (now[here] != before[here]).any():
                found.update(name.encode() + b"\0" + now[here].tobytes())
        return float(found.intdigest() >> 11)

    def check_saved(self, names: Iterable[str]) -> None:
        """Refuse buffers that forward passes change and checkpoints do not have: with a lost worker they are lost.

        Raises:
            ConfigError: by name.
        """
        for name in names:
            if name not in self._owners:
                raise ConfigError(
                    f"buffer {name} is changed by forward passes but registered with persistent=False, so it would be "
                    "lost with a worker; register it as persistent, or use --run.exactness fast"
                )

    def undo(self, names: Iterable[str] | None = None) -> None:
        """Put buffers (all of them by default) back to what they were when the step began."""
        with torch.no_grad():
            for name in self._kept if names is None else names:
                buffer, _, value = self._kept[name]
                if name in self._owners:
                    setattr(*self._owners[name], buffer)
                buffer.copy_(value)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Between steps: whatever is done to buffers inside is undone, also where it fails."""
        self.begin()
        try:
            yield
        finally:
            self.undo()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Whatever is done to buffers inside is undone."""
        kept = {name: buffer.detach().clone() for name, buffer in self.named.items()}
        yield
        for name, value in kept.items():
            self.set(name, value)

    def set(self, name: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.named[name].copy_(value)


def check_alike(digests: list[float]) -> None:
    """Compare what `StepBuffers.digest` gave on all workers.

    Raises:
        RuntimeError: an integer buffer has no one value after the step.
    """
    if len(set(digests)) > 1:
        raise RuntimeError(
            "an integer buffer took different values in two microbatches, on two workers, so it has no one value"
        )


def reduce_moves(
    buffers: StepBuffers, touched: list[str], after: list[dict[str, torch.Tensor]], indices: list[int],
    sums: CanonicalSum, count: int,
) -> None:  # fmt: skip
    """Floating buffers move by the mean of their moves in each microbatch; integer buffers must have moved alike.

    Args:
        touched: buffers that any pass of the step changed, on any rank.
        after, indices: what each of this rank's microbatches left in the buffers that it changed, and its index.
        count: microbatches of the step.

    Raises:
        ConfigError: one is not saved.
        RuntimeError: a buffer has no one value after the step.
    """
    buffers.check_saved(touched)
    before = {n: buffers.before(n) for n in touched}
    floating = [n for n in touched if before[n].is_floating_point()]
    whole = [n for n in touched if not before[n].is_floating_point()]
    for index, changed in zip(indices, after):
        for n, value in changed.items():
            if value.shape != before[n].shape:
                raise RuntimeError(
                    f"a forward pass gave buffer {n} the shape {tuple(value.shape)}, which was {tuple(before[n].shape)}"
                )
        for n in whole:
            if not torch.equal(changed.get(n, before[n]), after[0].get(n, before[n])):
                raise RuntimeError(f"buffer {n} took different values in two microbatches, so it has no one value")
        sums.push(index, [changed[n] - before[n] if n in changed else torch.zeros_like(before[n]) for n in floating])
    for n, move in zip(floating, sums.reduce() if floating else []):
        buffers.set(n, before[n] + move / count)
    for n in whole:
        buffers.set(n, after[0].get(n, before[n]))


def _running_statistics(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for name, _ in module.named_buffers(recurse=False)
    }


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1).to(torch.int64) for t in tensors])
