"""The contents of a worker's training state: named tensors, and values in JSON. `state` restores it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.checkpoint.tensors import Shard, dtype_name
from elastic.compat.torch import EXTRA_STATE, own_buffers
from elastic.config import OptimOptions
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.job_options import job_classes
from elastic.parallel.mesh import Mesh
from elastic.parallel.optimizers import kind_of, parts_of, together
from elastic.parallel.scaling import LossScale
from elastic.parallel.wrapping import cut_of, local, reshard, whole
from elastic.placement import Part, TensorSpec, cut_box
from elastic.values import Classes, ValueRefused, classes, encode, part_of
from elastic.worker.attributes import JobAttributes
from elastic.worker.following import Patience
from elastic.worker.groups import Groups
from elastic.worker.naming import (
    check_same_names,
    check_state_dict,
    live_tensors,
    named_modules,
    parameter_names,
    persistent_entries,
    registrations,
    with_state_of_their_own,
)
from elastic.worker.rates import Rates

EARLY_STOP = "early stopping"
CODED = 1  # format of the values: coded by `elastic.values`; earlier ones are plain JSON
Head = tuple[tuple[int, ...], torch.dtype]  # whole shape, dtype


def head_of(tensor: torch.Tensor) -> Head:
    return tuple(tensor.shape), tensor.dtype


@dataclass
class Collected:
    """The state at one moment: named tensors, live ones, and coded values."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.tensors:
            raise ConfigError(f"two tensors of the state would be saved as {name!r}; rename one of them")
        self.tensors[name] = tensor


class Keeping:
    """Model, optimizer and the job's extra state as named tensors and JSON values.

    Names are `model/<name>`, `optimizer/<parameter name>/<key>` and `extra/<name>`; for tensors nested in the state of
    optimizer, job or modules, keys and indices follow. Of a sharded model, parameters, the optimizer's tensors of their
    shape, and extra tensors made from parameters are sharded along dimension 0; everything else is whole.

    Args:
        optimizer: what the job's `optimizer()` returned.
        mesh: of a sharded model.
        scaler: the loss scale, if the run has one.
        optim: options that set learning rates.
        patience: decides after evaluations whether training ends, if anything does.
        sources: digests of parameters that are not part of the state, since `model()` gives them their values.
        attributes: what the job changes of itself, the model and its data.

    Raises:
        ConfigError: part of the state cannot be saved, or is not part of the model.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: Any,
        mesh: Mesh | None = None,
        scaler: LossScale | None = None,
        optim: OptimOptions | None = None,
        patience: Patience | None = None,
        sources: Mapping[str, str] = MappingProxyType({}),
        attributes: JobAttributes | None = None,
    ):
        self.optimizer = optimizer = together(optimizer)
        self.job, self.model, self.mesh, self.scaler = job, model, mesh, scaler
        self._held: Collected | None = None
        self._unsaved: set[str] = set()
        self._named = list(model.named_parameters())
        self._arrived: dict[str, torch.Tensor] = {}  # tensors that values refer to, of a state that is being loaded
        check_state_dict(model)
        self._made, self._registered = tuple(persistent_entries(model)), registrations()
        self.rates, self.patience = Rates(job, optimizer, optim), patience
        if attributes is not None:
            attributes.watch(model)
        self.sources, self.attributes = dict(sources), attributes
        first, again = job.extra_state(), job.extra_state()
        #: Tensors of the job that exist from the start: these are restored in place.
        self._in_place = {
            name
            for name, value in first.items()
            if isinstance(name, str) and isinstance(value, torch.Tensor) and _is_live(value, again.get(name))
        }
        self._known = self._known_classes(first)
        self._shapes = {f"model/{one.name}": head_of(one.tensor) for one in live_tensors(model) if not one.is_parameter}
        self._shapes |= {f"extra/{k}": head_of(first[k]) for k in self._in_place}
        nested = Collected()
        self._collect_extra(nested)
        #: Tensors of the job that exist from the start, nested ones included.
        self.began_with = frozenset(nested.tensors)
        self._groups = Groups(optimizer, partial(self._encode, Collected()))
        self._groups.parameters(parameter_names(model))

    def _known_classes(self, extra: Mapping[str, Any]) -> Classes:
        """Classes of which values may be rebuilt: the job's, and those in modules that define its optimizer and
        layers."""
        owners: set[type] = {type(m) for m in with_state_of_their_own(self.model).values()}
        owners |= {type(part) for part in parts_of(self.optimizer)}
        places = [sys.modules.get(c.__module__) for c in owners if not c.__module__.startswith("torch.")]
        near = [v for place in places if place is not None for v in vars(place).values() if isinstance(v, type)]
        return {**classes(dict(extra), *near), **job_classes(type(self.job))}

    # ---- what is trained -------------------------------------------------------------------------------------------

    def _entries(self) -> dict[str, torch.Tensor]:
        """The model's tensors that are saved, by name.

        Raises:
            ConfigError: one that is said to come from elsewhere is trained.
        """
        found = persistent_entries(self.model)
        for name in self.sources:
            if (one := found.pop(name, None)) is not None and one.requires_grad:
                raise ConfigError(
                    f"has_source() says that {name} need not be saved, but it is trained; leave it frozen, or let "
                    "has_source() return False for it"
                )
        return found

    def trained(self) -> tuple[bool, ...]:
        """For each parameter of the model, in order, whether it is trained now."""
        return tuple(p.requires_grad for _, p in self._named)

    @property
    def gradient_bytes(self) -> int:
        """The bytes of the gradients of the whole model."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def trained_by_name(self) -> dict[str, bool]:
        """For each parameter of the model, by name, whether it is trained now."""
        return {name: p.requires_grad for name, p in self._named}

    def check_parts(self) -> None:
        """After an update: refuse a model that has got or lost parameters or buffers, which no checkpoint could give
        back to what model() makes.

        Raises:
            ConfigError: which.
        """
        if (now := registrations()) != self._registered:
            check_same_names(self.model, self._made)
            self._registered = now

    def parameter_names(self) -> dict[int, str]:
        """The names of the model's parameters, by their id."""
        return parameter_names(self.model)

    # ---- what it consists of ---------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by all of their names."""
        return {one.name: one.tensor for one in live_tensors(self.model) if isinstance(one.tensor, nn.Parameter)}

    def keep_buffers(self, names: Iterable[str]) -> None:
        """From now on these buffers are part of the state, although they are registered with persistent=False."""
        self._unsaved.update(names)

    def _buffers(self) -> dict[str, tuple[nn.Module, str]]:
        """The place of each buffer of the model, by the first of its names."""
        found: dict[str, tuple[nn.Module, str]] = {}
        for name, module in self.model.named_modules():
            found |= {f"{name}.{leaf}" if name else leaf: (module, leaf) for leaf in own_buffers(module).keys()}  # noqa: SIM118 - a ScriptModule's are no dict
        return found

    def hold_extra(self) -> None:
        """Keep the job's present extra state, and what it has changed, as that to save: the job is about to begin
        those of another state.

        If that other state is never completed, the job has only the beginning of it, and the kept one stays.
        """
        if self._held is not None:
            return
        self._held = held = Collected()
        self._collect_attributes(held)
        self._collect_extra(held)
        self._collect_schedulers(held)

    def _encode(self, found: Collected, value: Any, name: str, where: str) -> Any:
        """A value as it is saved; tensors in it are added to `found`, with names that begin with `name`.

        Raises:
            ConfigError: part of it cannot be saved.
        """

        def tensor(one: torch.Tensor, place: str) -> Any:
            full = f"{name}/{place}" if place else name
            found.add(full, one)
            return {"name": full, "cpu": local(one).device.type == "cpu"}

        try:
            return encode(value, where, tensor=tensor, known=self._known)
        except ValueRefused as error:
            raise ConfigError(f"the training state cannot be saved: {error}") from error

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All tensors of the state (live ones, not copies; DTensors are sharded), and everything else as JSON values.

        Raises:
            ConfigError: part of it cannot be saved.
        """
        reshard(self.model)  # a forward pass that failed leaves parameters gathered
        found = Collected()
        for name, value in self._entries().items():
            found.add(f"model/{name}", value.detach())
        found.values = {"coded": CODED, "optimizer": kind_of(self.optimizer)}
        if self.sources:
            found.values["sources"] = dict(sorted(self.sources.items()))
        self._collect_optimizer(found)
        self._collect_model(found)
        if self._held is not None:
            for name, tensor in self._held.tensors.items():
                found.add(name, tensor)
            found.values.update(self._held.values)
        else:
            self._collect_attributes(found)
            self._collect_extra(found)
            self._collect_schedulers(found)
        found.values["changed"] = self._changed(found)
        if self.scaler:
            found.values["loss_scale"] = self.scaler.values()
        # In name order: workers may hold the optimizer's tensors in different orders, depending on how they got them.
        tensors = {n: t if cut_of(n, t) else local(t) for n, t in sorted(found.tensors.items())}
        return tensors, found.values

    def _collect_optimizer(self, found: Collected) -> None:
        names = parameter_names(self.model)
        self._groups.parameters(names)
        states: dict[str, Any] = {}
        others: dict[Any, Any] = {}
        for owner, state in self.optimizer.state.items():
            name = names.get(id(owner))
            if name is None:
                others[owner] = state
                continue
            rest = {}
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and part_of(key, 0) == key:
                    found.add(f"optimizer/{name}/{key}", value)
                else:
                    rest[key] = value
            if rest:
                states[name] = self._encode(found, rest, f"optimizer/{name}", f"optimizer.state[{name!r}]")
        wrong = next((k for k in others if isinstance(k, torch.Tensor)), None)
        if wrong is not None:
            raise ConfigError(
                f"optimizer.state holds something of a tensor of shape {tuple(wrong.shape)} that is no parameter of "
                "the model, so it cannot be saved; keep it under the model's own parameters"
            )
        found.values["states"] = states
        found.values["state"] = self._encode(found, others, "optimizer_state", "optimizer.state")
        found.values |= self._groups.values(names, partial(self._encode, found), rates=self.rates.followed)

    def _collect_model(self, found: Collected) -> None:
        found.values["modules"] = {
            name: self._encode(
                found,
                module.get_extra_state(),
                f"modules/{name}.{EXTRA_STATE}" if name else f"modules/{EXTRA_STATE}",
                f"get_extra_state() of {name or 'the model'}",
            )
            for name, module in with_state_of_their_own(self.model).items()
        }
        if self._unsaved:
            buffers = {name: getattr(*place) for name, place in self._buffers().items() if name in self._unsaved}
            found.values["buffers"] = self._encode(found, buffers, "buffers", "the buffers with persistent=False")
        found.values["eval"] = [name for name, module in named_modules(self.model) if not module.training]
        found.values["frozen"] = [n for n, p in self.parameters().items() if not p.requires_grad]

    def _collect_attributes(self, found: Collected) -> None:
        if self.attributes is not None and (changed := self.attributes.values()):
            found.values["attributes"] = self._encode(found, changed, "attributes", "what the job changed")

    def _collect_extra(self, found: Collected) -> None:
        rest = {}
        for name, value in self.job.extra_state().items():
            if name in self._in_place and isinstance(value, torch.Tensor):
                found.add(f"extra/{name}", value)
            else:
                rest[name] = value
        if rest and type(self.job).load_extra_state is Job.load_extra_state:
            name = next(iter(rest))
            raise ConfigError(
                f"extra_state() returns {name!r}, which is given back through load_extra_state(values), and the job "
                "has none; define it, or leave that out"
            )
        found.values["extra"] = self._encode(found, rest, "extra", "extra_state()")

    def _collect_schedulers(self, found: Collected) -> None:
        found.values["schedulers"] = {
            name: self._encode(found, one.state_dict(), f"schedulers/{part_of(name, 0)}", f"{name}.state_dict()")
            for name, one in self.stateful.items()
        }

    @property
    def stateful(self) -> dict[str, Any]:
        """Return what decides on learning rates or the end of training and has a state, by name."""
        return {**self.rates.schedulers, **({EARLY_STOP: self.patience} if self.patience is not None else {})}

    def _changed(self, found: Collected) -> dict[str, list[str]]:
        """Buffers and tensors of the job whose shapes or dtypes changed since the start, or that have disappeared."""
        kept = {n for n in found.tensors if n.startswith("extra/") and n.removeprefix("extra/") in self._in_place}
        now = {f"model/{one.name}": head_of(one.tensor) for one in live_tensors(self.model) if not one.is_parameter}
        now |= {n: head_of(found.tensors[n]) for n in kept}
        other = sorted(n for n, head in now.items() if self._shapes.get(n) != head and n in found.tensors)
        return {"other": other, "gone": sorted(set(self._shapes) - set(now))}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state: live ones, not copies. DTensors are sharded.

        Raises:
            ConfigError: the layout of a tensor over the workers cannot be saved.
        """
        return self.collect()[0]

    def values(self) -> dict[str, Any]:
        """Everything of the state that is no tensor, as JSON values."""
        return self.collect()[1]

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor of the state. If it is sharded, all workers of the row call this at the same time."""
        return tensor if self.mesh is None else whole(tensor, self.mesh)

    @property
    def part(self) -> Part:
        """The part of the state that this worker holds."""
        return Part() if self.mesh is None else self.mesh.part

    def specs(self, tensors: Mapping[str, torch.Tensor] | None = None) -> list[TensorSpec]:
        """The names, dtypes, shapes and cuts of all tensors, for workers that hold none; `tensors`: see `shards`."""
        return [
            TensorSpec(name, dtype_name(name, tensor), tuple(tensor.shape), cut_of(name, tensor))
            for name, tensor in (self.tensors() if tensors is None else tensors).items()
        ]

    def shards(self, rank: int, size: int, tensors: Mapping[str, torch.Tensor] | None = None) -> list[Shard]:
        """The shards that this worker saves.

        Args:
            rank, size: its index among the workers that hold tensors that are not sharded, and their number.
            tensors: those that `collect` has just returned, which takes a millisecond.
        """
        found = []
        learning = {f"model/{n}": p.requires_grad for n, p in self.parameters().items()}
        for name, tensor in (self.tensors() if tensors is None else tensors).items():
            shard = self._shard(name, tensor, rank, size)
            stable = name in learning or name.startswith("optimizer/")
            found.append(replace(shard, stable=stable, frozen=not learning.get(name, True)))
        return found

    def _shard(self, name: str, tensor: torch.Tensor, rank: int = 0, size: int = 1) -> Shard:
        """This worker's shard of a tensor."""
        if not isinstance(tensor, DTensor):
            return Shard.whole(name, tensor, replica=rank, replicas=size)
        assert self.mesh is not None
        shape, cut = tuple(tensor.shape), cut_of(name, tensor)
        pieces = self.mesh.part.pieces(cut)
        return Shard(name, local(tensor), shape, cut_box(shape, pieces).offsets, *self.mesh.copy_of(cut), cut=pieces)


def _is_live(tensor: torch.Tensor, again: Any) -> bool:
    """Whether `extra_state()` returned the job's own tensor, not one that it made for the call."""
    if tensor is again:
        return True
    if not isinstance(again, torch.Tensor):
        return False
    one, other = local(tensor), local(again)
    return not one.numel() or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride())
