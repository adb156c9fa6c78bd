"""The training state of a worker: what is saved, what a peer is given, and the hash of the weights."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.checkpoint.format import TensorEntry
from elastic.checkpoint.tensors import DTYPES, Shard, tensor_bytes
from elastic.errors import CheckpointError
from elastic.job import Job
from elastic.parallel.layout import shard_range
from elastic.parallel.mesh import Mesh
from elastic.parallel.scaling import LossScale
from elastic.parallel.wrapping import is_cut, local, whole

_PREFIXES = ("module.", "_orig_mod.")
_NOT_SAVED = ("params", "lr", "initial_lr")  # of a parameter group: the schedule sets the rates


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put in front or in between."""
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name


def persistent_entries(model: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent state_dict tensors in name order, tied ones once, under their first name."""
    entries: dict[str, torch.Tensor] = {}
    seen: set[Hashable] = set()
    values = model.state_dict(keep_vars=True)
    for name, value in sorted((plain_name(k), v) for k, v in values.items() if isinstance(v, torch.Tensor)):
        identity = _identity(value)
        if identity in seen:
            continue
        seen.add(identity)
        entries[name] = value
    return entries


def _identity(tensor: torch.Tensor) -> Hashable:
    """Equal for tied tensors. Parameters that are cut go by the object: an empty shard has no address."""
    if isinstance(tensor, DTensor) or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def weights_alone(values: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with these values has weights and nothing else, as an import makes it."""
    return "weights_only" in values


def weights_sha256(model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor] | None = None) -> str:
    """sha256 over name, dtype, shape and little-endian bytes of the persistent entries, in name order.

    Args:
        whole: makes a sharded tensor whole, together with everyone who holds a part of it.
    """
    digest = hashlib.sha256()
    for name, value in persistent_entries(model).items():
        head = f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{list(value.shape)}\0"
        digest.update(head.encode())
        digest.update(tensor_bytes(whole(value) if whole else value))
    return digest.hexdigest()


class TrainState:
    """Model, optimizer and the job's extra state as named tensors and JSON values.

    Names are `model/<name>`, `optimizer/<parameter name>/<key>` and `extra/<name>`. Of a sharded model, parameters,
    what the optimizer keeps of their shape, and extra tensors made from them are cut along dimension 0; all else is
    whole.

    Args:
        mesh: of a sharded model.
        scaler: of a run that scales its loss.
    """

    def __init__(
        self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh | None = None,
        scaler: LossScale | None = None,
    ):  # fmt: skip
        self.job, self.model, self.optimizer, self.mesh, self.scaler = job, model, optimizer, mesh, scaler
        self._extra: Mapping[str, Any] | None = None
        names = {id(p): plain_name(n) for n, p in model.named_parameters(remove_duplicate=False)}
        names.update({id(p): plain_name(n) for n, p in model.named_parameters()})
        self._parameters: dict[str, nn.Parameter] = {}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
            for p in group["params"]:
                if id(p) not in names:
                    raise ValueError("optimizer() holds a parameter that is not one of the model's")
                self._parameters[names[id(p)]] = p

    def hold_extra(self) -> None:
        """From now on the extra state is what it is now: the job is about to begin its own for another state."""
        kept = self._extra_now().items()
        self._extra = {name: v if isinstance(v, torch.Tensor) else copy.deepcopy(v) for name, v in kept}

    def _extra_now(self) -> Mapping[str, Any]:
        return self._extra if self._extra is not None else self.job.extra_state()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state: live ones, not copies. DTensors are those that are cut.

        Raises:
            ConfigError: one lies over the workers in a way that cannot be saved.
        """
        found = {f"model/{name}": value.detach() for name, value in persistent_entries(self.model).items()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"optimizer/{name}/{key}"] = value
        for name, value in self._extra_now().items():
            if isinstance(value, torch.Tensor):
                found[f"extra/{name}"] = value
        return {name: tensor if is_cut(name, tensor) else local(tensor) for name, tensor in found.items()}

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the state, whole; of a sharded one everyone of the row asks at one time."""
        return tensor if self.mesh is None else whole(tensor, self.mesh)

    def heads(self) -> list[list[Any]]:
        """Name, dtype, whole shape of each tensor, and whether it is cut: JSON values for those who hold none."""
        return [
            [name, str(t.dtype).removeprefix("torch."), list(t.shape), isinstance(t, DTensor)]
            for name, t in self.tensors().items()
        ]

    def shards(self, rank: int, size: int) -> list[Shard]:
        """What of the state this worker saves.

        Args:
            rank, size: among those that hold what is not cut.
        """
        trained = dict(self.model.named_parameters(remove_duplicate=False))
        learning = {plain_name(name): p.requires_grad for name, p in trained.items()}
        found = []
        for name, tensor in self.tensors().items():
            kind, _, rest = name.partition("/")
            parameter = kind == "model" and rest in learning
            shard = self._shard(name, tensor, rank, size)
            frozen = parameter and not learning[rest]
            found.append(replace(shard, stable=parameter or kind == "optimizer", frozen=frozen))
        return found

    def _shard(self, name: str, tensor: torch.Tensor, rank: int = 0, size: int = 1) -> Shard:
        """What of a tensor is here."""
        if not isinstance(tensor, DTensor):
            return Shard.whole(name, tensor, replica=rank, replicas=size)
        assert self.mesh is not None
        layout, shape = self.mesh.layout, tuple(tensor.shape)
        offsets = (shard_range(shape[0], self.mesh.shard, layout.shards).start, *(0 for _ in shape[1:]))
        return Shard(name, local(tensor), shape, offsets, self.mesh.replica, layout.replicas)

    def destinations(
        self, entries: Mapping[str, TensorEntry], values: dict[str, Any], *, convert: bool = False
    ) -> list[Shard]:
        """Where the tensors of a checkpoint go: live ones; the optimizer's state is made where there is none yet.

        Of a checkpoint that has weights alone, all else stays as the job made it.

        Args:
            convert: dtypes may be others than were saved; what the optimizer keeps of a parameter is like that then.

        Raises:
            CheckpointError: names are not those of this model, optimizer and job.
        """
        if weights_alone(values):
            return self._weight_destinations(entries)
        self._check_values(values)
        mine = self._places(set(entries))
        saved: dict[str, set[str]] = {}
        for name in entries:
            if name.startswith("optimizer/"):
                owner, _, key = name.removeprefix("optimizer/").rpartition("/")
                saved.setdefault(owner, set()).add(key)
        for owner, keys in saved.items():
            self._check_owner(owner)
            if keys & values["states"].get(owner, {}).keys():
                raise CheckpointError(f"the saved optimizer state of {owner!r} has values in place of tensors")
        for name in entries.keys() - mine.keys():
            if not name.startswith("optimizer/"):
                raise CheckpointError(f"the checkpoint has a tensor {name[:100]!r}, which is part of no training state")
        for owner, parameter in self._parameters.items():
            keys = saved.get(owner, set())
            for key in set(self.optimizer.state.get(parameter, {})) - keys:
                del self.optimizer.state[parameter][key]
            for key in sorted(keys):
                entry, state = entries[f"optimizer/{owner}/{key}"], self.optimizer.state[parameter]
                dtype, known = DTYPES[entry.dtype], state.get(key)
                if convert and dtype.is_floating_point and entry.shape == tuple(parameter.shape):
                    dtype = parameter.dtype
                if not isinstance(known, torch.Tensor) or (tuple(known.shape), known.dtype) != (entry.shape, dtype):
                    state[key] = self._new_state(parameter, tuple(entry.shape), dtype)
                mine[f"optimizer/{owner}/{key}"] = state[key]
        return [self._shard(name, mine[name]) for name in entries]

    def _new_state(self, parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Room for what an optimizer keeps of a parameter: cut like it if of its shape."""
        if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype).detach()
        return torch.empty(shape, dtype=dtype, device=self._device_of(parameter, len(shape)))

    def weights(self) -> tuple[list[Shard], dict[str, list[str]]]:
        """The model's tensors by their own names, and further names of those that are tied."""
        mine = persistent_entries(self.model)
        names: dict[Hashable, list[str]] = {}
        for name, value in sorted(self.model.state_dict(keep_vars=True).items()):
            if isinstance(value, torch.Tensor):
                names.setdefault(_identity(value), []).append(plain_name(name))
        others = {n: names[_identity(value)] for n, value in mine.items()}
        return [self._shard(n, value.detach()) for n, value in mine.items()], others

    def _weight_destinations(self, entries: Mapping[str, TensorEntry]) -> list[Shard]:
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
            {k: _plain(v) for k, v in group.items() if k not in _NOT_SAVED} for group in self.optimizer.param_groups
        ]
        extra = {k: v for k, v in self._extra_now().items() if not isinstance(v, torch.Tensor)}
        values = {
            "optimizer": type(self.optimizer).__name__,
            "groups": groups,
            "states": {name: state for name, state in states.items() if state},
            "extra": extra,
            **({"loss_scale": self.scaler.values()} if self.scaler else {}),
        }
        try:
            return json.loads(json.dumps(values))
        except TypeError as error:
            raise ValueError(
                f"optimizer or extra state holds a value that is neither tensor nor JSON: {error}"
            ) from error

    def load(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put a saved state in place: of what is cut, this worker's rows.

        Raises:
            CheckpointError: names or shapes are not those of this model, optimizer and job.
        """
        self._check_values(values)
        mine = self._places(set(tensors))
        with torch.no_grad():
            for name, value in tensors.items():
                if name in mine:
                    _copy(name, mine[name], value)
                else:
                    self._load_optimizer_tensor(name.removeprefix("optimizer/"), value)
        self.load_values(values)

    def load_values(self, values: dict[str, Any]) -> None:
        """Put in place what is not a tensor, after the tensors, whose `destinations` has checked these values.

        Raises:
            CheckpointError: the job's own `load_extra_state` does not take them.
        """
        if weights_alone(values):
            return
        for parameter_name, state in values["states"].items():
            self.optimizer.state[self._parameters[parameter_name]].update(state)
        for group, saved in zip(self.optimizer.param_groups, values["groups"], strict=True):
            for key, value in saved.items():
                if key not in _NOT_SAVED:
                    group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        try:
            self.job.load_extra_state(values["extra"])
        except Exception as error:  # the job's own code
            raise CheckpointError(
                f"load_extra_state() does not take the saved values: {type(error).__name__}: {error}; use the code "
                "that saved them, or start another run"
            ) from error
        if self.scaler is not None and "loss_scale" in values:
            self.scaler.load(values["loss_scale"])

    def _check_values(self, values: Mapping[str, Any]) -> None:
        """Before anything is changed: refuse values that are none of a training state, or not of this job's."""
        kinds = {"optimizer": str, "groups": list, "states": dict, "extra": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        if wrong:
            raise CheckpointError(f"the checkpoint has no training state: its values lack {', '.join(wrong)}")
        mine, groups = type(self.optimizer).__name__, self.optimizer.param_groups
        if values["optimizer"] != mine:
            raise CheckpointError(
                f"the saved state is of the optimizer {values['optimizer'][:100]}, this job's is {mine}; use that one, "
                "or start another run"
            )
        if len(values["groups"]) != len(groups):
            raise CheckpointError(
                f"the saved optimizer has {len(values['groups'])} parameter groups, this job's has {len(groups)}; use "
                "the code that saved it, or start another run"
            )
        for owner in values["states"]:
            self._check_owner(owner)
        for name, parts in (("groups", values["groups"]), ("states", values["states"].values())):
            if not all(isinstance(part, dict) for part in parts):
                raise CheckpointError(f"the checkpoint has no training state: its {name} are no objects")
        for group, saved in zip(groups, values["groups"]):
            for key in saved.keys() & group.keys():
                if isinstance(group[key], tuple) and not isinstance(saved[key], list):
                    raise CheckpointError(f"the checkpoint has no training state: its {key} is no list")
        scale = values.get("loss_scale", {"factor": 1.0, "good": 0})
        if not isinstance(scale, dict) or any(type(scale.get(k)) not in (int, float) for k in ("factor", "good")):
            raise CheckpointError("the checkpoint has no training state: its loss_scale is none")

    def _check_owner(self, name: str) -> None:
        if name not in self._parameters:
            raise CheckpointError(f"the saved optimizer state is of a parameter {name[:100]!r} that is not here")

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
        return local(parameter).device if dims > 0 or fused else torch.device("cpu")

    def _load_optimizer_tensor(self, name: str, value: torch.Tensor) -> None:
        parameter_name, _, key = name.rpartition("/")
        self._check_owner(parameter_name)
        parameter = self._parameters[parameter_name]
        state = self.optimizer.state[parameter]
        target = value.to(self._device_of(parameter, value.dim()))
        cut = isinstance(parameter, DTensor) and value.dim() > 0 and value.shape == local(parameter).shape
        if cut and key not in state:
            state[key] = self._new_state(parameter, tuple(parameter.shape), value.dtype)
        if key in state and local(state[key]).shape == target.shape:
            local(state[key]).copy_(target)
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
    here = local(target)
    if here.shape != value.shape or here.dtype != value.dtype:
        raise _unlike(name, value.dtype, tuple(value.shape), here)
    here.copy_(value)


def _unlike(name: str, dtype: torch.dtype, shape: tuple[int, ...], target: torch.Tensor) -> CheckpointError:
    return CheckpointError(
        f"the saved {name} is {dtype} {shape}, this model's is {target.dtype} {tuple(target.shape)}; start another "
        "run, or use the code that saved it"
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
