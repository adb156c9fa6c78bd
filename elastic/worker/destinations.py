"""Finds the place of each tensor of a saved state: the live tensor of that name, or a new one if there is none like
it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.checkpoint.format import TensorEntry
from elastic.checkpoint.tensors import DTYPES, Shard
from elastic.compat.torch import own_buffers, own_children, own_parameters
from elastic.errors import CheckpointError
from elastic.parallel.optimizers import kind_of
from elastic.parallel.wrapping import local
from elastic.placement import TensorSpec
from elastic.values import ValueRefused, decode
from elastic.worker.groups import check_owner
from elastic.worker.keeping import CODED, EARLY_STOP, Collected, Head, Keeping, head_of
from elastic.worker.naming import identity_of, live_tensors, named_modules, persistent_entries, with_state_of_their_own
from elastic.worker.weights import weights_alone


class Destinations(Keeping):
    """Maps a saved state to the live one. Names, shapes and values are checked before anything is changed."""

    # ---- weights alone ---------------------------------------------------------------------------------------------

    def weights(self) -> tuple[list[Shard], dict[str, list[str]]]:
        """The model's tensors by their own names, and all names of those that are tied."""
        mine = persistent_entries(self.model)
        names: dict[Hashable, list[str]] = {}
        for one in live_tensors(self.model):
            names.setdefault(identity_of(one.tensor), []).append(one.name)
        others = {n: names[identity_of(value)] for n, value in mine.items()}
        return [self._shard(n, value.detach()) for n, value in mine.items()], others

    def _weight_destinations(self, entries: Collection[str]) -> list[Shard]:
        shards, aliases = self.weights()
        found = []
        for shard in shards:
            names = [f"model/{n}" for n in (shard.name, *aliases.get(shard.name, ()))]
            found.append(replace(shard, name=next((n for n in names if n in entries), names[0])))
        tied = {f"model/{n}" for names in aliases.values() for n in names}
        wanted = {s.name for s in found}
        elsewhere = {shard.name for shard in found if shard.name.removeprefix("model/") in self.sources} - set(entries)
        _same_names("model", wanted - elsewhere, set(entries) - (tied - wanted))
        return [shard for shard in found if shard.name not in elsewhere]

    # ---- a whole state ---------------------------------------------------------------------------------------------

    def destinations(
        self,
        entries: Mapping[str, TensorEntry] | Mapping[str, TensorSpec],
        values: dict[str, Any],
        *,
        convert: bool = False,
    ) -> list[Shard]:
        """The places of a saved state's tensors: live tensors, or new ones where there is none yet.

        If the checkpoint has weights only, everything else stays as the job made it.

        Args:
            convert: dtypes may differ from those saved; then the optimizer's state takes the dtype of its parameter.

        Raises:
            CheckpointError: names differ from those of this model, optimizer and job.
        """
        if weights_alone(values):
            return self._weight_destinations(entries)
        heads = {name: (tuple(e.shape), DTYPES[e.dtype]) for name, e in entries.items()}
        mine = self._make_room(heads, values, convert=convert)
        return [self._shard(name, mine[name]) for name in entries]

    def _make_room(
        self, heads: Mapping[str, Head], values: dict[str, Any], *, convert: bool = False
    ) -> dict[str, torch.Tensor]:
        """The place of each tensor of a saved state, by name."""
        self._check_values(values)
        parameters, referred = self.parameters(), self._referred(values, heads)
        saved: dict[int, dict[str, str]] = {}  # for each parameter, by id: key of the optimizer's state -> tensor name
        for name in heads:
            if name.startswith("optimizer/") and name not in referred:
                owner, _, key = name.removeprefix("optimizer/").rpartition("/")
                check_owner(owner, parameters)
                if key in values["states"].get(owner, {}):
                    raise CheckpointError(f"the saved optimizer state of {owner!r} has values in place of tensors")
                saved.setdefault(id(parameters[owner]), {})[key] = name
            elif name not in referred and not name.startswith(("model/", "extra/")):
                raise CheckpointError(f"the checkpoint has a tensor {name[:100]!r}, which is part of no training state")
        mine = self._places({n for n in heads if n not in referred}, heads, values.get("changed", {}))
        for parameter in {id(p): p for p in parameters.values()}.values():
            names = saved.get(id(parameter), {})
            for key in set(self.optimizer.state.get(parameter, {})) - set(names):
                del self.optimizer.state[parameter][key]
            for key, name in sorted(names.items()):
                mine[name] = self._kept_of(parameter, key, heads[name], convert)
        self._arrived, nested = {}, self._nested()
        for name, on_cpu in referred.items():
            if (known := nested.get(name)) is None or head_of(known) != heads[name]:
                known = self._room_for(name, heads[name], on_cpu, parameters)
            self._arrived[name] = mine[name] = known
        return mine

    def _kept_of(self, parameter: nn.Parameter, key: str, head: Head, convert: bool) -> torch.Tensor:
        """The optimizer's state of a parameter under a key: the present tensor if it fits, otherwise a new one."""
        (shape, dtype), state = head, self.optimizer.state[parameter]
        if convert and dtype.is_floating_point and shape == tuple(parameter.shape):
            dtype = parameter.dtype
        if not isinstance(known := state.get(key), torch.Tensor) or head_of(known) != (shape, dtype):
            state[key] = self._new_state(parameter, shape, dtype)
        return state[key]

    def _room_for(self, name: str, head: Head, on_cpu: bool, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
        """A tensor for one that values refer to: sharded like the parameter that it belongs to, if it has its shape."""
        shape, dtype = head
        kind, _, rest = name.partition("/")
        owners = [o for o in parameters if rest.startswith(f"{o}/")] if kind == "optimizer" else []
        if owners:
            parameter = parameters[max(owners, key=len)]
            if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
                return torch.empty_like(parameter, dtype=dtype).detach()
        return torch.empty(shape, dtype=dtype, device="cpu" if on_cpu else self._device)

    def _nested(self) -> dict[str, torch.Tensor]:
        """Tensors that are nested in the job's extra state."""
        found = Collected()
        self._collect_extra(found)
        return {name: t for name, t in found.tensors.items() if name.removeprefix("extra/") not in self._in_place}

    @property
    def _device(self) -> torch.device:
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else local(first).device

    def _new_state(self, parameter: nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor for the optimizer's state of a parameter, sharded like it if it has its shape. Scalars such as
        Adam's step stay on the CPU, unless the optimizer itself keeps them on the device."""
        if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
            return torch.empty_like(parameter, dtype=dtype).detach()
        fused = any(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups)
        device = local(parameter).device if shape or fused else torch.device("cpu")
        return torch.empty(shape, dtype=dtype, device=device)

    # ---- model and job ---------------------------------------------------------------------------------------------

    def _places(
        self, saved: set[str], heads: Mapping[str, Head], changed: Mapping[str, list[str]]
    ) -> dict[str, torch.Tensor]:
        """The live tensors of model and job by name, after comparing their names with those saved.

        A buffer, or a tensor of the job, that changed its shape, appeared or disappeared while training, is made as it
        was saved. Here it may have changed too, if a state of an earlier step is put back.
        """
        mine = {f"model/{name}": value for name, value in self._entries().items()}
        extra = self.job.extra_state()
        mine |= {f"extra/{k}": extra[k] for k in self._in_place if isinstance(extra.get(k), torch.Tensor)}
        buffers = {f"model/{one.name}": one for one in live_tensors(self.model) if not one.is_parameter}
        began, gone = self._shapes, set(changed.get("gone", ()))
        other = {n for n in changed.get("other", ()) if n in saved}
        other |= {n for n in saved & set(began) if heads[n] == began[n]}
        for name, one in buffers.items():
            if name in mine and name not in saved and (name in gone or name not in began):
                own_buffers(one.module)[one.leaf] = None
                del mine[name]
        for name in gone & set(mine) - saved:
            del mine[name]
        for kind, what in (("model/", "model"), ("extra/", "extra state")):
            names = ({n.removeprefix(kind) for n in ns if n.startswith(kind)} for ns in (set(mine) | other, saved))
            _same_names(what, *names)
        for name in sorted(other):
            if (tensor := mine.get(name)) is None or head_of(tensor) != heads[name]:
                mine[name] = self._reshaped(name, tensor, heads[name])
        return mine

    def _reshaped(self, name: str, tensor: torch.Tensor | None, head: Head) -> torch.Tensor:
        """A buffer, or a tensor of the job, with another shape or dtype than it has here."""
        shape, dtype = head
        if name.startswith("extra/"):
            if tensor is None or isinstance(tensor, DTensor) or tensor.dtype != dtype:
                raise CheckpointError(f"the saved {name} is {dtype} {shape}, which cannot be made of this job's")
            tensor.data = torch.empty(shape, dtype=dtype, device=tensor.device)
            return tensor
        path, _, leaf = name.removeprefix("model/").rpartition(".")
        module = dict(named_modules(self.model)).get(path)
        if module is None or leaf in own_parameters(module) or leaf in own_children(module):
            raise CheckpointError(f"the saved {name} is a buffer, which this model does not have")
        made = torch.empty(shape, dtype=dtype, device=self._device if tensor is None else tensor.device)
        if leaf in own_buffers(module):
            own_buffers(module)[leaf] = made
        else:
            module.register_buffer(leaf, made)
        return made

    # ---- before anything is changed --------------------------------------------------------------------------------

    def _check_values(self, values: Mapping[str, Any]) -> None:
        """Refuse values that are not those of a training state, or not those of this job."""
        kinds: dict[str, type] = {"optimizer": str, "groups": list, "states": dict, "extra": dict}
        if "coded" in values:
            more = {"began": list, "modules": dict, "schedulers": dict, "eval": list, "frozen": list, "changed": dict}
            kinds = {"coded": int, **kinds, **more}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        if wrong:
            raise CheckpointError(f"the checkpoint has no training state: its values lack {', '.join(wrong)}")
        if values.get("coded", CODED) != CODED:
            raise CheckpointError("the values of the checkpoint are of a newer version; install a newer elastic-train")
        mine = kind_of(self.optimizer)
        if values["optimizer"] != mine:
            raise CheckpointError(
                f"the saved state is of the optimizer {values['optimizer'][:100]}, this job's is {mine}; use that one, "
                "or start another run"
            )
        parameters = self.parameters()
        self._groups.check(values, parameters)
        for owner, state in values["states"].items():
            check_owner(owner, parameters)
            if not isinstance(state, dict):
                raise CheckpointError("the checkpoint has no training state: its states are no objects")
        if not is_coded(values):
            self._check_plain(values)
        else:
            _same_names("states of modules", set(with_state_of_their_own(self.model)), set(values["modules"]))
            _same_names("schedulers", set(self.rates.schedulers), set(values["schedulers"]) - {EARLY_STOP})
            texts = [*values["eval"], *values["frozen"]]
            if not all(isinstance(t, str) for t in texts) or not all(map(_is_names, values["changed"].values())):
                raise CheckpointError("the checkpoint has no training state: its lists of names are invalid")
        self._check_sources(values)
        scale = values.get("loss_scale", {"factor": 1.0, "good": 0})
        if not isinstance(scale, dict) or any(type(scale.get(k)) not in (int, float) for k in ("factor", "good")):
            raise CheckpointError("the checkpoint has no training state: its loss_scale is invalid")

    def _check_sources(self, values: Mapping[str, Any]) -> None:
        """Refuse a state whose left-out parameters came from other sources than those of this model."""
        saved = values.get("sources", {})
        if not isinstance(saved, dict) or not all(isinstance(value, str) for value in saved.values()):
            raise CheckpointError("the checkpoint has no training state: its sources are invalid")
        _same_names("list of parameters that come from elsewhere (has_source())", set(self.sources), set(saved))
        other = next((name for name, value in sorted(saved.items()) if self.sources[name] != value), None)
        if other is not None:
            raise CheckpointError(
                f"the parameter {other} comes from elsewhere (has_source()), and its source has other values than when "
                "this state was saved; put the source back, or start another run"
            )

    def _check_plain(self, values: Mapping[str, Any]) -> None:
        for group, saved in zip(self.optimizer.param_groups, values["groups"]):
            for key in saved.keys() & group.keys():
                if isinstance(group[key], tuple) and not isinstance(saved[key], list):
                    raise CheckpointError(f"the checkpoint has no training state: its {key} is no list")

    def _referred(self, values: Mapping[str, Any], heads: Mapping[str, Head]) -> dict[str, bool]:
        """The names of the tensors that values refer to, and whether they are on the CPU. Reads all values once."""
        found: dict[str, bool] = {}
        if not is_coded(values):
            return found

        def note(reference: Any) -> None:
            name = reference["name"]
            if name not in heads or name.startswith("model/"):
                raise ValueRefused(f"a value refers to a tensor {str(name)[:100]!r}, which is not among those saved")
            found[name] = bool(reference["cpu"])

        sections = ("states", "groups", "began", "modules", "buffers", "schedulers", "extra", "state")
        try:
            for section in sections:
                decode(values.get(section, {}), tensor=note, known=self._known)
        except ValueRefused as error:
            raise CheckpointError(f"the saved values cannot be read: {error}") from error
        return found


def is_coded(values: Mapping[str, Any]) -> bool:
    """Whether the values of a state are coded by `elastic.values`; those of earlier versions are plain JSON."""
    return "coded" in values


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, str) for n in value)


def _same_names(what: str, mine: set[str], saved: set[str]) -> None:
    missing, unexpected = sorted(mine - saved), sorted(saved - mine)
    if missing or unexpected:
        raise CheckpointError(
            f"the saved {what} does not fit: missing {missing[:3] or 'nothing'}, unexpected "
            f"{unexpected[:3] or 'nothing'}; start another run, or use the code that saved it"
        )
