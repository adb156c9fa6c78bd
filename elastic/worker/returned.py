"""Checks what `loss()` and `evaluate()` returned, before it is used.

It reads only types, shapes and dtypes of tensors, and values that are on the host already: it never waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from elastic.errors import ConfigError
from elastic.observe.ledger import COLUMNS
from elastic.parallel.records import OWN_WEIGHT

LossValue = tuple[Any, Any, Mapping[str, Any]]

_RETURN = 'return (sum, weight, metrics), for example `return F.cross_entropy(x, y, reduction="sum"), len(y), {}`'


def check_returned(
    name: str, found: Any, device: torch.device, parameters: Iterable[torch.nn.Parameter], *, training: bool
) -> LossValue:
    """The loss, weight and metrics that a function of the job returned, after checking them; with an entry for each
    weight of a metric.

    Args:
        name: of the function, for errors.
        parameters: of the model; read only if the loss has no graph.
        training: the result is for training; a backward pass follows if gradients are enabled.

    Raises:
        ConfigError: with what is wrong, and how to return it.
    """
    if not isinstance(found, tuple) or len(found) != 3:
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else _kind(found)
        raise ConfigError(f"{name} returned {what}; {_RETURN}")
    loss, weight, metrics = found
    _check_loss(name, loss, device, parameters, training=training)
    _check_weight(name, weight, device)
    _check_metrics(name, metrics, device, training=training)
    pairs = any(isinstance(value, tuple) for value in metrics.values())
    return (loss, weight, _with_weights(name, metrics, device)) if pairs else found


def _with_weights(name: str, metrics: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A column for each metric, and one for the weight of each that has its own."""
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        if not isinstance(value, tuple):
            found[key] = value
            continue
        found[key], own = value
        _check_weight(name, own, device, of=f"metric {key!r}")
        found[key + OWN_WEIGHT] = own
    return found


def _check_loss(
    name: str, loss: Any, device: torch.device, parameters: Iterable[torch.nn.Parameter], *, training: bool
) -> None:
    if not (training and torch.is_grad_enabled()) and _is_number(loss):
        return  # it is only added up
    if not isinstance(loss, torch.Tensor):
        fix = "return the tensor itself, without .item(), float() or .numpy()" if _is_number(loss) else _RETURN
        raise ConfigError(f"the loss that {name} returned is {_kind(loss)}, but it must be a tensor; {fix}")
    what = f"the loss that {name} returned"
    if loss.numel() != 1:
        raise ConfigError(
            f"{what} has the shape {tuple(loss.shape)}, but it must be one number, the sum over the batch; give it "
            '.sum(), or make it with reduction="sum"'
        )
    if loss.is_complex():
        raise ConfigError(f"{what} is complex ({loss.dtype}), but only real numbers can be made smaller; give it .real")
    if training and not loss.is_floating_point():
        raise ConfigError(f"{what} is {loss.dtype}, which has no gradients; return a sum of floating-point numbers")
    _check_device(what, loss, device)
    if training and torch.is_grad_enabled() and not loss.requires_grad:
        if any(p.requires_grad for p in parameters):
            raise ConfigError(
                f"{what} has no graph, so no parameter would get a gradient; return it without .detach(), .item() or "
                "torch.no_grad(), and where a batch has nothing to learn from, (outputs * 0).sum() with the weight 0"
            )
        raise ConfigError(
            f"{what} has no graph, since no parameter of the model is trained; give those that are to be trained "
            "requires_grad_()"
        )


def _check_weight(name: str, weight: Any, device: torch.device, of: str = "") -> None:
    what = f"the weight {f'of {of} ' if of else ''}that {name} returned"
    fix = "return the number of samples or tokens that the loss was summed over"
    if isinstance(weight, torch.Tensor):
        if weight.numel() != 1:
            raise ConfigError(f"{what} has the shape {tuple(weight.shape)}, but it must be one number; give it .sum()")
        if weight.is_complex() or weight.dtype == torch.bool:
            raise ConfigError(f"{what} is {weight.dtype}; {fix}")
        if weight.requires_grad:
            raise ConfigError(f"{what} has a graph, but nothing is learned through it; give it .detach()")
        _check_device(what, weight, device)
        if weight.device.type != "cpu":
            return  # it is checked with the record of the step, without waiting for the device
    elif not _is_number(weight):
        raise ConfigError(f"{what} is {_kind(weight)}; {fix}")
    value = float(weight)
    if value < 0:  # a weight that is not finite is found with the loss, and may be skipped
        raise ConfigError(f"{what} is {value:g}; {fix}")


def _check_metrics(name: str, metrics: Any, device: torch.device, *, training: bool) -> None:
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"the metrics that {name} returned are {_kind(metrics)}, but they must be a dict of sums; return {{}} for "
            "none"
        )
    for key, value in metrics.items():
        if isinstance(value, tuple) and len(value) == 2:
            value = value[0]
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name} returned a metric named {key!r}; give each metric a name that is text")
        what = f"metric {key!r} that {name} returned"
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ConfigError(
                    f"{what} has the shape {tuple(value.shape)}, but it must be one number, the sum over the batch; "
                    "give it .sum(), or return a metric for each part"
                )
            if value.is_complex():
                raise ConfigError(f"{what} is complex ({value.dtype}); give it .real or .abs()")
            _check_device(what, value, device)
        elif not _is_number(value):
            raise ConfigError(f"{what} is {_kind(value)}, but it must be one number, the sum over the batch")
        if training and (key in COLUMNS or key.startswith("eval/")):
            raise ConfigError(f"{what} is named like a column that rows have already; give it another name")
        if not training and key == "loss":
            raise ConfigError(f"{what} would be eval/loss, as the held-out loss itself is; give it another name")


def _check_device(what: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device.type == "meta":
        raise ConfigError(f"{what} is on the meta device, so it has no value; some tensor it is made of never got one")
    if value.device.type != "cpu" and value.device != device:
        raise ConfigError(f"{what} is on {value.device}, but this worker's device is {device}; move it with .to()")


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "fiub"
    return isinstance(value, (Real, np.bool_))


def _kind(value: Any) -> str:
    """A value as a text for people: its type, and the value itself if that is short."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, (int, float, complex)):
        return f"the number {value!r}"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")
