"""The training state of a worker: what is saved, what a peer is given, and the hash of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.checkpoint.format import tensor_bytes
from elastic.errors import CheckpointError
from elastic.job import Job
from elastic.parallel.layout import shard_range
from elastic.parallel.mesh import Mesh
from elastic.parallel.scaling import LossScale
from elastic.parallel.wrapping import local, whole

_PREFIXES = ("module.", "_orig_mod.")


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


def weights_sha256(model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor] | None = None) -> str:
    """sha256 over name, dtype, shape and little-endian bytes of the persistent entries, in name order.

    Args:
        whole: makes a cut tensor whole, together with everyone who holds a part of it.
    """
    digest = hashlib.sha256()
    for name, value in persistent_entries(model).items():
        head = f"{name}\0{str(value.dtype).removeprefix('torch.')}\0{list(value.shape)}\0"
        digest.update(head.encode())
        digest.update(tensor_bytes(whole(value) if whole else value))
    return digest.hexdigest()


@dataclass(frozen=True)
class Piece:
    """A box of a named tensor of the state that this worker holds, as one of `replicas` workers that hold it.

    Args:
        shape: of the whole tensor; the box begins at `offsets` and has the shape of `data`.
        data: live, not a copy.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: torch.Tensor
    replica: int
    replicas: int


class TrainState:
    """Model, optimizer and the job's extra state as named tensors and JSON values.

    Names are `model/<name>`, `optimizer/<parameter name>/<key>` and `extra/<name>`. Of a cut model, parameters, what
    the optimizer keeps of their shape, and extra tensors made from them are cut along dimension 0; all else is whole.

    Args:
        mesh: of a cut model.
        scaler: of a run that scales its loss.
    """

    def __init__(
        self, job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh | None = None,
        scaler: LossScale | None = None,
    ):  # fmt: skip
        self.job, self.model, self.optimizer, self.mesh, self.scaler = job, model, optimizer, mesh, scaler
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
        found = {f"model/{name}": value.detach() for name, value in persistent_entries(self.model).items()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"optimizer/{name}/{key}"] = value
        for name, value in self.job.extra_state().items():
            if isinstance(value, torch.Tensor):
                found[f"extra/{name}"] = value
        return found

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the state, whole; of a cut one everyone of the row asks at one time."""
        return tensor if self.mesh is None else whole(tensor, self.mesh)

    def pieces(self, place: int = 0, places: int = 1) -> list[Piece]:
        """What of the state is on this worker, in an order that is everyone's.

        Args:
            place, places: among those that hold what is not cut.
        """
        found = []
        for name, tensor in self.tensors().items():
            offsets, replica, replicas = [0] * tensor.dim(), place, places
            if isinstance(tensor, DTensor):
                assert self.mesh is not None
                offsets[0] = shard_range(tensor.shape[0], self.mesh.shard, self.mesh.layout.shards).start
                replica, replicas = self.mesh.replica, self.mesh.layout.replicas
            data = local(tensor)
            found.append(Piece(name, tuple(tensor.shape), tuple(offsets), data, replica, replicas))
        return found

    def heads(self) -> list[list[Any]]:
        """Name, dtype, whole shape of each tensor, and whether it is cut: JSON values for those who hold none."""
        return [
            [name, str(t.dtype).removeprefix("torch."), list(t.shape), isinstance(t, DTensor)]
            for name, t in self.tensors().items()
        ]

    def wanted(self, name: str, shape: tuple[int, ...]) -> range | None:
        """The rows of dimension 0 that this worker needs of a saved tensor; None for all of it.

        Raises:
            CheckpointError: it has not the shape of this model's.
        """
        if self.mesh is None:
            return None
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            mine = self._parameters.get(rest.rpartition("/")[0])
            if mine is None or tuple(mine.shape) != shape or not isinstance(mine, DTensor):
                return None
        else:
            found = persistent_entries(self.model).get(rest) if kind == "model" else self.job.extra_state().get(rest)
            if not isinstance(found, DTensor):
                return None
            if tuple(found.shape) != shape:
                raise _unlike(name, found.dtype, shape, found)
        return shard_range(shape[0], self.mesh.shard, self.mesh.layout.shards)

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
            **({"loss_scale": self.scaler.values()} if self.scaler else {}),
        }
        try:
            return json.loads(json.dumps(values))
        except TypeError as error:
            raise ValueError(
                f"optimizer or extra state holds a value that is neither tensor nor JSON: {error}"
            ) from error

    def load(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put a saved state in place: of what is cut, the rows that `wanted` names.

        Raises:
            CheckpointError: names or shapes are not those of this model, optimizer and job.
        """
        if values["optimizer"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"the saved state is of the optimizer {values['optimizer']}, this job's is "
                f"{type(self.optimizer).__name__}; use that one, or start another run"
            )
        mine = persistent_entries(self.model)
        extra = {k: v for k, v in self.job.extra_state().items() if isinstance(v, torch.Tensor)}
        _same_names("model", set(mine), {n.removeprefix("model/") for n in tensors if n.startswith("model/")})
        _same_names("extra state", set(extra), {n.removeprefix("extra/") for n in tensors if n.startswith("extra/")})
        with torch.no_grad():
            for name, value in tensors.items():
                kind, _, rest = name.partition("/")
                if kind == "model":
                    _copy(name, mine[rest], value)
                elif kind == "extra":
                    _copy(name, extra[rest], value)
                else:
                    self._load_optimizer_tensor(rest, value)
        for parameter_name, state in values["states"].items():
            self.optimizer.state[self._parameters[parameter_name]].update(state)
        for group, saved in zip(self.optimizer.param_groups, values["groups"], strict=True):
            for key, value in saved.items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        self.job.load_extra_state(values["extra"])
        if self.scaler is not None and "loss_scale" in values:
            self.scaler.load(values["loss_scale"])

    def _load_optimizer_tensor(self, name: str, value: torch.Tensor) -> None:
        parameter_name, _, key = name.rpartition("/")
        if parameter_name not in self._parameters:
            raise CheckpointError(f"the saved optimizer state is of a parameter {parameter_name!r} that is not here")
        parameter = self._parameters[parameter_name]
        state = self.optimizer.state[parameter]
        # Scalars such as Adam's step stay on the CPU unless the optimizer itself keeps them on the device.
        on_device = value.dim() > 0 or any(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups)
        target = value.to(local(parameter).device if on_device else "cpu")
        cut = isinstance(parameter, DTensor) and value.dim() > 0 and value.shape == local(parameter).shape
        if cut and key not in state:
            state[key] = torch.zeros_like(parameter, dtype=value.dtype)
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
