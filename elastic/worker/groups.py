"""An optimizer's parameter groups as saved values: what changed while training, and which parameters are in which.

What `optimizer()` made is the job's own: a saved option of a group is restored only if it was changed since, so that a
resumed run that may change an option (`--run.allow-change`) gets the new one. The schedule sets learning rates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from elastic.errors import CheckpointError, ConfigError
from elastic.values import has_tensors, same

PARAMS, RATE = "params", "lr"
Coded = Callable[[Any, str, str], Any]


class Groups:
    """The groups of one optimizer, together with their values when it was made."""

    def __init__(self, optimizer: torch.optim.Optimizer, encode: Coded):
        self._optimizer = optimizer
        self._made = [{k: _copy(v) for k, v in group.items() if k != PARAMS} for group in optimizer.param_groups]
        self._began = [_coded(i, group, encode) for i, group in enumerate(optimizer.param_groups)]

    def parameters(self, names: Mapping[int, str]) -> dict[str, nn.Parameter]:
        """The parameters of all groups by name.

        Args:
            names: of the model's parameters, by id.

        Raises:
            ConfigError: a parameter is not one of the model's.
        """
        found: dict[str, nn.Parameter] = {}
        for i, group in enumerate(self._optimizer.param_groups):
            for p in group[PARAMS]:
                if id(p) not in names:
                    raise ConfigError(
                        f"parameter group {i} of the optimizer holds a parameter of shape {tuple(p.shape)} that is not "
                        "one of the model's; make the optimizer of model.parameters(), and change parameters in place"
                    )
                found[names[id(p)]] = p
        return found

    def values(self, names: Mapping[int, str], encode: Coded, *, rates: bool) -> dict[str, Any]:
        """The values to save: options and parameter names of each group, and the first values of changed options
        (`began`).

        Args:
            rates: whether learning rates are part of the state.
        """
        groups, began = [], []
        for i, group in enumerate(self._optimizer.param_groups):
            now = _coded(i, group if rates else {k: v for k, v in group.items() if k != RATE}, encode)
            if i < len(self._began):
                was = self._began[i]
                began.append({k: was.get(k) for k in now if k not in was or _differ(was[k], now[k])})
            groups.append({**now, PARAMS: [names[id(p)] for p in group[PARAMS]]})
        return {"groups": groups, "began": began}

    def check(self, values: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Check saved values before anything is changed.

        Raises:
            CheckpointError: the saved groups do not fit those of this optimizer.
        """
        saved, began = values["groups"], values.get("began", values["groups"])
        if not isinstance(began, list) or not all(isinstance(part, dict) for part in [*saved, *began]):
            raise CheckpointError("the checkpoint has no training state: its groups are no objects")
        if len(began) != len(self._began) or len(saved) < len(began):
            raise CheckpointError(
                f"the saved optimizer has {min(len(saved), len(began))} parameter groups, this job's has "
                f"{len(self._began)}; use the code that saved it, or start another run"
            )
        if "began" not in values:
            return
        for group in saved:
            names = group.get(PARAMS, [])
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise CheckpointError("the checkpoint has no training state: the parameters of a group are no names")
            for name in names:
                check_owner(name, parameters)

    def load(
        self,
        values: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        decode: Callable[[Any], Any],
        *,
        rates: bool,
    ) -> None:
        """Restore the groups, including groups that were added while training."""
        groups, saved = self._optimizer.param_groups, values["groups"]
        if "began" not in values:
            _load_plain(groups, saved)
            return
        del groups[len(self._made) :]
        for group, made, now, was in zip(groups, self._made, saved, values["began"], strict=False):
            if PARAMS in now:
                group[PARAMS] = [parameters[n] for n in now[PARAMS]]
            for key in [k for k in group if k not in made and k != PARAMS]:
                del group[key]
            for key, value in made.items():
                if key != RATE or rates:
                    group[key] = _copy(value)
            for key in was.keys() & now.keys():
                if key != RATE or rates:
                    group[key] = decode(now[key])
        for more in saved[len(groups) :]:
            options = {k: decode(v) for k, v in more.items() if k != PARAMS}
            self._optimizer.add_param_group({PARAMS: [parameters[n] for n in more.get(PARAMS, [])], **options})


def _coded(index: int, group: Mapping[str, Any], encode: Coded) -> dict[str, Any]:
    where = f"optimizer.param_groups[{index}]"
    wrong = next((k for k in group if type(k) is not str), None)
    if wrong is not None:
        raise ConfigError(f"{where} has the key {wrong!r}, which is no text; give it a name")
    return {k: encode(v, f"groups/{index}/{k}", f"{where}[{k!r}]") for k, v in group.items() if k != PARAMS}


def _load_plain(groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    """Restore groups that an earlier version saved, as plain JSON and without rates."""
    for group, values in zip(groups, saved, strict=True):
        for key, value in values.items():
            if key not in (PARAMS, RATE, "initial_lr"):
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def check_owner(name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    if name not in parameters:
        raise CheckpointError(f"the saved optimizer state is of a parameter {name[:100]!r} that is not here")


def _differ(one: Any, other: Any) -> bool:
    """Whether two coded values may differ: the contents of tensors are not compared."""
    return not same(one, other) or has_tensors(one)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
