"""Building a model without memory, and filling it tensor by tensor, wherever and however it is cut.

The job's `model()` runs with tensors on the meta device. What it does to them (torch's own `reset_parameters`, the
job's `nn.init` calls, copies of loaded weights) is recorded, and done for real later: for one tensor at a time, on the
CPU, with every random draw under a seed from (seed, name of the tensor drawn into, how many draws before). So the value
of a parameter depends on neither rank, world size nor strategy, and no worker ever holds more than one whole tensor.

After "deferred initialisation" in torchdistX (https://github.com/pytorch/torchdistx).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

META = torch.device("meta")
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


_ATEN = torch.ops.aten
#: Operations that leave nothing of what was in their first argument (where that is all of its storage).
_OVERWRITE = (
    _ATEN.normal_.default, _ATEN.uniform_.default, _ATEN.zero_.default, _ATEN.fill_.Scalar, _ATEN.copy_.default,
    _ATEN.random_.default, _ATEN.bernoulli_.float, _ATEN.exponential_.default,
)  # fmt: skip
_UNSET = (
    _ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.empty_like.default, _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
)  # fmt: skip


class CannotDefer(Exception):
    """The model does something while it is built that needs real values."""


@dataclass
class _Call:
    """One recorded operation.

    Args:
        reads, writes: storages.
        versions: real tensors among the arguments, as they were.
        random: it draws; `key` then says what the draw is for.
        whole: nothing of what was in the storage before is left.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]
    reads: set[int]
    writes: set[int]
    versions: list[tuple[torch.Tensor, int]]
    random: bool = False
    whole: bool = False
    key: str = ""


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor))


class _OnMeta(TorchFunctionMode):
    """Like `torch.device("meta")`, but values that are given as data keep their data."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        data = function in (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.from_file)
        if function in _device_constructors() and not data and kwargs.get("device") is None:
            kwargs["device"] = META
        if function == _IS_META:  # some of torch's initialisers do nothing for tensors on meta: ours are not
            return False
        return function(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Writes down every operation that makes or changes a meta tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if kwargs.get("generator") is not None:
            raise CannotDefer(f"{function} draws from a generator of the job's own")
        result = function(*args, **kwargs)
        made = list(_tensors(result))
        if not any(t.device == META for t in (*given, *made)):
            return result
        mutates = function._schema.is_mutable
        written = {_storage(t) for t in made if t.device == META and _storage(t) not in self._known}
        if mutates:
            targets = [
                value for argument, value in zip(function._schema.arguments, args)
                if argument.alias_info is not None and argument.alias_info.is_write
            ] + [
                kwargs[argument.name] for argument in function._schema.arguments
                if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write
            ]  # fmt: skip
            if any(t.device != META for t in _tensors(targets)):
                raise CannotDefer(f"{function} writes into a tensor that is not the model's")
            written |= {_storage(t) for t in _tensors(targets)}
        if not written:
            return result  # a view
        self._known |= written
        if function in _UNSET:
            return result  # memory that nobody wrote to is zero
        reads = {_storage(t) for t in given if t.device == META}
        versions = [(t, t._version) for t in given if t.device != META]
        whole = (
            function in _OVERWRITE and made[0].numel() * made[0].element_size() == made[0].untyped_storage().nbytes()
        )
        if whole and function is not torch.ops.aten.copy_.default:
            reads -= written
        random = torch.Tag.nondeterministic_seeded in function.tags
        self.calls.append(_Call(function, args, kwargs, made, reads, written, versions, random, whole))
        return result

    def whole_function(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """An initialiser that looks at the values it draws: recorded as one operation on its first argument."""

        def recorded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if tensor.device != META:
                return function(tensor, *args, **kwargs)
            if kwargs.get("generator") is not None:
                raise CannotDefer(f"{function.__name__} draws from a generator of the job's own")
            here = {_storage(tensor)}
            self.calls.append(_Call(function, (tensor, *args), kwargs, [], here, here, [], random=True))
            return tensor

        return recorded


@dataclass
class DeferredModel:
    """A model on the meta device (parts of it may be real), and what it takes to fill it.

    `model` may be wrapped and cut after this was made: values are asked for by name.
    """

    model: nn.Module
    seed: int
    _calls: list[_Call] = field(default_factory=list)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every parameter and buffer, tied ones once, under their first name."""
        return list(self._tensors)

    def value(self, name: str) -> torch.Tensor:
        """The initial value of a parameter or buffer, on the CPU."""
        return self._value(self._tensors[name])

    def extra(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of any other tensor that was made while the model was built."""
        return self._value(tensor)

    def _value(self, target: torch.Tensor) -> torch.Tensor:
        if target.device != META:
            return target.detach()
        needed, calls = {_storage(target)}, []
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
        return _real(target, memory).clone()

    def _replay(self, call: _Call, memory: dict[int, torch.UntypedStorage]) -> None:
        def real(tensor: torch.Tensor) -> torch.Tensor:
            return _real(tensor, memory) if tensor.device == META else tensor

        args, kwargs = tree_map_only(torch.Tensor, real, (call.args, call.kwargs))
        args, kwargs = tree_map_only(torch.device, lambda d: torch.device("cpu") if d == META else d, (args, kwargs))
        if call.random:
            seed = hashlib.blake2b(f"elastic.init/{self.seed}/{call.key}".encode(), digest_size=8).digest()
            torch.default_generator.manual_seed(int.from_bytes(seed, "little") >> 1)
        made = list(_tensors(call.function(*args, **kwargs)))
        for meta, value in zip(call.outputs, made):
            if _storage(meta) not in memory:
                _real(meta, memory).copy_(value)


def _real(meta: torch.Tensor, memory: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """The real tensor that stands for a meta tensor: a view of the memory that stands for its storage."""
    storage = _storage(meta)
    if storage not in memory:
        size = max(
            meta.untyped_storage().nbytes(),
            (meta.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride()) if n))
            * meta.element_size(),
        )
        memory[storage] = torch.zeros(size, dtype=torch.uint8).untyped_storage()
    view = torch.empty(0, dtype=meta.dtype)
    return view.set_(memory[storage], meta.storage_offset(), meta.shape, meta.stride())


def build(make: Callable[[], nn.Module], seed: int) -> DeferredModel:
    """Build a model on the meta device.

    Raises:
        CannotDefer: it needs real values while it is built.
    """
    recorder = _Recorder()
    try:
        with _OnMeta(), recorder, _recording_initialisers(recorder):
            model = make()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise CannotDefer(str(error)) from error
    for call in recorder.calls:
        if any(t._version != version for t, version in call.versions):
            raise CannotDefer(f"a tensor that {call.function} read was changed afterwards")
    found = DeferredModel(model, seed, recorder.calls)
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found._tensors[name] = tensor
        if tensor.device == META:
            names.setdefault(_storage(tensor), name)
    draws: dict[str, int] = {}
    for index, call in enumerate(recorder.calls):
        if call.random:
            into = names.get(min(call.writes), f"#{index}")
            draws[into] = draws.get(into, -1) + 1
            call.key = f"{into}/{draws[into]}"
    return found


@contextmanager
def _recording_initialisers(recorder: _Recorder) -> Iterator[None]:
    name = "_no_grad_trunc_normal_"  # behind `trunc_normal_`, under whatever name that was imported
    kept = getattr(nn.init, name, None)
    if kept is None:  # another torch: then looking at the values is what refuses it
        yield
        return
    setattr(nn.init, name, recorder.whole_function(kept))
    try:
        yield
    finally:
        setattr(nn.init, name, kept)


def build_eagerly(make: Callable[[], nn.Module], seed: int) -> DeferredModel:
    """The fallback for models that `build` refuses: the whole model in real memory."""
    model = make()
    found = DeferredModel(model, seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found._tensors[name] = tensor.detach().clone() if tensor.device == META else tensor
    return found


def meta_attributes(*owners: object) -> Iterator[torch.Tensor]:
    """Tensors on meta that are plain attributes of modules or of the job, where no one else would fill them."""
    for owner in owners:
        for one in owner.modules() if isinstance(owner, nn.Module) else [owner]:
            for key, value in vars(one).items():
                if key not in ("_parameters", "_buffers", "_modules"):
                    found = _tensors(value)
                    yield from (t for t in found if t.device == META and not isinstance(t, nn.Parameter))
