"""Finds state that is not saved: objects of the job, optimizer or model besides their known state that training
changes.

It looks during the first two updates of a process, and again in the 16th, 32nd, 64th and so on, since slow weights move
rarely and averages may begin late; also when the job gets an attribute of another class. It cannot see what a tensor is
for, only when it changes. A change in an update (`optimizer.step()`, `after_step()`) carries over to the next update. A
change in forward passes carries over if later passes read what earlier ones left there; otherwise it is a cache.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from elastic.compat.torch import is_compiled
from elastic.data.samples import nested_datasets
from elastic.errors import ConfigError
from elastic.parallel.wrapping import local
from elastic.seeds import seed_all
from elastic.worker.belongings import GENERATORS, Attributes, Leaf, digest, leaves, movable
from elastic.worker.naming import with_state_of_their_own
from elastic.worker.state import TrainState
from elastic.worker.touched import OnCut, Reads

UPDATES = 2  # that are examined
LATER = 16  # the update in which it looks again; then in that of twice, four, ... times its number
ATTRIBUTES = 8  # how often new attributes of the job are a reason to look
_SHOWN = 5


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
        exact: the run is bitwise.
    """

    def __init__(self, data: Iterable[Any], warn: Callable[[str], None], *, exact: bool = False):
        self._data, self._warn, self._exact = list(data), warn, exact
        self._state: TrainState | None = None
        self._before: Look = {}
        self._passed: Look | None = None
        self._after: Look = {}
        self._extra: Look = {}  # what extra_state() had when the first step began
        self._saved: dict[str, str] = {}  # and what is saved that passes are not to change, when a step began
        self._moved: set[str] = set()  # in its passes
        self._reads: Reads | None = None
        self._on_cut = OnCut()
        self._of_data: dict[str, tuple[bool, str]] = {}  # before the update
        self._data_told = False  # that it changes them
        self._left = UPDATES
        self._updates = 0  # that are done
        self._rare: dict[str, str] = {}  # digests of what had not changed at the last look
        self._rare_step = 0
        self._rare_of: weakref.ref[TrainState] | None = None  # the state to which these digests belong
        self._told: set[str] = set()
        self._classes: list[type] = []  # of the job's attributes
        self._new = ATTRIBUTES

    @property
    def early(self) -> bool:
        """Whether the first updates of the process are still to be examined."""
        return self._left > 0

    def begin(self, state: TrainState) -> None:
        """A step begins."""
        if not self._left:
            number = self._updates + 1
            looks = number >= LATER and not number & (number - 1)
            if self._new and self._classes != (classes := _classes_of(state.job)):
                self._classes, self._new, looks = classes, self._new - 1, True
            if looks:
                self._state = state
                self._before = self._look()
            return
        if self._state is not state:  # the model was built again
            self._state, self._left, self._after = state, UPDATES, {}
            self._before = self._look()
            self._extra = self._look_at_extra()
        self._saved = self._look_at_saved()

    def reading(self) -> AbstractContextManager[Any]:
        """To be entered for the passes of a step: records whether they read what earlier passes left."""
        if self._left != 1 or self._state is None or any(map(is_compiled, self._state.model.modules())):
            return nullcontext()
        left = [self._after[name].leaf for name in self._moved if name in self._after]
        if not any(isinstance(leaf, torch.Tensor) for leaf in left):
            return nullcontext()
        self._reads = Reads({id(leaf) for leaf in left})
        return self._reads

    def updating(self) -> AbstractContextManager[Any]:
        """To be entered for the update of a step: records what it does with sharded parameters."""
        if not self._left or self._state is None or self._state.mesh is None:
            return nullcontext()
        return self._on_cut

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
        if self._state is None:
            return
        self._passed = self._look()
        if not self._left:
            return
        self._of_data = self._look_at_data()
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
        self._updates += not skipped
        if not self._left:
            self._look_again(step, skipped=skipped)
            return
        if self._state is None or self._passed is None:
            return
        now, passed, self._passed = self._look(), self._passed, None
        if skipped:
            return
        if self._on_cut.drew:
            raise ConfigError(
                "optimizer.step() or after_step() draws random numbers for sharded parameters "
                f"({self._on_cut.drew}), of which every worker has other rows, so they depend on the number of "
                "workers; use --parallel.strategy ddp"
            )
        if self._exact and self._on_cut.summed:
            raise ConfigError(
                "optimizer.step() or after_step() sums over the rows of sharded parameters "
                f"({self._on_cut.summed}), in parts whose size depends on the number of workers, and so do the last "
                "bits; clip with --optim.clip-norm, or use --parallel.strategy ddp or --run.exactness fast"
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
            self._before, self._classes = {}, _classes_of(self._state.job)
            self._compare_from_now_on(now, self._moved | _changed(self._after, passed), step)
        self._after = now if self._left else {}

    def _compare_from_now_on(self, now: Look, moved: set[str], step: int) -> None:
        """What there is now and passes do not change is compared at the next look; the state is held no longer."""
        assert self._state is not None
        self._rare = {n: seen.digest for n, seen in now.items() if n not in moved and not seen.is_number}
        self._rare_step, self._rare_of, self._state = step, weakref.ref(self._state), None

    def _look_again(self, step: int, *, skipped: bool) -> None:
        """An update long after the first ones is done."""
        before, self._before = self._before, {}
        passed, self._passed = self._passed, None
        if skipped or self._state is None or passed is None:
            self._state = None
            return
        now, known = self._look(), self._known()
        if self._rare_of is None or self._rare_of() is not self._state:  # they are of a model that is gone
            self._rare = {}
        moved = _changed(before, passed) | (passed.keys() - before.keys())
        kept = self._kept()
        here = {
            n: seen
            for n, seen in now.items()
            if not seen.is_number and n.partition("[")[0] not in kept and not _is_known(seen.leaf, known)
        }
        carried = {n for n in _changed(passed, now) & here.keys() if now[n].leaf is passed[n].leaf}
        rare = {n for n, was in self._rare.items() if n in here and n not in moved and here[n].digest != was}
        held = {n for n in rare | carried if not _is_derived(here[n].leaf)}
        # an optimizer has no caches of passes; a tensor put in another's place may be a figure of now and then
        if wrong := sorted(n for n in held if n.startswith("optimizer") or n in carried):
            raise ConfigError(_problem(wrong, now, step))
        if new := sorted(held - self._told):
            self._told.update(new)
            self._warn(
                f"{', '.join(new[:_SHOWN])} changed since step {self._rare_step} and are part of no saved state: after "
                "a resume or a join they begin anew; if they matter, return them from extra_state()"
            )
        self._compare_from_now_on(now, moved, step)

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

    def _kept(self) -> set[str]:
        """The places of the job's attributes that are saved, as updates change them."""
        assert self._state is not None
        attributes = self._state.attributes
        return set() if attributes is None else set(attributes.values())

    def _report_numbers(self, first: Look, second: Look, third: Look) -> None:
        assert self._state is not None
        saved = _numbers(self._state.job.extra_state())
        for module in with_state_of_their_own(self._state.model).values():
            saved |= _numbers(module.get_extra_state())
        kept = self._kept()
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


def _classes_of(job: object) -> list[type]:
    return list(map(type, vars(job).values()))


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
