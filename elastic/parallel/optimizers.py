"""Several optimizers as one: `optimizer()` may return a list or a dict of them, each with parameters of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from elastic.compat.torch import lacks_sharding
from elastic.errors import ConfigError, one_line


class Together(torch.optim.Optimizer):
    """Looks like one optimizer: all groups, all state, and a step of each, in order.

    Args:
        parts: by name.

    Raises:
        ConfigError: a parameter is in two of them.
    """

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]):
        self.parts = dict(parts)
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]
        owners: dict[int, torch.optim.Optimizer] = {}
        for name, part in self.parts.items():
            for p in (p for group in part.param_groups for p in group["params"]):
                if id(p) in owners:
                    raise ConfigError(
                        f"a parameter of shape {tuple(p.shape)} is in two of the optimizers that optimizer() returned, "
                        f"the second is {name!r} ({type(part).__name__}); give each parameter to one"
                    )
                owners[id(p)] = part
        self.state = _States(list(self.parts.values()), owners)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of each."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of each optimizer."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: always: nobody says to which.
        """
        raise ConfigError("groups cannot be added while training where optimizer() returned several optimizers")

    def check_groups(self) -> None:
        """
        Raises:
            ConfigError: a group was added to one of them, where it would not be saved.
        """
        if sum(len(part.param_groups) for part in self.parts.values()) != len(self.param_groups):
            self.add_param_group({})

    def __repr__(self) -> str:
        return f"Together({self.parts})"


class _States(MutableMapping[Any, dict[str, Any]]):
    """The states of all optimizers as one mapping.

    The state of a parameter is in its own optimizer; any other key is in the optimizer that has it.
    """

    def __init__(self, parts: list[torch.optim.Optimizer], owners: dict[int, torch.optim.Optimizer]):
        self._parts, self._owners = parts, owners

    def _state(self, key: Any) -> dict[Any, Any]:
        owner = self._owners.get(id(key))
        if owner is None:
            owner = next((part for part in self._parts if key in part.state), self._parts[0])
        return owner.state

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return self._state(key)[key]

    def __setitem__(self, key: Any, value: dict[str, Any]) -> None:
        self._state(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._state(key)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._state(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self._state(key).get(key, default)

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            for key in list(part.state):
                if self._state(key) is not part.state:
                    raise ConfigError(
                        f"two of the optimizers that optimizer() returned keep something under {str(key)[:100]!r}, so "
                        "one of them would not be saved; keep it under their parameters"
                    )
                yield key

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


def together(found: Any) -> torch.optim.Optimizer:
    """Return what `optimizer()` returned as one optimizer.

    Raises:
        ConfigError: it is no optimizer, or one that cannot be used.
    """
    if isinstance(found, Mapping):
        parts = {str(name): one for name, one in found.items()}
    elif isinstance(found, (list, tuple)):
        parts = {str(i): one for i, one in enumerate(found)}
    else:
        parts = {"": found}
    if not parts:
        raise ConfigError(f"optimizer() returned an empty {type(found).__name__}; return at least one optimizer")
    for one in parts.values():
        _check(one, several=len(parts) > 1 or found is not one)
    return next(iter(parts.values())) if len(parts) == 1 else Together(parts)


def _check(one: Any, *, several: bool) -> None:
    if not isinstance(one, torch.optim.Optimizer):
        what = "a list or dict with " if several else ""
        scheduler = isinstance(one, (torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))
        way = (
            "return a scheduler from schedule()"
            if scheduler
            else "return one with all parameters, in groups where they differ, or several in a list or dict"
        )
        raise ConfigError(
            f"optimizer() returned {what}a {type(one).__name__}, which is no torch.optim.Optimizer; {way}"
        )
    closure = inspect.signature(one.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(_no_closure(one))


def _no_closure(one: torch.optim.Optimizer) -> str:
    return (
        f"optimizer() returned {kind_of(one)}, whose step() computes the loss again, several times in an update, "
        "through a closure that it must be given; give one that needs none, such as SGD or AdamW"
    )


def parts_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that it is made of: itself, where it is one."""
    return list(optimizer.parts.values()) if isinstance(optimizer, Together) else [optimizer]


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The name of its class; of several, joined by a plus."""
    return "+".join(type(part).__name__ for part in parts_of(optimizer))


def cannot_update(optimizer: torch.optim.Optimizer, error: Exception, *, cut: bool) -> ConfigError | None:
    """The refusal of an optimizer by what its `step()` raised, if that says why.

    Args:
        cut: the model is cut over the workers, so torch may lack an operation for its parameters.
    """
    if "closure" in str(error) or "'NoneType' object is not callable" in str(error):  # its signature leaves it open
        return ConfigError(f"{_no_closure(optimizer)} ({one_line(error)})")
    if cut and lacks_sharding(error):
        return ConfigError(
            f"the optimizer {kind_of(optimizer)} cannot update parameters that are cut over the workers "
            f"({str(error).splitlines()[0]}); leave out fused=True, use one that works element by element, or use "
            "--parallel.strategy ddp"
        )
    return None
