"""Records what a job's `model()` does to its tensors, none of which has memory meanwhile.

The record names tensors by their storage and their layout in it, and holds no reference to them: so the meta tensors
that exist afterwards are those that the job keeps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from elastic.compat.torch import (
    TorchDispatchMode,
    makes_tensors,
    storage_identity,
    tree_flatten,
    tree_map_only,
    trunc_normal_wrapped,
    version_of,
    written_arguments,
)

META = torch.device("meta")
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]

_ATEN = torch.ops.aten
#: Operations that overwrite their first argument completely (if it is all of its storage).
_OVERWRITE = (
    _ATEN.normal_.default,
    _ATEN.uniform_.default,
    _ATEN.zero_.default,
    _ATEN.fill_.Scalar,
    _ATEN.copy_.default,
    _ATEN.random_.default,
    _ATEN.bernoulli_.float,
    _ATEN.exponential_.default,
)
_UNSET = (
    _ATEN.empty.memory_format,
    _ATEN.empty_strided.default,
    _ATEN.empty_like.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
)


class CannotDefer(Exception):
    """The model needs real values while it is built."""


@dataclass(frozen=True)
class Place:
    """A meta tensor: its storage, and its layout in it. `size_bytes` is the size of the storage."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass
class Call:
    """One recorded operation.

    Args:
        args, kwargs: with a `Place` for each meta tensor.
        reads, writes: ids of storages.
        versions: the real tensors among the arguments, with their version counters.
        random: whether it draws random numbers; then `key` is the key of their seed.
        whole: whether it overwrites the whole storage.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Place]
    reads: set[int]
    writes: set[int]
    versions: list[tuple[torch.Tensor, int]]
    random: bool = False
    whole: bool = False
    key: str = ""


def place_of(tensor: torch.Tensor) -> Place:
    """The layout of a meta tensor."""
    shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
    ends = (offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride) if n)) * tensor.element_size()
    size_bytes = max(int(tensor.untyped_storage().nbytes()), int(ends))
    return Place(storage_identity(tensor), tensor.dtype, shape, stride, offset, size_bytes)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in a tree of containers."""
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor))


def _placed(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: place_of(t) if t.device == META else t, tree)


class OnMeta(TorchFunctionMode):
    """Like `torch.device("meta")`, but tensors made from given values stay real."""

    def __init__(self) -> None:
        super().__init__()
        #: The first error about a meta tensor, even if the job or torch catches it and continues.
        self.error: Exception | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        data = function in (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.from_file)
        if makes_tensors(function) and not data and kwargs.get("device") is None:
            kwargs["device"] = META
        if function == _IS_META:  # some of torch's initialisers skip meta tensors; they must not skip these
            return False
        try:
            if function is torch.Tensor.data_ptr and args[0].device == META:  # it is 0, and so equal for all tensors
                raise CannotDefer("the model asks for the address of a tensor while it is built")
            return function(*args, **kwargs)
        except Exception as error:
            if self.error is None and any(t.device == META for t in tensors_in((args, kwargs))):
                self.error = error
            raise


class Recorder(TorchDispatchMode):
    """Records every operation that makes or changes a meta tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._known: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no other storage gets the same address

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in a storage that was made inside."""
        return tensor.device == META and storage_identity(tensor) in self._known

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        if kwargs.get("generator") is not None:
            raise CannotDefer(f"{function} draws from a generator of the job's own")
        result = function(*args, **kwargs)
        made = list(tensors_in(result))
        if not any(t.device == META for t in (*given, *made)):
            return result
        written = [t for t in made if t.device == META and storage_identity(t) not in self._known]
        targets = list(tensors_in(written_arguments(function, args, kwargs)))
        if any(t.device != META for t in targets):
            raise CannotDefer(f"{function} writes into a tensor that is not the model's")
        written += targets
        if not written:
            return result  # a view
        writes = self._remember(written)
        if function in _UNSET:
            return result  # memory that nobody wrote to is zero
        reads = {storage_identity(t) for t in given if t.device == META}
        versions = [(t, version_of(t)) for t in given if t.device != META]
        whole = (
            function in _OVERWRITE and made[0].numel() * made[0].element_size() == made[0].untyped_storage().nbytes()
        )
        if whole and function is not torch.ops.aten.copy_.default:
            reads -= writes
        random = torch.Tag.nondeterministic_seeded in function.tags
        placed, named = _placed((args, kwargs))
        outputs = [place_of(t) for t in made if t.device == META]
        self.calls.append(Call(function, placed, named, outputs, reads, writes, versions, random, whole))
        return result

    def _remember(self, tensors: list[torch.Tensor]) -> set[int]:
        found = {storage_identity(t): t.untyped_storage() for t in tensors}
        self._known.update(found)
        return set(found)

    def whole_function(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Wrap an initialiser that reads the values it draws: it is recorded as one operation on its first argument."""

        def recorded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if tensor.device != META:
                return function(tensor, *args, **kwargs)
            if kwargs.get("generator") is not None:
                raise CannotDefer(f"{function.__name__} draws from a generator of the job's own")
            here = self._remember([tensor])
            placed, named = _placed(((tensor, *args), kwargs))
            self.calls.append(Call(function, placed, named, [], here, here, [], random=True))
            return tensor

        return recorded


def recording_initialisers(recorder: Recorder) -> AbstractContextManager[None]:
    """Inside, torch's initialiser that reads its own draws is recorded as one operation. If another version of torch
    reads them in another function, that is refused as reading values."""
    return trunc_normal_wrapped(recorder.whole_function)


class Made:
    """Finds the objects that are created inside. The job may keep them anywhere: in lists, closures, globals.

    They are those that the garbage collector knows and did not know before. It is not asked for what was imported,
    which is frozen, nor for what the job freezes inside.

    Args:
        kinds: the types that can be found.
    """

    def __init__(self, *kinds: type):
        self._kinds = kinds
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Made:
        self._before = {id(o): o for o in gc.get_objects() if issubclass(type(o), self._kinds)}
        return self

    def __exit__(self, *_: object) -> None:
        self._before.clear()

    def find(self, kind: type) -> list[Any]:
        """The created objects of a type. To be called inside."""
        return [o for o in gc.get_objects() if issubclass(type(o), kind) and id(o) not in self._before]
