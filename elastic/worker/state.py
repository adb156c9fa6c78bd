"""The training state of a worker: how it is saved, given to peers, and restored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from elastic.checkpoint.tensors import DTYPES
from elastic.errors import CheckpointError
from elastic.parallel.wrapping import local
from elastic.placement import TensorSpec
from elastic.values import ValueRefused, decode, encode
from elastic.worker.destinations import Destinations, is_coded
from elastic.worker.naming import named_modules, with_state_of_their_own
from elastic.worker.weights import weights_alone


class TrainState(Destinations):
    """The training state of a worker, which can be saved and restored."""

    def load(
        self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any], specs: Iterable[TensorSpec] | None = None
    ) -> None:
        """Restore a saved state; of sharded tensors, this worker's part.

        Args:
            specs: of all tensors, as `specs()` returns them; needed if some tensors are sharded.

        Raises:
            CheckpointError: names or shapes differ from those of this model, optimizer and job.
        """
        if specs is None:
            known = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        else:
            known = {spec.name: (spec.shape, DTYPES[spec.dtype]) for spec in specs}
        mine = self._make_room(known, values)
        with torch.no_grad():
            for name, value in tensors.items():
                here = local(mine[name])
                if here.shape != value.shape or here.dtype != value.dtype:
                    raise _unlike(name, value.dtype, tuple(value.shape), here)
                if here.data_ptr() != value.data_ptr():  # it was received in place
                    here.copy_(value)
        self.load_values(values)

    def load_values(self, values: dict[str, Any]) -> None:
        """Restore everything that is no tensor, after the tensors; `destinations` has checked these values.

        Raises:
            CheckpointError: the job's own `load_extra_state` does not accept them.
        """
        if weights_alone(values):
            return
        self._held = None
        parameters = self.parameters()
        for name, state in values["states"].items():
            self.optimizer.state[parameters[name]].update(self._decode(state, values))
        self._groups.load(values, parameters, lambda v: self._decode(v, values), rates=self.rates.followed)
        if is_coded(values):
            self._load_model(values, parameters)
            for key in [k for k in self.optimizer.state if not isinstance(k, torch.Tensor)]:
                del self.optimizer.state[key]
            self.optimizer.state.update(self._decode(values.get("state", {}), values))
            kept = self.stateful
            for name, coded in values["schedulers"].items():
                if name in kept:
                    kept[name].load_state_dict(self._decode(coded, values))
        self.rates.forget()
        extra = self._restored_in_place(values) | self._decode(values["extra"], values)
        _call("load_extra_state()", partial(self.job.load_extra_state, extra))
        if self.attributes is not None:
            self.attributes.load(self._decode(values.get("attributes", {}), values))
        self._arrived = {}
        if self.scaler is not None and "loss_scale" in values:
            self.scaler.load(values["loss_scale"])

    def _restored_in_place(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The job's own tensors, for a `load_extra_state` that wants all that `extra_state` returned."""
        gone = values.get("changed", {}).get("gone", ())
        names = [name for name in self._in_place if f"extra/{name}" not in gone]
        now = self.job.extra_state() if names else {}
        return {name: now[name] for name in names if name in now}

    def _load_model(self, values: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        for name, module in with_state_of_their_own(self.model).items():
            state = self._decode(values["modules"][name], values)
            _call(f"set_extra_state() of {name or 'the model'}", partial(module.set_extra_state, state))
        self._load_buffers(self._decode(values.get("buffers", {}), values))
        evaluating, frozen = set(values["eval"]), set(values["frozen"])
        for name, module in named_modules(self.model):
            module.training = name not in evaluating
        for name, parameter in parameters.items():
            if parameter.requires_grad == (name in frozen):
                parameter.requires_grad_(name not in frozen)

    def _load_buffers(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Restore buffers that passes change although they are registered with persistent=False."""
        places = self._buffers()
        with torch.no_grad():
            for name in sorted(saved.keys() & places.keys()):
                module, leaf = places[name]
                here, value = getattr(module, leaf), saved[name]
                if here is not None and (here.shape, here.dtype) == (value.shape, value.dtype):
                    here.copy_(value)
                else:
                    setattr(module, leaf, value.clone())
        self.keep_buffers(saved)

    def read_and_written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Decode coded values and encode them again; the result is equal if everything can be read back."""
        tensors, sections = self.tensors(), ("states", "state", "groups", "modules", "schedulers", "extra")
        again: dict[str, Any] = {}
        for section in sections:
            referred: deque[Any] = deque()

            def note(reference: dict[str, Any], referred: deque[Any] = referred) -> torch.Tensor:
                referred.append(reference)
                return tensors[reference["name"]]

            found = decode(values[section], tensor=note, known=self._known)
            again[section] = encode(found, tensor=partial(_next_of, referred))
        return again

    def _decode(self, coded: Any, values: Mapping[str, Any]) -> Any:
        if not is_coded(values):
            return coded
        try:
            return decode(coded, tensor=lambda reference: self._arrived[reference["name"]], known=self._known)
        except ValueRefused as error:
            raise CheckpointError(f"the saved values cannot be read: {error}") from error


def _next_of(referred: deque[Any], one: torch.Tensor, place: str) -> Any:
    return referred.popleft()


def _call(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:  # the job's own code
        raise CheckpointError(
            f"{what} does not take the saved values: {type(error).__name__}: {error}; use the code that saved them, or "
            "start another run"
        ) from error


def _unlike(name: str, dtype: torch.dtype, shape: tuple[int, ...], target: torch.Tensor) -> CheckpointError:
    return CheckpointError(
        f"the saved {name} is {dtype} {shape}, this model's is {target.dtype} {tuple(target.shape)}; start another "
        "run, or use the code that saved it"
    )
