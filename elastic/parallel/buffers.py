"""A model's buffers during a step: which ones forward passes changed, and what they were when the step began."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from elastic.errors import ConfigError
from elastic.parallel.canonical import CanonicalSum

_MULTIPLIER = 2_654_435_761  # odd, so that moves at two places do not add up to those at two others (Knuth's hash)


class StepBuffers:
    """Watches the buffers of a model from step to step.

    A change is seen by the tensor's version counter, or by another tensor in its place (`self.mean = ...`), except for
    running statistics of normalisation layers, whose kernels do not count: those are taken to change in every forward
    pass in train mode. A buffer that is not saved and has another tensor put in its place is a cache, and left alone.

    Writes through `.data`, and by kernels, move no counter: so values are compared too, in the first step, and from
    then on of buffers for which that found some.

    Args:
        exact: values of saved buffers are compared in every step.
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
        self._norms = _running_statistics(model)
        #: Buffers that passes change, though they are registered with persistent=False.
        self.unsaved: set[str] = set()
        self._hidden: set[str] = set()  # buffers that something writes to without moving their counters
        self._looks = True  # the first step is not over
        self._kept: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """The buffers by name, in the model's order, as they are now."""
        now = {name: getattr(module, key) for name, (module, key) in self._owners.items()}
        return {name: now.get(name, first) for name, first in self._first.items()}

    def begin(self) -> None:
        """A step begins: keep what the buffers are now. Without `exact`, only of those that a counter says moved."""
        for name, buffer in self.named.items():
            kept = self._kept.get(name)
            if (
                self._counts_nothing(name)
                or self._is_compared(name)
                or kept is None
                or kept[0] is not buffer
                or kept[1] != buffer._version
            ):
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
            if self._counts_nothing(name) or buffer is not versions[name][0] or buffer._version != versions[name][1]
            or (self._is_compared(name) and not torch.equal(buffer, self._kept[name][2]) and self._hides(name))
        ]  # fmt: skip

    def _is_compared(self, name: str) -> bool:
        return self._looks or name in self._hidden or (self._exact and name in self._owners)

    def _hides(self, name: str) -> bool:
        self._hidden.add(name)
        return True

    def end(self, touched: Iterable[str]) -> None:
        """The passes of a step are over; on any worker they changed these buffers."""
        self._looks = False
        self.unsaved |= {name for name in touched if name not in self._owners}

    def _counts_nothing(self, name: str) -> bool:
        """Whether passes write to this buffer without moving its counter."""
        module = self._norms.get(name)
        return module is not None and module.training

    def taken(self, versions: dict[str, tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
        """Copies of the buffers that changed since `versions`, by name."""
        return {name: self.named[name].detach().clone() for name in self.changed_since(versions)}

    def mask(self, names: Iterable[str]) -> int:
        """A bit for each of these buffers, for the step's record, which says on every worker what any pass changed."""
        order = list(self._first)
        return sum(1 << order.index(name) for name in names)

    def masked(self, mask: int) -> list[str]:
        """The names that `mask` has a bit for, in the model's order."""
        return [name for i, name in enumerate(self._first) if mask >> i & 1]

    @property
    def words(self) -> int:
        """64-bit words of such a mask."""
        return (len(self._first) + 63) // 64

    def fingerprint(self, after: list[dict[str, torch.Tensor]]) -> torch.Tensor | float:
        """Of how this worker's passes moved the integer buffers: a float64 scalar on their device, equal on two workers
        if the moves are. Nothing here waits for the device.

        Args:
            after: what each pass left in the buffers that it changed; all are alike, or the step is refused.
        """
        found: torch.Tensor | float = 0.0
        for i, (name, value) in enumerate(sorted(after[0].items())):
            before = self.before(name)
            if value.is_floating_point() or value.is_complex() or value.shape != before.shape or not value.numel():
                continue
            move = value.to(torch.int64) - before.to(torch.int64)
            weight = torch.arange(1, move.numel() + 1, device=move.device) * _MULTIPLIER + i
            found = found + (move.reshape(-1) * weight).sum().double()
        return found

    def undo(self, names: Iterable[str] | None = None) -> None:
        """Put buffers (all of them by default) back to what they were when the step began."""
        with torch.no_grad():
            for name in self._kept if names is None else names:
                buffer, _, value = self._kept[name]
                if name in self._owners:
                    setattr(*self._owners[name], buffer)
                buffer.copy_(value)

    @contextmanager
    def begun(self, names: Iterable[str]) -> Iterator[None]:
        """While a backward pass computes its forward pass again: these buffers are what that one began with. They are
        other tensors, since autograd may have kept those that it left."""
        left = {name: getattr(*self._places[name]) for name in names}
        for name in left:
            setattr(*self._places[name], self.before(name).clone())
        try:
            yield
        finally:
            for name, buffer in left.items():
                setattr(*self._places[name], buffer)

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Between steps: whatever is done to buffers inside is undone, also where it fails."""
        self.begin()
        try:
            yield
        finally:
            self.undo()

    def set(self, name: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.named[name].copy_(value)


def check_alike(fingerprints: list[float]) -> None:
    """Compare what `StepBuffers.fingerprint` gave on all workers.

    Raises:
        RuntimeError: an integer buffer has no one value after the step.
    """
    if len(set(fingerprints)) > 1:
        raise RuntimeError(
            "an integer buffer took different values in two microbatches, on two workers, so it has no one value"
        )


def reduce_moves(
    buffers: StepBuffers, touched: list[str], after: list[dict[str, torch.Tensor]], indices: list[int],
    sums: CanonicalSum, count: int,
) -> None:  # fmt: skip
    """Floating buffers move by the mean of their moves in each microbatch, summed in the canonical tree; integer
    buffers must have moved alike.

    Args:
        touched: buffers that any pass of the step changed, on any rank.
        after, indices: what each of this rank's microbatches left in the buffers that it changed, and its index.
        count: microbatches of the step.

    Raises:
        RuntimeError: a buffer has no one value after the step.
    """
    floating = _check_moves(buffers, touched, after)
    for index, changed in zip(indices, after):
        sums.push(index, [_move(buffers, changed, n) for n in floating])
    for n, move in zip(floating, sums.reduce() if floating else []):
        buffers.set(n, buffers.before(n) + move / count)
    _set_whole(buffers, touched, after)


def average_moves(
    buffers: StepBuffers, touched: list[str], after: list[dict[str, torch.Tensor]], counts: list[int], count: int,
    workers: int, group: dist.ProcessGroup | None = None,
) -> None:  # fmt: skip
    """The same for passes over several microbatches: a pass counts as often as it has microbatches, so that the result
    depends on neither the number of passes nor that of workers, but for last digits.

    Args:
        touched: buffers that any pass of the step changed, on any rank.
        after, counts: what each of this rank's passes left in the buffers that it changed, and its microbatches.
        count: microbatches of the step.

    Raises:
        RuntimeError: a buffer has no one value after the step.
    """
    floating = _check_moves(buffers, touched, after)
    for wide in (torch.float32, torch.float64, torch.complex128):
        names = [n for n in floating if _wide(buffers.before(n).dtype) is wide]
        if not names:
            continue
        total: torch.Tensor | None = None
        for changed, passes in zip(after, counts):
            moves = torch.cat([_move(buffers, changed, n).reshape(-1).to(wide) for n in names]) * (passes / count)
            total = moves if total is None else total.add_(moves)
        assert total is not None, "a rank without a pass"
        if workers > 1:
            dist.all_reduce(torch.view_as_real(total) if total.is_complex() else total, group=group)
        for n, move in zip(names, total.split([buffers.before(n).numel() for n in names])):
            buffers.set(n, buffers.before(n).to(wide) + move.view(buffers.before(n).shape))
    _set_whole(buffers, touched, after)


def _check_moves(buffers: StepBuffers, touched: list[str], after: list[dict[str, torch.Tensor]]) -> list[str]:
    """The floating ones of these buffers.

    Raises:
        ConfigError: a buffer changed its shape.
        RuntimeError: an integer buffer took several values.
    """
    for changed in after:
        for n, value in changed.items():
            if value.shape != buffers.before(n).shape:
                raise ConfigError(
                    f"a forward pass gave buffer {n} the shape {tuple(value.shape)}, which was "
                    f"{tuple(buffers.before(n).shape)}, so it would depend on who runs which microbatch; let it grow "
                    "in after_step(), or register it with persistent=False if it is a cache"
                )
        for n in touched:
            before = buffers.before(n)
            if not _is_floating(before) and not torch.equal(changed.get(n, before), after[0].get(n, before)):
                raise RuntimeError(f"buffer {n} took different values in two microbatches, so it has no one value")
    return [n for n in touched if _is_floating(buffers.before(n))]


def _move(buffers: StepBuffers, changed: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    before = buffers.before(name)
    return changed[name] - before if name in changed else torch.zeros_like(before)


def _set_whole(buffers: StepBuffers, touched: list[str], after: list[dict[str, torch.Tensor]]) -> None:
    for n in touched:
        if not _is_floating(before := buffers.before(n)):
            buffers.set(n, after[0].get(n, before))


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums lose no digits of this dtype."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype == torch.float64 else torch.float32


def _running_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layer of each running statistic, by the buffer's name."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for name, _ in module.named_buffers(recurse=False)
    }
