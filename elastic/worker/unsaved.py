"""Finds state that is not saved: objects of the job, optimizer or model besides their known state that training
changes.

It looks during the first two updates of a process, and once more 16 updates later, since slow weights move rarely. It
cannot see what a tensor is for, only when it changes. A change in an update (`optimizer.step()`, `after_step()`)
carries over to the next update. A change in forward passes carries over if later passes read what earlier ones left
there; otherwise it is a cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from elastic.compat.torch import is_compiled
from elastic.data.samples import nested_datasets
from elastic.errors import ConfigError
from elastic.parallel.wrapping import local
from elastic.seeds import seed_all
from elastic.worker.belongings import GENERATORS, Attributes, Leaf, digest, leaves, movable
from elastic.worker.naming import with_state_of_their_own
from elastic.worker.state import TrainState

UPDATES = 2  # that are examined
LATER = 14  # updates after those, after which rare changes are looked for once more
_SHOWN = 5
#: Names of tensor operations that read no values, or overwrite all of them.
_NO_READS = {
    "__get__",
    "__len__",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_contiguous",
    "copy_",
    "zero_",
    "fill_",
    "data_ptr",
    "detach",
    "requires_grad_",
}


@dataclass(frozen=True)
class _Seen:
    """A value at one moment."""

    leaf: Leaf
    digest: str

    @property
    def is_number(self) -> bool:
        return isinstance(self.leaf, (int, float))


Look = dict[str, _Seen]


class Watch:
    """Examines everything that is held: before a step, between its passes and its update, and after the update.

    Args:
        data: data sets, which are not searched.
        warn: called once with a sentence about numbers that change, and may or may not matter.
    """

    def __init__(self, data: Iterable[Any], warn: Callable[[str], None]):
        self._data, self._warn = list(data), warn
        self._state: TrainState | None = None
        self._before: Look = {}
        self._passed: Look | None = None
        self._after: Look = {}
        self._extra: Look = {}  # what extra_state() had when the first step began
        self._saved: dict[str, str] = {}  # and what is saved that passes are not to change, when a step began
        self._moved: set[str] = set()  # in its passes
        self._reads: _Reads | None = None
        self._draws = _Draws()
        self._of_data: dict[str, tuple[bool, str]] = {}  # before the update
        self._data_told = False  # that it changes them
        self._left = UPDATES
        self._later, self._rare = 0, dict[str, str]()  # updates until the last look, and digests of unchanged values
        self._same: TrainState | None = None  # the state to which these digests belong

    @property
    def done(self) -> bool:
        return self._left == 0 and self._later == 0

    def begin(self, state: TrainState) -> None:
        """A step begins."""
        if state is not self._same:
            self._later, self._same = 0, None
        if self._left and self._state is not state:  # the model was built again
            self._state, self._left, self._after = state, UPDATES, {}
            self._before = self._look()
            self._extra = self._look_at_extra()
        if self._left and self._state is not None:
            self._saved = self._look_at_saved()

    def reading(self) -> AbstractContextManager[Any]:
        """To be entered for the passes of a step: records whether they read what earlier passes left."""
        if self._left != 1 or self._state is None or any(map(is_compiled, self._state.model.modules())):
            return nullcontext()
        left = [self._after[name].leaf for name in self._moved if name in self._after]
        if not any(isinstance(leaf, torch.Tensor) for leaf in left):
            return nullcontext()
        self._reads = _Reads({id(leaf) for leaf in left})
        return self._reads

    def updating(self) -> AbstractContextManager[Any]:
        """To be entered for the update of a step: records whether it draws random numbers for sharded parameters."""
        if not self._left or self._state is None or self._state.mesh is None:
            return nullcontext()
        return self._draws

    def _was_read(self, leaf: Leaf) -> bool:
        if not isinstance(leaf, torch.Tensor):
            return True  # reads of other objects cannot be seen
        return self._reads is not None and id(leaf) in self._reads.seen

    def passed(self) -> None:
        """The passes of the step are done, and nothing of its update is.

        Raises:
            ConfigError: what extra_state() returns, a scheduler of torch's or an option of a group changes in passes,
                so it would depend on how many a worker has.
        """
        if not self._left or self._state is None:
            return
        self._passed, self._of_data = self._look(), self._look_at_data()
        now = self._look_at_saved()
        moved = [name for name, was in self._saved.items() if now.get(name, was) != was]
        if self._left == UPDATES:
            moved += sorted(_changed(self._extra, self._look_at_extra()))
        if moved:
            raise ConfigError(
                f"{moved[0]} changed in passes, of which every worker has others, so it depends on the number of "
                "workers; change it in after_step(), or make it a buffer of the model"
            )

    def applied(self, step: int, *, skipped: bool) -> None:
        """The update of the step is done.

        Raises:
            ConfigError: something changed that is in no saved state; with its place, and what to do.
        """
        if self._later:
            self._look_later(step)
        if not self._left or self._state is None or self._passed is None:
            return
        now, passed, self._passed = self._look(), self._passed, None
        if skipped:
            return
        if self._draws.seen:
            raise ConfigError(
                "optimizer.step() or after_step() draws random numbers for sharded parameters "
                f"({self._draws.seen}), of which every worker has other rows, so they depend on the number of workers; "
                "use --parallel.strategy ddp"
            )
        self._report_data()
        self._left -= 1
        carried = _changed(passed, now)
        if self._left:  # this was the first update
            found = carried & self._before.keys()
            self._moved = (_changed(self._before, passed) | (passed.keys() - self._before.keys())) & now.keys()
        else:
            moved = _changed(self._after, passed) & self._moved
            found = (carried & self._after.keys()) | {name for name in moved if self._was_read(self._after[name].leaf)}
        known = self._known()
        tensors = sorted(n for n in found if n in now and not now[n].is_number and not _is_known(now[n].leaf, known))
        if tensors:
            raise ConfigError(_problem(tensors, now, step, in_passes=tensors[0] not in carried))
        if not self._left:
            self._report_numbers(self._before, self._after, now)
            unmoved = now.keys() - self._moved - _changed(self._after, passed)
            self._rare = {n: now[n].digest for n in unmoved if not now[n].is_number}
            self._later, self._same = LATER, self._state
            self._state, self._before, self._data = None, {}, []
        self._after = now if self._left else {}

    def _look_later(self, step: int) -> None:
        self._later -= 1
        if self._later:
            return
        self._state, self._same = self._same, None
        now = self._look()
        names = sorted(n for n, was in self._rare.items() if n in now and now[n].digest != was)
        self._state, self._rare = None, {}
        held = [n for n in names if not _is_derived(now[n].leaf)]
        if any(n.startswith("optimizer") for n in held):  # an optimizer has no caches of passes
            raise ConfigError(_problem([n for n in held if n.startswith("optimizer")], now, step))
        if held:
            self._warn(
                f"{', '.join(held[:_SHOWN])} changed since step {step - LATER} and are part of no saved state: after a "
                "resume or a join they begin anew; if they matter, return them from extra_state()"
            )

    def _look(self) -> Look:
        assert self._state is not None
        job, optimizer = self._state.job, self._state.optimizer
        held = [*self._data, *self._state.rates.schedulers.values()]
        roots = {"job": Attributes(job), "optimizer": optimizer, "model": self._state.model}
        found = leaves(roots, map(id, held), optimizer)
        known = self._known()
        return {n: _Seen(leaf, digest(leaf)) for n, leaf in found.items() if not _is_known(leaf, known)}

    def _look_at_data(self) -> dict[str, tuple[bool, str]]:
        found = movable(
            {f"a {type(p).__qualname__} of the data": p for data in self._data for p in nested_datasets(data)}
        )
        return {name: one for name, one in found.items() if one[0]}  # generators

    def _report_data(self) -> None:
        """Warn of random numbers that an update draws from generators of the data; see `attributes` for others."""
        now = self._look_at_data()
        names = [name for name, was in self._of_data.items() if now.get(name, was) != was]
        if names and not self._data_told:
            self._data_told = True
            self._warn(
                f"{', '.join(sorted(names)[:_SHOWN])} was drawn from in an update: loader processes have it as it was, "
                "and after a resume or a join it begins anew; draw from random, numpy or torch instead"
            )

    def _look_at_extra(self) -> Look:
        assert self._state is not None
        seed_all(0)  # positions of random generators are no state of the job, since passes and updates seed them
        found, known = leaves({"extra_state()": self._state.job.extra_state()}, (), None), self._known()
        return {n: _Seen(leaf, digest(leaf)) for n, leaf in found.items() if not _is_known(leaf, known)}

    def _look_at_saved(self) -> dict[str, str]:
        """Schedulers, options of groups but their rates, and tensors of extra_state() that are none of the model's."""
        assert self._state is not None
        model = self._state.model
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        tensors, values = self._state.collect()
        extra = {
            f"{name.replace('extra/', 'extra_state(): ', 1)} (a tensor)": digest(tensor)
            for name, tensor in tensors.items()
            if name.startswith("extra/") and id(tensor) not in own
        }
        schedulers = {f"{name} (a scheduler)": json.dumps(value) for name, value in values["schedulers"].items()}
        groups = {
            f"{key!r} of parameter group {i}": json.dumps(value)
            for i, group in enumerate(values["groups"])
            for key, value in group.items()
        }
        return schedulers | groups | extra

    def _known(self) -> set[int]:
        """The memory addresses of the tensors of the saved state."""
        assert self._state is not None
        model = self._state.model
        elsewhere = {id(p) for name, p in self._state.parameters().items() if name in self._state.sources}
        trained = [p for p in model.parameters() if id(p) not in elsewhere]
        tensors = [*self._state.tensors().values(), *trained, *model.buffers()]
        return {_place(t) for t in tensors} | {id(t) for t in tensors}

    def _report_numbers(self, first: Look, second: Look, third: Look) -> None:
        assert self._state is not None
        saved = _numbers(self._state.job.extra_state())
        for module in with_state_of_their_own(self._state.model).values():
            saved |= _numbers(module.get_extra_state())
        kept = self._state.attributes.values() if self._state.attributes is not None else {}
        names = [
            n
            for n in third
            if third[n].is_number
            and n.partition("[")[0] not in kept
            and n in second
            and third[n].digest != second[n].digest
            and (n not in first or second[n].digest != first[n].digest)
            and n.rpartition(".")[2] not in saved
            and third[n].leaf not in saved.values()
        ]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            self._warn(
                f"{', '.join(sorted(names)[:_SHOWN])}{more} changed in each step and are part of no saved state: after "
                "a resume or a join they begin anew; if they matter, return them from extra_state()"
            )


class _Draws(TorchFunctionMode):
    """Records an operation on sharded tensors that draws random numbers."""

    seen = ""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(one, DTensor) for one in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        before = torch.get_rng_state()
        result = function(*args, **kwargs)
        if not self.seen and not torch.equal(before, torch.get_rng_state()):
            self.seen = getattr(function, "__name__", "an operation")
        return result


class _Reads(TorchFunctionMode):
    """Records which of some tensors are inputs of operations."""

    def __init__(self, watched: set[int]):
        super().__init__()
        self._watched = watched
        self.seen: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name not in _NO_READS:
            for one in [*args, *kwargs.values()]:
                for inner in one if isinstance(one, (list, tuple)) else (one,):
                    if id(inner) in self._watched:
                        self.seen.add(id(inner))
        return function(*args, **kwargs)


def _changed(before: Look, now: Look) -> set[str]:
    both = now.keys() & before.keys()
    return {n for n in both if before[n].digest != now[n].digest and not _is_derived(now[n].leaf)}


def _is_derived(leaf: Leaf) -> bool:
    """Whether it is part of a graph: computed from parameters in a forward pass, as by weight_norm."""
    return isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None


def _place(tensor: torch.Tensor) -> int:
    here = local(tensor)
    return here.untyped_storage().data_ptr() if here.layout is torch.strided and not here.is_meta else id(tensor)


def _is_known(leaf: Leaf, known: set[int]) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return False
    return id(leaf) in known or (local(leaf).numel() > 0 and _place(leaf) in known)


def _numbers(extra: Any) -> dict[str, Any]:
    """By their names, and those inside by their places."""
    items = extra.items() if isinstance(extra, Mapping) else {"": extra}.items()
    inside = leaves({"": extra}, (), None)
    return {k: v for k, v in [*inside.items(), *items] if type(v) in (int, float)}


def _problem(names: list[str], now: Look, step: int, *, in_passes: bool = False) -> str:
    name, leaf = names[0], now[names[0]].leaf
    more = f" (and {len(names) - 1} more)" if names[1:] else ""
    what = f"{name} (a {type(leaf).__name__}){more} changed in step {step} and is part of no saved state"
    if in_passes and isinstance(leaf, GENERATORS):
        return (
            f"{what}; passes draw from it, of which every worker has others: draw from random, numpy or torch instead, "
            "which are seeded for each pass"
        )
    if in_passes and not name.startswith("model"):
        return (
            f"{what}; passes change it, of which every worker has others: of a metric return the sums as metrics of "
            "loss() or evaluate(), which are divided by the weight, and register what later passes need as a buffer "
            "of the model"
        )
    if name.startswith("optimizer"):
        way = "keep it in optimizer.state, under the parameter that it belongs to, or use an optimizer that does"
    elif name.startswith("model"):
        way = "register it as a buffer, or return it from get_extra_state()"
    else:
        way = "return it from extra_state(), or register it as a buffer of the model"
    return f"{what}, so a resumed run or a worker that joins would go on without it; {way}"
