"""Finds objects outside of a model's modules that hold its parameters: FSDP2 replaces these, and they would not see
it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from elastic.compat.torch import flat_weights, own_parameters
from elastic.errors import ConfigError
from elastic.garbage import referrers


def check_references(model: nn.Module, job: object) -> None:
    """Refuse objects that hold a parameter of a model that is to be sharded: they would keep the whole one.

    Raises:
        ConfigError: with the holder and the parameter.
    """
    named = {id(p): name for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    known = {id(own_parameters(m)) for m in model.modules()} | {id(parameters)}
    known |= {id(flat_weights(m)) for m in model.modules() if isinstance(m, nn.RNNBase)}
    # `referrers` does not ask what was made before the process imported torch: a job that came early, and its module.
    early = [getattr(owner, "__dict__", {}) for owner in (job, sys.modules.get(type(job).__module__))]
    values = [*early, *(value for names in early for value in names.values())]
    holders = [value for value in values if any(id(o) in named for o in gc.get_referents(value))]
    holders += referrers(parameters)
    for holder in holders:
        if id(holder) in known or isinstance(holder, FrameType):
            continue
        name = next(named[id(o)] for o in gc.get_referents(holder) if id(o) in named)
        raise ConfigError(
            f"{_called(holder, model, job)} keeps the parameter {name} of the model, which is cut over the workers and "
            "replaced with --parallel.strategy fsdp and hsdp; take it from the model where it is needed (such as "
            "model.get_parameter), or use ddp"
        )


def _called(holder: object, model: nn.Module, job: object) -> str:
    for owner, value in _attributes(model, job):
        if value is holder or (isinstance(value, (list, tuple)) and any(v is holder for v in value)):
            return owner
        if isinstance(value, dict) and any(v is holder for v in value.values()):
            return owner
    return f"a {type(holder).__name__} that model() made"


def _attributes(model: nn.Module, job: object) -> Iterator[tuple[str, Any]]:
    owners = [(f"model.{name}" if name else "model", vars(m)) for name, m in model.named_modules()]
    owners.append(("job", getattr(job, "__dict__", {})))
    for owner, values in owners:
        yield from ((f"{owner}.{key}", value) for key, value in values.items())
    yield from owners
