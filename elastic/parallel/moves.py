"""Combines what the passes of a step did to buffers into one value for each buffer, equal on every worker.

A floating buffer moves by the mean of its moves in all microbatches. An integer buffer must have moved equally in all
passes that moved it; passes that did not touch it (a BatchNorm in a branch that is taken rarely) do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from elastic.compat.torch_groups import all_gather_flat
from elastic.errors import ConfigError
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.canonical import CanonicalSum

After = list[dict[str, torch.Tensor]]  # for each pass of a worker, the buffers that it changed, as it left them


def fingerprint(buffers: StepBuffers, after: After) -> torch.Tensor | float:
    """A hash of how this worker's passes moved integer buffers: a float64 scalar on their device, equal on two workers
    if their moves are. Does not wait for the device."""
    changed = {name: value for one in after for name, value in one.items()}
    names = [n for n in sorted(changed) if not _is_floating(changed[n]) and changed[n].numel()]
    if any(one[n].shape != buffers.before(n).shape for one in after for n in names if n in one):
        return 0.0  # `reduce_moves` and `average_moves` refuse this
    if not names:
        return 0.0
    weights = torch.cat([buffers.weight(name) for name in names])
    return (_whole_moves(buffers, names, after) * weights).sum().double()


def reduce_moves(
    buffers: StepBuffers,
    touched: list[str],
    after: After,
    indices: list[int],
    sums: CanonicalSum,
    count: int,
    fingerprints: Sequence[float],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Combine the moves of all microbatches; floating ones are summed in the canonical tree.

    Args:
        touched: buffers that any pass of the step changed, on any rank.
        after, indices: for each microbatch of this rank, the buffers that it changed, and its index.
        count: the number of microbatches of the step.
        fingerprints: the fingerprint of every rank.

    Raises:
        RuntimeError: an integer buffer would have several values after the step.
    """
    floating, whole = _sorted(buffers, touched, after)
    for index, changed in zip(indices, after):
        sums.push(index, [_move(buffers, changed, n) for n in floating])
    for n, move in zip(floating, sums.reduce() if floating else []):
        buffers.set(n, _start(buffers, n) + move / count)
    _set_whole(buffers, whole, after, fingerprints, group)


def average_moves(
    buffers: StepBuffers,
    touched: list[str],
    after: After,
    counts: list[int],
    count: int,
    fingerprints: Sequence[float],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Combine the moves of passes over several microbatches: a pass counts as often as it has microbatches, so that the
    result depends on neither the number of passes nor that of workers, except for last digits.

    Args:
        touched: buffers that any pass of the step changed, on any rank.
        after, counts: for each pass of this rank, the buffers that it changed, and the number of its microbatches.
        count: the number of microbatches of the step.
        fingerprints: the fingerprint of every rank.

    Raises:
        RuntimeError: an integer buffer would have several values after the step.
    """
    floating, whole = _sorted(buffers, touched, after)
    for wide in (torch.float32, torch.float64, torch.complex128):
        names = [n for n in floating if _wide(buffers.before(n).dtype) is wide]
        if not names:
            continue
        total: torch.Tensor | None = None
        for changed, passes in zip(after, counts):
            moves = torch.cat([_move(buffers, changed, n).reshape(-1).to(wide) for n in names]) * (passes / count)
            total = moves if total is None else total.add_(moves)
        assert total is not None, "a rank without a pass"
        if len(fingerprints) > 1:
            dist.all_reduce(torch.view_as_real(total) if total.is_complex() else total, group=group)
        for n, move in zip(names, total.split([buffers.before(n).numel() for n in names])):
            buffers.set(n, _start(buffers, n).to(wide) + move.view(buffers.before(n).shape))
    _set_whole(buffers, whole, after, fingerprints, group)


def _sorted(buffers: StepBuffers, touched: list[str], after: After) -> tuple[list[str], list[str]]:
    """Divide these buffers into floating ones and others.

    Raises:
        ConfigError: a pass changed the shape of a buffer.
    """
    for changed in after:
        for n, value in changed.items():
            if value.shape != buffers.before(n).shape:
                raise ConfigError(
                    f"a forward pass gave buffer {n} the shape {tuple(value.shape)}, which was "
                    f"{tuple(buffers.before(n).shape)}, so it would depend on which worker runs which microbatch; let "
                    "it grow in after_step(), or register it with persistent=False if it is a cache"
                )
    floating = [n for n in touched if _is_floating(buffers.before(n))]
    return floating, [n for n in touched if n not in floating]


def _move(buffers: StepBuffers, changed: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    before = buffers.before(name)
    if name in buffers.unbounded:
        return changed.get(name, before) - _start(buffers, name)
    return changed[name] - before if name in changed else torch.zeros_like(before)


def _start(buffers: StepBuffers, name: str) -> torch.Tensor:
    """From where a buffer moves: from 0 where it is infinite or NaN, as ranges are before the first batch."""
    before = buffers.before(name)
    return before.where(before.isfinite(), before.new_zeros(())) if name in buffers.unbounded else before


def _whole_moves(buffers: StepBuffers, names: Sequence[str], after: After) -> torch.Tensor:
    """The move of each element of integer buffers, concatenated (int64): that of the passes that moved it."""
    before = _joined([buffers.before(n) for n in names])
    rows = [_joined([changed.get(n, buffers.before(n)) for n in names]) - before for changed in after]
    if len(rows) == 1:
        return rows[0]
    moves = torch.stack(rows)
    high, low = moves.amax(0), moves.amin(0)
    return torch.where(high.abs() >= low.abs(), high, low)


def _set_whole(
    buffers: StepBuffers, names: list[str], after: After, fingerprints: Sequence[float], group: dist.ProcessGroup | None
) -> None:
    """Give integer buffers their value after the step.

    Raises:
        RuntimeError: passes moved a buffer in different ways.
    """
    if not names:
        return
    values = [[changed[n] for changed in after if n in changed] for n in names]
    for n, mine in zip(names, values):
        before = buffers.before(n)
        _check_one(n, [value for value in mine if not torch.equal(value, before)])
    moves = _whole_moves(buffers, names, after)
    sizes = [buffers.before(n).numel() for n in names]
    if len(set(fingerprints)) > 1:  # all ranks see this, so all of them take part in the gather
        everyone = moves.new_empty(len(fingerprints) * len(moves))
        all_gather_flat(everyone, moves, group=group)
        rows = [row.split(sizes) for row in everyone.view(len(fingerprints), -1)]
        for i, n in enumerate(names):
            _check_one(n, [row[i] for row in rows if row[i].any()])
        moves = torch.cat([next((row[i] for row in rows if row[i].any()), rows[0][i]) for i in range(len(names))])
    for n, move in zip(names, moves.split(sizes)):
        before = buffers.before(n)
        buffers.set(n, before.to(torch.int64) + move.view(before.shape))


def _check_one(name: str, values: list[torch.Tensor]) -> None:
    if any(not torch.equal(value, values[0]) for value in values[1:]):
        raise RuntimeError(f"buffer {name} took different values in two microbatches, so it has no one value")


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1).to(torch.int64) for t in tensors])


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of this dtype lose no digits."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype == torch.float64 else torch.float32
