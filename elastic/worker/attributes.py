"""Attributes of the job, its model and its data sets that the job changes in updates: a step that it counts, a
temperature, `dataset.set_epoch()`, a curriculum.

They are found by comparing them around what the job does in a step, and are part of its state from then on. What of the
data cannot be saved, or changes in passes or as samples are fetched too, is told.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from elastic.compat.torch import version_of
from elastic.data.samples import Told, is_dataset
from elastic.values import ValueRefused, encode
from elastic.worker.belongings import is_open

_MOST_OWNERS = 64  # objects whose attributes are compared: the data sets and what they hold, the nearest first
_MOST_MODULES = 16  # of a model, of classes that are none of torch's
_MOST_ITEMS = 64  # of a container that is compared by value and saved; of a longer one the length is compared
_MOST_BYTES = 4096  # of an array that is compared by value and saved
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set)
_OF_MODULES = frozenset(vars(nn.Module()))  # such as its mode
_MISSING: Any = object()
_RICH: Any = object()  # stands for a value that was not looked at


class _Owner:
    """An object with attributes.

    Args:
        simple: only plain values, and small containers of them, are looked at. Others may be large, or hold a graph,
            and would be kept.
    """

    def __init__(self, name: str, one: Any, *, simple: bool):
        self.name, self.values, self._simple = name, vars(one), simple
        self._skipped = _OF_MODULES if isinstance(one, nn.Module) else frozenset[str]()
        self._keep()

    def put(self, key: str, value: Any) -> None:
        """Set an attribute, or remove it if the value is missing."""
        if value is _MISSING:
            self.values.pop(key, None)
        elif value is not _RICH:
            self.values[key] = _copy(value)

    def _keep(self) -> None:
        self._count = len(self.values)
        here = {k: v for k, v in self.values.items() if k not in self._skipped and not (self._simple and _is_rich(v))}
        self._keys, self._rich = list(here), self.values.keys() - here.keys()
        self._kept = list(here.values())  # the objects themselves, so that no other one can get their id
        self._mutable = [v for v in self._kept if isinstance(v, (torch.Tensor, np.ndarray, *_CONTAINERS))]
        self._marks = list(map(_mark, self._mutable))

    def changes(self) -> dict[str, Any]:
        """What was assigned, removed or written to since the last call, with the value that it had then."""
        if (
            len(self.values) == self._count
            and all(map(operator.is_, map(self.values.get, self._keys), self._kept))
            and (not self._mutable or list(map(_mark, self._mutable)) == self._marks)
        ):
            return {}
        before = dict.fromkeys(self._rich, _RICH) | dict(zip(self._keys, self._kept))
        marks = {id(v): m for v, m in zip(self._mutable, self._marks)}
        seen = {k for k, v in before.items() if v is not _RICH}
        self._keep()
        found = {}
        for key in sorted(seen | set(self._keys)):
            was, value = before.get(key, _MISSING), self.values.get(key, _MISSING)
            known = marks.get(id(was))
            if not _same(was, value) if was is not value else known is not None and _mark(was) != known:
                found[key] = _as_it_was(was, known) if was is value else was
        return found


class JobAttributes:
    """Finds, saves and restores what the job changes of itself, its model and its data sets.

    Args:
        job: the job.
        data: its data sets, by name.
    """

    def __init__(self, job: Any, data: Mapping[str, Any]):
        self._of_data = {o.name: o for o in _owners(data, [job])}
        self._of_job = {"job": _Owner("job", job, simple=True)}  # and of the model
        self._of_job = {} if any(one is job for one in data.values()) else self._of_job
        self._first: dict[str, Any] = {}  # what the job has changed, with the value that it had before
        self._elsewhere: set[str] = set()  # what changes outside of updates, so that each worker has others
        self._told: set[str] = set()
        #: Called with a sentence about what the job changed of its data and is not saved.
        self.warn: Callable[[str], None] = lambda sentence: None
        #: Called after the data changed in an update, or were restored: loader processes have them as they were.
        self.changed: Callable[[], None] = lambda: None

    def watch(self, model: nn.Module) -> None:
        """From now on this is the job's model. What model() and optimizer() set on the job is how it begins, and is not
        what an update changed."""
        own = {name: one for name, one in self._of_job.items() if name == "job"}
        set_again = _changes(own)
        self._of_job = own | {owner.name: owner for owner in _modules(model)}
        for place in set_again.keys() & self._first.keys():
            self._first[place] = _copy(self._get(place))

    def between_steps(self) -> None:
        """A step begins: what changed of the data since the last one did so as held-out samples were fetched."""
        self._elsewhere.update(_changes(self._of_data))

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """To be entered to fetch samples, between the passes of a step."""
        self._pass()
        yield
        self._elsewhere.update(_changes(self._of_data))

    def _pass(self) -> None:
        if found := _changes(self._of_data):
            self._elsewhere.update(found)
            self._tell(found, "changed in passes, of which every worker has others; change it in after_step()")

    def passed(self) -> None:
        """The passes of a step are over."""
        self._pass()
        self._elsewhere.update(_changes(self._of_job))

    def updated(self) -> None:
        """The job's after_step() has returned."""
        found = _changes(self._of_job) | _changes(self._of_data)
        if not found:
            return
        for place, was in found.items():
            self._first.setdefault(place, was)
        self._tell(
            [place for place in found if not self.is_saved(place)],
            "changed in an update, and is not saved: after a resume or a join it begins anew; set it from the saved "
            "state, in load_extra_state()",
        )
        if any(map(self._is_of_data, found)):
            self.changed()

    def _is_of_data(self, place: str) -> bool:
        return place.rpartition(".")[0] in self._of_data

    def _tell(self, places: Iterable[str], what: str) -> None:
        new = sorted(place for place in places if self._is_of_data(place) and place not in self._told)
        self._told.update(new)
        if new:
            self.warn(f"{', '.join(new[:3])}{', ...' if new[3:] else ''} {what}")

    # ---- as part of the state ----------------------------------------------------------------------------------

    def is_saved(self, place: str) -> bool:
        """Whether the job has changed it, and it is part of the state."""
        if place not in self._first or place in self._elsewhere:
            return False
        value = self._get(place)
        if value is _MISSING or getattr(value, "nbytes", 0) > _MOST_BYTES:
            return False
        if isinstance(value, _CONTAINERS) and len(value) > _MOST_ITEMS:
            return False
        try:
            encode(value, place, known={})
        except ValueRefused:
            return False
        return True

    def values(self) -> dict[str, Any]:
        """What the job has changed, by its place."""
        return {place: self._get(place) for place in sorted(self._first) if self.is_saved(place)}

    def load(self, values: Mapping[str, Any]) -> None:
        """Restore what `values` returned. What it has not is as before the job changed it."""
        for place in {**self._first, **values}:
            name, _, key = place.rpartition(".")
            if (owner := self._owner(name)) is None:
                self.warn(f"{place} is in the saved state, but there is no such thing any more")
                continue
            here = owner.values.get(key, _MISSING)
            value = values.get(place, self._first.setdefault(place, here))
            if not _same(here, value):
                owner.put(key, value)
        _changes(self._of_job)
        if _changes(self._of_data):  # of load_extra_state() too
            self.changed()

    def _owner(self, name: str) -> _Owner | None:
        return self._of_data.get(name) or self._of_job.get(name)

    def _get(self, place: str) -> Any:
        name, _, key = place.rpartition(".")
        owner = self._owner(name)
        return _MISSING if owner is None else owner.values.get(key, _MISSING)


def _changes(owners: Mapping[str, _Owner]) -> dict[str, Any]:
    return {f"{name}.{key}": was for name, owner in owners.items() for key, was in owner.changes().items()}


def _owners(data: Mapping[str, Any], others: Iterable[Any]) -> Iterator[_Owner]:
    waiting, seen = list(data.items()), {id(one) for one in others}
    found = 0
    for name, one in waiting:
        if id(one) in seen or found == _MOST_OWNERS:
            continue
        seen.add(id(one))
        if isinstance(one, (list, tuple, dict)):
            items = one.items() if isinstance(one, dict) else enumerate(one)
            waiting += [(f"{name}[{k!r}]", v) for k, v in items] if len(one) <= _MOST_ITEMS else []
        elif _is_watched(one):
            found += 1
            yield _Owner(name, one, simple=False)
            waiting += [(f"{name}.{key}", v) for key, v in vars(one).items()]


def _is_watched(one: Any) -> bool:
    if not hasattr(one, "__dict__") or isinstance(one, (type, torch.Tensor, Told)):  # the last reads ahead, at any time
        return False
    if isinstance(one, nn.Module) and next(one.parameters(), None) is not None:
        return False  # a model that makes samples
    return is_dataset(one) or is_open(one)


def _modules(model: nn.Module) -> Iterator[_Owner]:
    found = 0
    for name, module in model.named_modules():
        classes = type(module).__mro__
        if name == "" or not all(c is object or c.__module__.startswith(("torch.", "typing")) for c in classes):
            yield _Owner(f"model.{name}" if name else "model", module, simple=True)
            found += 1
        if found == _MOST_MODULES:
            return


def _is_rich(one: Any) -> bool:
    if isinstance(one, (tuple, *_CONTAINERS)):
        return _is_long(one)
    return not isinstance(one, (*_PLAIN, np.ndarray)) or getattr(one, "nbytes", 0) > _MOST_BYTES


def _is_long(one: Any) -> bool:
    items = one.values() if isinstance(one, dict) else one
    return len(one) > _MOST_ITEMS or not all(isinstance(v, _PLAIN) for v in items)


def _mark(one: Any) -> Any:
    """What is equal as long as this object has the same contents, as far as that is cheap to tell."""
    if isinstance(one, torch.Tensor):
        return version_of(one)
    if isinstance(one, np.ndarray):
        return one.tobytes() if one.nbytes <= _MOST_BYTES and not one.dtype.hasobject else None
    return len(one) if _is_long(one) else one.copy()


def _copy(one: Any) -> Any:
    return one.copy() if isinstance(one, (np.ndarray, *_CONTAINERS)) else one


def _as_it_was(one: Any, mark: Any) -> Any:
    """What was written to, as it was when it had this mark, if the mark says so."""
    if isinstance(one, np.ndarray):
        return np.frombuffer(mark, one.dtype).reshape(one.shape).copy()
    return mark if type(mark) is type(one) else one


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, (*_PLAIN, tuple)) and repr(one) == repr(other))
