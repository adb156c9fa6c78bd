"""Updates of parameters that are cut over the workers, made on this worker's rows of them as plain tensors.

torch computes an operation on a DTensor as the same operation on the rows, after 20 us in which it asks how the result
lies. Where an update works element by element, what it makes of the rows lies as they do. The bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from elastic.compat.torch import has_step_hooks
from elastic.parallel.optimizers import cannot_update, parts_of
from elastic.parallel.wrapping import local

#: Those of torch whose update of an element depends on that element alone.
_ELEMENTWISE = frozenset(
    (
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    )
)


def update(optimizer: torch.optim.Optimizer, *, cut: bool) -> None:
    """Call `step()` of an optimizer.

    Args:
        cut: the model is cut over the workers.

    Raises:
        ConfigError: torch cannot make this update of a model that is cut, or the optimizer cannot be used at all.
    """
    try:
        with on_rows(optimizer):
            optimizer.step()
    except Exception as error:
        if (refusal := cannot_update(optimizer, error, cut=cut)) is None:
            raise
        raise refusal from error


@contextmanager
def on_rows(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the groups and the state of optimizers that allow it have plain rows in place of DTensors. An optimizer
    of the job's own class, or with a hook of the job's around `step()`, keeps the DTensors."""
    with torch.no_grad(), ExitStack() as undo:
        for part in parts_of(optimizer):
            if _may_have_rows(part):
                undo.callback(_give_rows(part))
        with torch.enable_grad():
            yield


def _may_have_rows(one: torch.optim.Optimizer) -> bool:
    if type(one) not in _ELEMENTWISE or has_step_hooks(one):
        return False
    if any(group.get("fused") or group.get("differentiable") for group in one.param_groups):
        return False
    cut = [p for group in one.param_groups for p in group["params"] if isinstance(p, DTensor)]
    return bool(cut) and all(_is_at_home(p) and (p.grad is None or _lies_as(p.grad, p)) for p in cut)


def _is_at_home(p: DTensor) -> bool:
    """Whether its rows are where its mesh is: `DTensor.from_local` would move the state of offloaded ones there."""
    return local(p).device.type == p.device_mesh.device_type


def _lies_as(a: torch.Tensor, b: DTensor) -> bool:
    return isinstance(a, DTensor) and a.placements == b.placements and a.dtype == b.dtype


def _give_rows(one: torch.optim.Optimizer) -> Callable[[], None]:
    """Returns a function that puts the DTensors back."""
    groups = [(group, group["params"]) for group in one.param_groups]
    rows: dict[torch.Tensor, torch.Tensor] = {}
    for _, parameters in groups:
        for p in parameters:
            rows[p] = _rows_of(p) if isinstance(p, DTensor) else p
    for group, parameters in groups:
        group["params"] = [rows[p] for p in parameters]
    wholes = {row: p for p, row in rows.items()}
    given: dict[torch.Tensor, dict[str, Any]] = {}
    kept = dict(one.state)
    for p, values in kept.items():
        if isinstance(p, DTensor) and p in rows:
            given[rows[p]] = {name: local(v) if isinstance(v, DTensor) else v for name, v in values.items()}
    _replace(one, {rows.get(p, p): given.get(rows.get(p, p), values) for p, values in kept.items()})

    def put_back() -> None:
        for group, parameters in groups:
            group["params"] = parameters
        found: dict[Any, Any] = {}
        for row, values in one.state.items():
            p = wholes.get(row, row)
            if isinstance(p, DTensor):
                was = kept.get(p, {})
                now = {name: _as_cut(v, p, row, was.get(name)) for name, v in values.items()}
                values = was if was and all(now[n] is was.get(n) for n in now) and len(now) == len(was) else now
            found[p] = values
        _replace(one, found)

    return put_back


def _replace(one: torch.optim.Optimizer, state: dict[Any, Any]) -> None:
    """The same mapping with other contents, in their order."""
    one.state.clear()
    one.state.update(state)


def _rows_of(p: DTensor) -> torch.Tensor:
    row = local(p).detach()  # another object than the rows themselves, which are to have no gradient
    row.grad = local(p.grad) if p.grad is not None else None
    return row


def _as_cut(value: Any, p: DTensor, row: torch.Tensor, was: Any) -> Any:
    """What an update left of the state of a parameter's rows, as it lies with a DTensor."""
    if isinstance(was, DTensor) and local(was) is value:
        return was
    if was is not None and not isinstance(was, DTensor):
        return value  # the job's, which happens to have as many elements
    if not isinstance(value, torch.Tensor) or value.shape != row.shape:
        return value  # a count
    return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
