"""What changes while training and is in no saved state is found in the first two updates; caches are let alone."""

from __future__ import annotations

import copy
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import elastic
from elastic.errors import ConfigError
from elastic.worker import comeback
from elastic.worker.comeback import check_comes_back
from elastic.worker.state import TrainState
from elastic.worker.unsaved import Watch


class Base(elastic.Job):
    """Keeps nothing else."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.1)


def trained(job: elastic.Job, steps: int = 3) -> list[str]:
    """What the watch warns of in some steps; the data set is a list of tensors that the job has too."""
    torch.manual_seed(0)
    model = job.model()
    state = TrainState(job, model, job.optimizer(model))
    said: list[str] = []
    watch = Watch([getattr(job, "data", None)], said.append)
    for step in range(steps):
        watch.begin(state)
        with watch.reading():
            for _ in range(2):
                model(torch.full((2, 3), float(step + 1))).sum().backward()
        watch.passed()
        state.rates.set(0, 1.0)
        state.optimizer.step()
        job.after_step(model, step + 1)
        state.check_parts()
        watch.applied(step + 1, skipped=False)
        check_comes_back(state)
        state.optimizer.zero_grad()
    assert not watch.early
    return said


class Average(Base):
    def optimizer(self, model):
        self.average = copy.deepcopy(model)
        return super().optimizer(model)

    def after_step(self, model, step):
        for mine, theirs in zip(self.average.parameters(), model.parameters()):
            mine.data.lerp_(theirs.data, 0.1)


class LateAverage(Base):
    kept: Any = None

    def after_step(self, model, step):
        now = [p.detach().clone() for p in model.parameters()]
        self.kept = {"a": now if self.kept is None else [a.lerp(b, 0.5) for a, b in zip(self.kept["a"], now)]}


class Ahead(torch.optim.SGD):
    """Slow weights beside those of an optimizer inside."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, lr=0.1)
        self.inner = torch.optim.Adam(parameters, lr=0.1)

    def step(self, closure=None):
        return self.inner.step()


class Wraps(Base):
    def optimizer(self, model):
        return Ahead(model.parameters())


class Slow(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure=None):
        super().step()
        for mine, p in zip(self.slow, self.param_groups[0]["params"]):
            mine.lerp_(p.data, 0.5)


class WrapsSlow(Base):
    def optimizer(self, model):
        return Slow(model.parameters())


class Seldom(Slow):
    """Moves them in every sixth step, as Lookahead does."""

    every = 6

    def __init__(self, params):
        super().__init__(params)
        self.steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps % self.every:
            torch.optim.SGD.step(self, closure)
        else:
            super().step(closure)


class EverySecond(Seldom):
    every = 2


class WrapsSeldom(Base):
    def __init__(self, kind):
        self.kind = kind

    def optimizer(self, model):
        return self.kind(model.parameters())


def test_what_an_optimizer_moves_seldom_is_refused_too():
    with pytest.raises(ConfigError, match=r"^optimizer\.slow\[0\] \(a Tensor\) \(and 3 more\) changed in step 2"):
        trained(WrapsSeldom(EverySecond))
    with pytest.raises(ConfigError, match=r"^optimizer\.slow\[0\] \(a Tensor\) \(and 3 more\) changed in step 16"):
        trained(WrapsSeldom(Seldom), 16)


class From(Average):
    """An average that is there from the beginning, and moves from a later step on; or one that is made in it."""

    def __init__(self, first, late):
        self.first, self.late = first, late

    def optimizer(self, model):
        self.average = None if self.late else copy.deepcopy(model)
        return Base.optimizer(self, model)

    def after_step(self, model, step):
        if step == self.first and self.late:
            self.average = copy.deepcopy(model)
        elif step >= self.first:
            super().after_step(model, step)


class FromSaved(From):
    def extra_state(self):
        return {"average": [] if self.average is None else list(self.average.parameters())}

    def load_extra_state(self, values):
        """Never called here."""


class Figures(Base):
    """Figures that are computed anew now and then, and caches of passes that begin late."""

    figures: Any = None

    def model(self):
        model = super().model()
        model.register_forward_hook(lambda module, args, out: self.look(out.detach()))
        return model

    def look(self, out):
        if self.figures is not None:
            self.last = out

    def after_step(self, model, step):
        if step in (5, 16, 32):
            self.figures = model[0].weight.detach().square().sum(0)


def test_averages_that_begin_late_are_found_later():
    with pytest.raises(ConfigError, match=r"^job\.average\.0\.bias \(a Parameter\) \(and 3 more\) changed in step 32"):
        trained(From(20, False), 32)
    with pytest.raises(ConfigError, match=r"^job\.average\.0\.bias \(a Parameter\) \(and 3 more\) changed in step 8"):
        trained(From(7, True), 9)
    assert trained(FromSaved(7, True), 32) == []
    assert trained(FromSaved(20, False), 32) == []
    (said,) = trained(Figures(), 33)
    assert said.startswith("job.figures changed since step 7 and are part of no saved state")


class Running(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.running = torch.zeros(3)

    def forward(self, x):
        self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
        return super().forward(x)


class RunningModel(Base):
    def model(self):
        return nn.Sequential(Running())


class Late(nn.Linear):
    """A running sum that begins with the first pass, in place."""

    total: Any = None

    def forward(self, x):
        if self.total is None:
            self.total = torch.zeros(3)
        self.total += x.detach().mean(0)
        return super().forward(x)


class LateModel(Base):
    def model(self):
        return nn.Sequential(Late(3, 2))


class Draws(Base):
    def __init__(self):
        self.random = random.Random(1)
        self.counts = np.zeros(3)

    def after_step(self, model, step):
        self.random.random()


class Counts(Draws):
    def after_step(self, model, step):
        self.counts = self.counts + 1


class CountsPasses(Base):
    """Has it in its saved state; `trained` calls the model, which calls this."""

    seen = 0

    def model(self):
        model = super().model()
        model.register_forward_hook(lambda *_: setattr(self, "seen", self.seen + 1))
        return model

    def extra_state(self):
        return {"seen": self.seen}

    def load_extra_state(self, values):
        self.seen = values["seen"]


class Metric:
    """As those of torchmetrics are: an object of the job's, to which `update` adds."""

    def __init__(self):
        self.total, self.count = torch.tensor(0.0), torch.tensor(0)

    def update(self, values):
        self.total += values.sum()
        self.count += len(values)


class Measures(Base):
    """Adds to a metric in passes, or draws from a generator of its own."""

    def __init__(self, what):
        self.held = what

    def model(self):
        model = super().model()
        model.register_forward_hook(lambda module, args, out: self.look(out.detach()))
        return model

    def look(self, out):
        if isinstance(self.held, Metric):
            self.held.update(out)
        else:
            torch.rand(1, generator=self.held)


class InPasses(Base):
    """Its passes, in which `trained` calls the model, change what is saved."""

    def __init__(self, what):
        self.what, self.center = what, torch.zeros(2)

    def model(self):
        model = super().model()
        model.register_forward_hook(lambda module, args, out: self.change(out.detach()))
        return model

    def optimizer(self, model):
        self.options = super().optimizer(model)
        if self.what == "scheduler":
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.options, 0.9)
        return self.options

    def change(self, out):
        if self.what == "center":
            self.center.lerp_(out.mean(0), 0.1)
        elif self.what == "scheduler":
            self.scheduler.step()
        elif self.what == "rate":
            self.options.param_groups[0]["lr"] *= 0.9
        else:
            self.options.param_groups[0]["weight_decay"] *= 0.9

    def extra_state(self):
        return {"center": self.center}


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (
            InPasses("center"),
            r"extra_state\(\): center \(a tensor\) changed in passes, of which every worker has others",
        ),
        (InPasses("scheduler"), r"job.scheduler \(a scheduler\) changed in passes, .*; change it in after_step\(\)"),
        (InPasses("rate"), r"the job set the learning rate of parameter group 0 to 0.08\d* in a pass, of which a step"),
        (InPasses("decay"), r"'weight_decay' of parameter group 0 changed in passes, of which every worker has others"),
        (
            Measures(Metric()),
            r"job\.held\.count \(a Tensor\) \(and 1 more\) .* return the sums as metrics of loss\(\) or",
        ),
        (Measures(torch.Generator()), r"job\.held \(a Generator\) .* draw from random, numpy or torch instead"),
        (Average(), r"job\.average\.0\.bias \(a Parameter\) \(and 3 more\) changed in step 1 .*extra_state\(\)"),
        (LateAverage(), r"job\.kept\['a'\]\[0\] \(a Tensor\) \(and 3 more\) changed in step 2"),
        (Wraps(), r"optimizer\.inner\.state\[0\]\['exp_avg'\] .* changed in step 2 .*keep it in optimizer\.state"),
        (WrapsSlow(), r"optimizer\.slow\[0\] \(a Tensor\) \(and 3 more\) changed in step 1"),
        (RunningModel(), r"model\.0\.running \(a Tensor\) changed in step 2 .*register it as a buffer"),
        (LateModel(), r"model\.0\.total \(a Tensor\) changed in step 2"),
        (Draws(), r"job\.random \(a Random\) changed in step 1"),
        (Counts(), r"job\.counts \(a ndarray\) changed in step 1"),
        (CountsPasses(), r"extra_state\(\)\['seen'\] changed in passes, of which every worker has others, so it"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, elastic.Job) else "",
)
def test_what_is_carried_on_and_saved_by_nobody_is_refused_by_name(job: elastic.Job, said: str):
    with pytest.raises(ConfigError, match=f"^{said}"):
        trained(job)


class Saved(Average):
    """The same, and it says so."""

    updates = 0

    def extra_state(self):
        return {"average": list(self.average.parameters()), "updates": self.updates}

    def load_extra_state(self, values):
        self.updates = values["updates"]

    def after_step(self, model, step):
        super().after_step(model, step)
        self.updates += 1


class Cached(nn.Module):
    """Caches of forward passes, a table that grew once, weights that are computed of others."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.utils.weight_norm(nn.Linear(3, 2))
        self.rnn = nn.LSTM(2, 2)
        self.table, self.seen, self.activations = torch.zeros(1), None, {}
        self.load, self.room = torch.zeros(2), torch.zeros(2, 2)  # written anew by each pass

    def forward(self, x):
        if len(self.table) < 2:
            self.table = torch.arange(2.0)
        self.seen = self.inner(x)
        self.activations["last"] = self.seen.detach()
        self.load = self.seen.detach().mean(0).to(self.load.device)
        self.room.copy_(self.seen.detach())
        return self.rnn(self.seen)[0] * self.table


class Caches(Base):
    def __init__(self):
        self.data = [torch.zeros(3) for _ in range(4)]
        self.teacher, self.log, self.options = nn.Linear(2, 2), [], SimpleNamespace(a=torch.ones(2))

    def model(self):
        return Cached()

    def optimizer(self, model):
        self.of_model = [model, dict(model.named_parameters())]
        optimizer = super().optimizer(model)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        return optimizer

    def after_step(self, model, step):
        self.log.append(float(step))
        self.scheduler.step()


def test_what_is_saved_derived_or_written_anew_is_let_alone():
    assert trained(Saved()) == []
    assert trained(Caches()) == []


class Drawing(Base):
    """It draws from a generator of its data."""

    def __init__(self):
        self.data = SimpleNamespace(generator=random.Random(0))

    def after_step(self, model, step):
        self.data.generator.random()


def test_what_an_update_draws_from_generators_of_data_is_told_once():
    (said,) = trained(Drawing())
    assert said.startswith("a SimpleNamespace of the data.generator was drawn from in an update: loader processes have")


class Numbers(Base):
    updates, other = 0, 0.0

    def __init__(self):
        self.counts = Counter()

    def after_step(self, model, step):
        self.updates += 1
        self.other += 0.5
        self.counts["steps"] = 100 + step

    def extra_state(self):
        return {"counts": self.counts}

    def load_extra_state(self, values):
        self.counts = values["counts"]


def test_numbers_that_change_are_told_once_as_they_may_not_matter():
    (said,) = trained(Numbers())

    assert said.startswith("job.other, job.updates changed in each step and are part of no saved state")


class Counting(Base):
    """Its model counts passes, in state of its own."""

    def model(self):
        class Counted(torch.nn.Linear):
            seen = 0

            def forward(self, x):
                self.seen += self.training
                return super().forward(x)

            def get_extra_state(self):
                return {"seen": self.seen}

            def set_extra_state(self, state):
                self.seen = state["seen"]

        model = super().model()
        model[0] = Counted(model[0].in_features, model[0].out_features)
        return model


def test_numbers_that_a_module_s_own_state_has_are_known():
    assert trained(Counting()) == []


class Grows(Base):
    """A layer is put into the model, or one is taken out, long after the first steps."""

    def __init__(self, more):
        self.more = more

    def after_step(self, model, step):
        model.cache = nn.Identity()  # which has nothing that is saved
        if step == 4 and self.more:
            model.append(nn.Linear(2, 2))
        elif step == 4:
            del model[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (True, r"the model has 3\.bias \(and 1 more\), which model\(\) did not make, so a resumed run or a worker"),
        (False, r"the model no longer has 1\.bias \(and 1 more\), which model\(\) makes, so the state of a resumed"),
    ],
)
def test_a_model_that_gets_or_loses_parts_is_refused_in_the_step_that_does_it(more, said):
    with pytest.raises(ConfigError, match=said):
        trained(Grows(more), 4)


class Sparse(Base):
    def model(self):
        model = super().model()
        model.register_buffer("table", torch.eye(3).to_sparse())
        return model


class Odd(Base):
    def model(self):
        model = super().model()
        model.register_buffer("table", torch.ones(3).to(torch.float8_e8m0fnu))
        return model


class Large(Base):
    def extra_state(self):
        return {"seen": list(range(10**3))}

    def load_extra_state(self, values): ...


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Sparse(), r"model/table is torch\.sparse_coo, and only dense tensors are saved"),
        (Odd(), r"'model/table' has the dtype torch\.float8_e8m0fnu; use one of"),
        (Large(), "take [0-9]* bytes, and at most 3000 are kept"),
    ],
    ids=["sparse", "odd", "large"],
)
def test_what_a_checkpoint_cannot_have_is_refused_before_there_is_one(
    job: elastic.Job, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comeback, "MAX_VALUES_BYTES", 3000)
    model = job.model()
    with pytest.raises(ConfigError, match=said):
        check_comes_back(TrainState(job, model, job.optimizer(model)))
