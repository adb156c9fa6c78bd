"""The training state of a worker: what is saved, what a peer is given, and the hash of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from elastic.checkpoint.format import TensorEntry
from elastic.checkpoint.tensors import DTYPES, Shard, tensor_bytes
from elastic.errors import CheckpointError
from elastic.job import Job

_PREFIXES = ("module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put in front or in between."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def persistent_entries(model: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent state_dict tensors in name order, tied ones once, under their first name."""
    entries: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, value in sorted((plain_name(k), v) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)):
        identity = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and identity in seen:
            continue
        seen.add(identity)
        entries[name] = value
    return entries


def weights_sha256(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and little-endian bytes of the persistent entries, in name order."""
    digest = hashlib.sha256()
    for name, value in persistent_entries(model).items():
        head = f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{list(value.shape)}\0"
        digest.update(head.encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


class TrainState:
    """Model, optimizer and the job's extra state as named tensors and JSON values.

    Names are `model/<name>`, `optimizer/<parameter name>/<key>` and `extra/<name>`.
    """

    def __init__(self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.job, self.model, self.optimizer = job, model, optimizer
        names = {id(p): plain_name(n) for n, p in model.named_parameters(remove_duplicate=False)}
        names.update({id(p): plain_name(n) for n, p in model.named_parameters()})
        self._parameters: dict[str, nn.Parameter] = {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError("optimizer() holds a parameter that is not one of the model's")
                self._parameters[names[id(p)]] = p

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state: live ones, not copies."""
        found = {f"model/{name}": value for name, value in persistent_entries(self.model).items()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"optimizer/{name}/{key}"] = value
        for name, value in self.job.extra_state().items():
            if isinstance(value, torch.Tensor):
                found[f"extra/{name}"] = value
        return found

    def shards(self, rank: int, size: int) -> list[Shard]:
        """The state as what one of `size` workers saves, who all hold it whole."""
        trained = dict(self.model.named_parameters(remove_duplicate=False))
        learning = {plain_name(name): p.requires_grad for name, p in trained.items()}
        found = []
        for name, tensor in self.tensors().items():
            kind, _, rest = name.partition("/")
            parameter = kind == "model" and rest in learning
            found.append(
                Shard.whole(
                    name, tensor, replica=rank, replicas=size, stable=parameter or kind == "optimizer",
                    frozen=parameter and not learning[rest],
                )
            )  # fmt: skip
        return found

    def destinations(self, entries: Mapping[str, TensorEntry], values: dict[str, Any]) -> list[Shard]:
        """Where the tensors of a checkpoint go: live ones; the optimizer's state is made where there is none yet.

        Raises:
            CheckpointError: names are not those of this model, optimizer and job.
        """
        self._check_optimizer(values)
        mine = self._places(set(entries))
        saved: dict[str, set[str]] = {}
        for name in entries:
            if name.startswith("optimizer/"):
                owner, _, key = name.removeprefix("optimizer/").rpartition("/")
                saved.setdefault(owner, set()).add(key)
        for stranger in saved.keys() - self._parameters.keys():
            raise CheckpointError(f"the saved optimizer state is of a parameter {stranger!r} that is not here")
        for owner, parameter in self._parameters.items():
            keys = saved.get(owner, set())
            for key in set(self.optimizer.state.get(parameter, {})) - keys:
                del self.optimizer.state[parameter][key]
            for key in sorted(keys):
                entry, state = entries[f"optimizer/{owner}/{key}"], self.optimizer.state[parameter]
                dtype, device = DTYPES[entry.dtype], self._device_of(parameter, len(entry.shape))
                known = state.get(key)
                if not isinstance(known, torch.Tensor) or (tuple(known.shape), known.dtype) != (entry.shape, dtype):
                    state[key] = torch.empty(entry.shape, dtype=dtype, device=device)
                mine[f"optimizer/{owner}/{key}"] = state[key]
        return [Shard.whole(name, mine[name]) for name in entries]

    def weights(self) -> tuple[list[Shard], dict[str, list[str]]]:
        """The model's tensors by their own names, and further names of those that are tied."""
        mine = persistent_entries(self.model)
        names: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        for name, value in sorted(self.model.state_dict().items()):
            if isinstance(value, torch.Tensor):
                names.setdefault((value.data_ptr(), tuple(value.shape)), []).append(plain_name(name))
        others = {n: names[mine[n].data_ptr(), tuple(mine[n].shape)] for n in mine if mine[n].numel()}
        return [Shard.whole(n, value) for n, value in mine.items()], others

    def weight_destinations(self, entries: Mapping[str, TensorEntry]) -> list[Shard]:
        """Where the tensors of a checkpoint that has weights alone go; all else stays as the job made it.

        Raises:
            CheckpointError: names are not those of this model.
        """
        shards, aliases = self.weights()
        found = []
        for shard in shards:
            names = [f"model/{n}" for n in (shard.name, *aliases.get(shard.name, ()))]
            found.append(replace(shard, name=next((n for n in names if n in entries), names[0])))
        tied = {f"model/{n}" for names in aliases.values() for n in names}
        wanted = {s.name for s in found}
        _same_names("model", wanted, set(entries) - (tied - wanted))
        return found

    def values(self) -> dict[str, Any]:
        """Everything of the state that is not a tensor, as JSON values."""
        states = {
            name: {k: v for k, v in self.optimizer.state.get(p, {}).items() if not isinstance(v, torch.Tensor)}
            for name, p in self._parameters.items()
        }
        groups = [
            {k: _plain(v) for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
            for group in self.optimizer.param_groups
        ]
        extra = {k: v for k, v in self.job.extra_state().items() if not isinstance(v, torch.Tensor)}
        values = {
            "optimizer": type(self.optimizer).__name__,
            "groups": groups,
            "states": {name: state for name, state in states.items() if state},
            "extra": extra,
        }
        try:
            return json.loads(json.dumps(values))
        except TypeError as error:
            raise ValueError(
                f"optimizer or extra state holds a value that is neither tensor nor JSON: {error}"
            ) from error

    def load(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put a saved state in place.

        Raises:
            CheckpointError: names or shapes are not those of this model, optimizer and job.
        """
        self._check_optimizer(values)
        mine = self._places(set(tensors))
        with torch.no_grad():
            for name, value in tensors.items():
                if name in mine:
                    _copy(name, mine[name], value)
                else:
                    self._load_optimizer_tensor(name.removeprefix("optimizer/"), value)
        self.load_values(values)

    def load_values(self, values: dict[str, Any]) -> None:
        """Put in place what is not a tensor, after the tensors."""
        for parameter_name, state in values["states"].items():
            self.optimizer.state[self._parameters[parameter_name]].update(state)
        for group, saved in zip(self.optimizer.param_groups, values["groups"], strict=True):
            for key, value in saved.items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        self.job.load_extra_state(values["extra"])

    def _check_optimizer(self, values: dict[str, Any]) -> None:
        if values["optimizer"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"the saved state is of the optimizer {values['optimizer']}, this job's is "
                f"{type(self.optimizer).__name__}; use that one, or start another run"
            )

    def _places(self, saved: set[str]) -> dict[str, torch.Tensor]:
        """The live tensors of model and job by name, after comparing their names with those saved."""
        mine = {f"model/{name}": value for name, value in persistent_entries(self.model).items()}
        mine |= {f"extra/{k}": v for k, v in self.job.extra_state().items() if isinstance(v, torch.Tensor)}
        for kind, what in (("model/", "model"), ("extra/", "extra state")):
            _same_names(what, *({n.removeprefix(kind) for n in names if n.startswith(kind)} for names in (mine, saved)))
        return mine

    def _device_of(self, parameter: torch.Tensor, dims: int) -> torch.device:
        """Where a tensor of the optimizer lives: scalars such as Adam's step stay on the CPU unless the optimizer
        itself keeps them on the device."""
        fused = any(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups)
        return parameter.device if dims > 0 or fused else torch.device("cpu")

    def _load_optimizer_tensor(self, name: str, value: torch.Tensor) -> None:
        parameter_name, _, key = name.rpartition("/")
        if parameter_name not in self._parameters:
            raise CheckpointError(f"the saved optimizer state is of a parameter {parameter_name!r} that is not here")
        parameter = self._parameters[parameter_name]
        state = self.optimizer.state[parameter]
        target = value.to(self._device_of(parameter, value.dim()))
        if key in state and state[key].shape == target.shape:
            state[key].copy_(target)
        else:
            state[key] = target.clone()


def _same_names(what: str, mine: set[str], saved: set[str]) -> None:
    missing, unexpected = sorted(mine - saved), sorted(saved - mine)
    if missing or unexpected:
        raise CheckpointError(
            f"the saved {what} does not fit: missing {missing[:3] or 'nothing'}, unexpected "
            f"{unexpected[:3] or 'nothing'}; start another run, or use the code that saved it"
        )


def _copy(name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    if target.shape != value.shape or target.dtype != value.dtype:
        raise CheckpointError(
            f"the saved {name} is {value.dtype} {tuple(value.shape)}, this model's is {target.dtype} "
            f"{tuple(target.shape)}; start another run, or use the code that saved it"
        )
    target.copy_(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
