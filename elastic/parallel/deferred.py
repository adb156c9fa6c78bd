"""Building a model without memory, and filling it tensor by tensor, on any device and however it is sharded.

The job's `model()` runs with tensors on the meta device. What it does to them (torch's own `reset_parameters`, the
job's `nn.init` calls, copies of loaded weights) is recorded and carried out later: for one tensor at a time, on the
CPU, with every random draw under a seed from (seed, name of the tensor drawn into, number of draws before). So the
value of a parameter depends on neither rank, world size nor strategy, and no worker ever holds more than one whole
tensor.

Tensors are filled without being replaced, so that all other references to them (hooks, lists, closures, an optimizer)
stay valid.

Source of the idea: "deferred initialisation" in torchdistX (https://github.com/pytorch/torchdistx).
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from elastic.compat.torch import (
    base_of,
    forget_weak_weights,
    gradient_hooks,
    is_traceable_wrapper_subclass,
    set_gradient_hooks,
    storage_identity,
    tree_map_only,
    use_count,
    version_of,
)
from elastic.errors import ConfigError
from elastic.parallel.recording import (
    META,
    Call,
    CannotDefer,
    Made,
    OnMeta,
    Place,
    Recorder,
    place_of,
    recording_initialisers,
    tensors_in,
)

__all__ = ["META", "CannotDefer", "DeferredModel", "build", "build_eagerly"]


@dataclass
class DeferredModel:
    """A model on the meta device (parts of it may be real), and the recorded calls that fill it.

    `model` may be wrapped and sharded afterwards: values are looked up by name.
    """

    model: nn.Module
    seed: int
    _calls: list[Call] = field(default_factory=list)
    _initial: dict[str, torch.Tensor | Place] = field(default_factory=dict)
    _beside: list[torch.Tensor] = field(default_factory=list)
    #: Modules that `model()` made but that are not part of the model, such as a teacher.
    others: list[nn.Module] = field(default_factory=list)

    def names(self) -> list[str]:
        """The names of all parameters and buffers; tied ones once, by their first name."""
        return list(self._initial)

    def value(self, name: str) -> torch.Tensor:
        """The initial value of a parameter or buffer, whole, on the CPU."""
        found = self._initial[name]
        return _real(found, self._memory(found.storage)).clone() if isinstance(found, Place) else found

    def fill(self, device: torch.device) -> None:
        """Give every meta tensor that the job keeps its initial value on `device`; shared memory stays shared.

        If the model was sharded, these are only the tensors outside of it.
        """
        targets = {id(t): t for t in (*self._beside, *_own(self.model)) if t.device == META}
        self._beside = []
        shared: dict[int, list[torch.Tensor]] = {}
        for tensor in targets.values():
            shared.setdefault(storage_identity(tensor), []).append(tensor)
        del targets
        while shared:
            storage, tensors = shared.popitem()
            self._fill(storage, tensors, device)

    def _fill(self, storage: int, tensors: list[torch.Tensor], device: torch.device) -> None:
        memory, places = self._memory(storage), [place_of(t) for t in tensors]
        together = len(places) > 1 and not any(_overlaps(place) for place in places)
        if together:
            memory = {storage: _real(max(places, key=lambda p: p.size_bytes), memory).untyped_storage()}
            if device.type != "cpu":
                memory[storage] = torch.empty(0, dtype=torch.uint8).set_(memory[storage]).to(device).untyped_storage()
        for tensor, place in sorted(zip(tensors, places), key=lambda pair: base_of(pair[0]) is None):  # views first
            value = _real(place, memory)
            if not together:
                value = value.to(device) if device.type != "cpu" or _is_all(value) else value.clone()
            become(tensor, value)

    def _memory(self, storage: int) -> dict[int, torch.UntypedStorage]:
        """The contents of a storage after all recorded calls that affect it, and of storages needed on the way."""
        needed, calls = {storage}, []
        for call in reversed(self._calls):
            if call.writes & needed:
                if call.whole:
                    needed -= call.writes
                needed |= call.reads if call.whole else call.reads | call.writes
                calls.append(call)
        memory: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad():
            for call in reversed(calls):
                self._replay(call, memory)
        return memory

    def _replay(self, call: Call, memory: dict[int, torch.UntypedStorage]) -> None:
        args, kwargs = tree_map_only(Place, lambda place: _real(place, memory), (call.args, call.kwargs))
        args, kwargs = tree_map_only(torch.device, lambda d: torch.device("cpu") if d == META else d, (args, kwargs))
        if call.random:
            seed = hashlib.blake2b(f"elastic.init/{self.seed}/{call.key}".encode(), digest_size=8).digest()
            torch.default_generator.manual_seed(int.from_bytes(seed, "little") >> 1)
        made = list(tensors_in(call.function(*args, **kwargs)))
        for place, value in zip(call.outputs, made):
            if place.storage not in memory:
                _real(place, memory).copy_(value)


def _real(place: Place, memory: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """The real tensor for one on meta: a view of the memory that stands for its storage."""
    if place.storage not in memory:
        memory[place.storage] = torch.zeros(place.size_bytes, dtype=torch.uint8).untyped_storage()
    held = memory[place.storage]
    view = torch.empty(0, dtype=place.dtype, device=held.device)
    return view.set_(held, place.offset, place.shape, place.stride)


def _is_all(value: torch.Tensor) -> bool:
    return value.is_contiguous() and value.numel() * value.element_size() == value.untyped_storage().nbytes()


def _overlaps(place: Place) -> bool:
    """Whether elements share memory, as in an expanded tensor, which cannot be written to."""
    return any(n > 1 and not s for n, s in zip(place.shape, place.stride))


def become(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor the value of another, on another device. The object keeps its class, attributes, flags and
    hooks."""
    trained, hooks = tensor.requires_grad, gradient_hooks(tensor)
    new: Any = value.detach().requires_grad_(trained or any(hooks))  # frozen parameters may have hooks too
    new.__class__ = tensor.__class__
    new.__dict__.update(tensor.__dict__)
    set_gradient_hooks(new, hooks)
    torch.utils.swap_tensors(tensor, new)
    tensor.requires_grad_(trained)


def _own(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def build(make: Callable[[], nn.Module], seed: int) -> DeferredModel:
    """Build a model on the meta device.

    Raises:
        CannotDefer: the model needs real values while it is built.
    """
    recorder, on_meta = Recorder(), OnMeta()
    with Made(nn.Module, torch.Tensor) as made:
        try:
            with on_meta, recorder, recording_initialisers(recorder):
                model = make()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise CannotDefer(str(error)) from error
        check_sizes(model)
        if any(isinstance(m, torch.jit.ScriptModule) for m in made.find(nn.Module)):
            raise CannotDefer("the model has ScriptModules, whose tensors are kept outside of Python")
        if on_meta.error is not None:  # the job caught it, and took another way only because there are no values
            raise CannotDefer(str(on_meta.error)) from on_meta.error
        kept = [t for t in made.find(torch.Tensor) if not is_traceable_wrapper_subclass(t) and recorder.knows(t)]
        others = _outside(model, made.find(nn.Module))
    for module in (m for top in (model, *others) for m in top.modules() if isinstance(m, nn.RNNBase)):
        forget_weak_weights(module)
    for call in recorder.calls:
        if any(version_of(t) != version for t, version in call.versions):
            raise CannotDefer(f"a tensor that {call.function} read was changed afterwards")
    found = DeferredModel(model, seed, recorder.calls, others=others)
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found._initial[name] = place_of(tensor) if tensor.device == META else tensor.detach()
        if tensor.device == META:
            names.setdefault(storage_identity(tensor), name)
    own = {id(t) for t in _own(model)}
    views = Counter(id(base) for base in map(base_of, kept) if base is not None)
    for tensor in kept:
        _check_replaceable(tensor, views[id(tensor)])
    found._beside = [t for t in kept if id(t) not in own]
    draws: dict[str, int] = {}
    for index, call in enumerate(recorder.calls):
        if call.random:
            into = names.get(min(call.writes), f"#{index}")
            draws[into] = draws.get(into, -1) + 1
            call.key = f"{into}/{draws[into]}"
    return found


def check_sizes(model: nn.Module) -> None:
    """Refuse layers that take their sizes from the first batch: nothing can be placed or resumed without sizes.

    Raises:
        ConfigError: with the parameter, and what to do.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            module = model.get_submodule(name.rpartition(".")[0])
            raise ConfigError(
                f"{name} ({type(module).__name__}) takes its size from the first batch, and the state of a run needs "
                "all sizes from the beginning; name them (such as nn.Linear(in_features, out_features)), or run the "
                "model on one batch at the end of model()"
            )


def _check_replaceable(tensor: torch.Tensor, views: int) -> None:
    """Refuse tensors that cannot be filled without being replaced.

    Args:
        views: how many views of it are kept too; each of them refers to it.

    Raises:
        CannotDefer: something outside of Python refers to the tensor, and would lose it.
    """
    if not tensor.is_leaf:
        raise CannotDefer("the model keeps a tensor that was computed from its parameters, with its graph")
    if use_count(tensor) > 1 + views:
        raise CannotDefer("the model keeps a node of the graph of a parameter, as for a hook on its accumulation")
    if weakref.getweakrefs(tensor):
        raise CannotDefer("the model keeps a weak reference to a tensor")
    if tensor.grad is not None:
        raise CannotDefer("the model keeps a gradient that was computed while it was built")


def _outside(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    inside = {id(m) for m in model.modules()}
    return [m for m in modules if id(m) not in inside]


def build_eagerly(make: Callable[[], nn.Module], seed: int) -> DeferredModel:
    """The fallback for models that `build` refuses: the whole model in real memory."""
    with Made(nn.Module) as made:
        model = make()
        others = _outside(model, made.find(nn.Module))
    check_sizes(model)
    found = DeferredModel(model, seed, others=others)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found._initial[name] = place_of(tensor) if tensor.device == META else tensor.detach()
    return found
