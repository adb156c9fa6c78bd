"""Schedulers of torch that `scheduler()` returns are followed by the step; plateaus and patience go by evaluations."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as of_torch

from elastic.config import OptimOptions
from elastic.errors import ConfigError
from elastic.job import Job, Plan, set_plan
from elastic.worker.following import Patience, Plateau
from elastic.worker.state import TrainState
from tests.forked import configure, fault, forking_with, train
from tests.surface_jobs import Cycled, Flat, Warmed

STEPS = 9


def of_transformers(kind: str, optimizer: torch.optim.Optimizer, warmup: int, **more):
    from transformers import get_scheduler

    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, **more)


SCHEDULERS = {
    "lambda": lambda o: of_torch.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "one cycle": lambda o: of_torch.OneCycleLR(o, max_lr=0.5, total_steps=STEPS + 1),
    "warm-up, then cosine": lambda o: of_torch.SequentialLR(
        o, [of_torch.LinearLR(o, 0.1, total_iters=3), of_torch.CosineAnnealingLR(o, STEPS - 3)], [3]
    ),
    "transformers' linear": lambda o: of_transformers("linear", o, 3),
    "transformers' cosine with restarts": lambda o: of_transformers("cosine_with_restarts", o, 2),
    "transformers' warm-up, then stable, then down": lambda o: of_transformers(
        "warmup_stable_decay", o, 2, scheduler_specific_kwargs={"num_decay_steps": 3}
    ),
    "two": lambda o: [of_torch.StepLR(o, 2, 0.5), of_torch.ExponentialLR(o, 0.9)],
}


class Scheduled(Job):
    def __init__(self, make):
        self.make = make

    def scheduler(self, optimizer):
        return self.make(optimizer)


def state_of(make, several: bool = False) -> TrainState:
    model = nn.Linear(2, 2)
    one = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    other = torch.optim.SGD([model.bias], lr=0.2, momentum=0.9)
    only = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return TrainState(Scheduled(make), model, {"one": one, "other": other} if several else only)


def update(state: TrainState, step: int) -> tuple[float, float]:
    """What the update of a step (from 0) is made with."""
    rate = state.rates.set(step, 1.0)
    momentum = state.optimizer.param_groups[0]["momentum"]
    state.optimizer.step()
    state.rates.adopt_changes(step + 1)
    return rate, momentum


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates_are_those_of_a_plain_loop_wherever_it_goes_on(make):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    made = make(optimizer)
    plain = []
    for _ in range(STEPS):
        group = optimizer.param_groups[0]
        plain.append((group["lr"], group["momentum"]))
        optimizer.step()
        for one in made if isinstance(made, list) else [made]:
            one.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = state_of(make)
        rates = [update(first, step) for step in range(6)]
        tensors, values = {name: t.clone() for name, t in first.tensors().items()}, first.values()
        again = state_of(make)
        again.load(tensors, values)
        assert again.values() == values
        rates += [update(again, step) for step in range(6, STEPS)]
        assert [update(again, step) for step in (3, 4)] == plain[3:5]  # after a fall to an earlier state

    assert rates == plain


def test_several_optimizers_have_one_scheduler_each():
    def make(optimizers):
        return [of_torch.StepLR(optimizers["one"], 1, 0.5), of_torch.StepLR(optimizers["other"], 2, 0.1)]

    state = state_of(make, several=True)
    for step in range(3):
        update(state, step)

    assert [group["lr"] for group in state.optimizer.param_groups] == pytest.approx([0.0125, 0.02])


def test_what_cannot_be_followed_is_refused():
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    plateau = of_torch.ReduceLROnPlateau
    for make, words in (
        (lambda o: 0.5, "scheduler\\(\\) returned a float; return a scheduler of torch"),
        (lambda o: of_torch.StepLR(other, 1), "returned a StepLR of another optimizer"),
        (lambda o: [plateau(o), of_torch.StepLR(o, 1)], "a ReduceLROnPlateau beside others"),
    ):
        with pytest.raises(ConfigError, match=words):
            state_of(make)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = Scheduled(SCHEDULERS["lambda"])
    with pytest.raises(ConfigError, match=r"set twice: by scheduler.* and by --optim.schedule cosine; leave one out"):
        TrainState(job, model, optimizer, optim=OptimOptions(schedule="cosine"))
    state = state_of(SCHEDULERS["lambda"])
    state.rates.set(0, 1.0)
    state.optimizer.param_groups[0]["lr"] = 3.0
    with pytest.raises(ConfigError, match="the job set the learning rate of parameter group 0 to 3, which scheduler"):
        state.rates.adopt_changes(1)


def test_a_job_is_told_its_plan_unless_it_has_one_of_its_own():
    class Own(Job):
        plan = "mine"

    job, own = Job(), Own()
    set_plan(job, Plan(12, 30, 100))
    set_plan(job, Plan(24, 50, 100))
    set_plan(own, Plan(12, 30, 100))

    assert (job.plan.total_steps, job.plan.steps_per_epoch, own.plan) == (24, 2.0, "mine")


def plateau() -> Plateau:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    return Plateau(of_torch.ReduceLROnPlateau(optimizer, factor=0.5, patience=1))


@pytest.mark.parametrize("make", [plateau, partial(Patience, 2, 0.1)], ids=["plateau", "patience"])
@given(
    values=st.lists(st.sampled_from([1.0, 1.05, 2.0, 0.5]), min_size=1, max_size=8),
    doubled=st.sets(st.integers(0, 7)),
    moved=st.integers(0, 7),
)
def test_what_was_decided_can_be_decided_again_and_moves(make, values, doubled, moved):
    """At any evaluation, by a member that had decided, and by one that gets the state of another."""
    plain, other = make(), make()
    for step, value in enumerate(values):
        plain.decide(step, value)
        if step in doubled:
            other.decide(step, 9.0)
        other.decide(step, value)
        if step == moved:
            before, other = other, make()
            other.load_state_dict(before.state_dict())

    assert other.state_dict() == plain.state_dict()


def test_patience_ends_after_so_many_figures_that_are_no_better():
    patience = Patience(2, 0.1, "max")

    said = [patience.decide(step, value) for step, value in enumerate([1.0, 1.2, 1.25, 1.28])]

    assert said == ["", "", "", "no better than 1.2 in 2 evaluations"]
    assert patience.over


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_follows_its_scheduler_through_losses_pauses_and_strategies(tmp_path):
    options = {"optim__schedule": "constant", "optim__warmup": None}
    whole = train(Cycled(), configure(tmp_path, "whole", **options), workers=1)
    cut = {"parallel__strategy": "fsdp", **options}
    train(Cycled(), configure(tmp_path, "cut", **cut, run__stop_after="5st"), workers=1)
    lost = train(Cycled(), configure(tmp_path, "cut", **cut), 2, faults=[fault("step.before_fence", step=9, rank=1)])

    assert whole.column("lr")[0] == pytest.approx(0.004)
    assert whole.column("lr")[-1] < 0.01 < max(whole.column("lr"))
    assert lost.column("lr") == whole.column("lr")
    assert lost.sha == whole.sha


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_follows_a_scheduler_of_transformers_through_a_kill_and_a_resume(tmp_path):
    options = {"optim__schedule": "constant", "optim__warmup": None}
    with forking_with("transformers.optimization"):
        whole = train(Warmed(), configure(tmp_path, "whole", **options), 1)
        paused = configure(tmp_path, "run", **options, run__stop_after="7st")
        train(Warmed(), paused, 2, faults=[fault("step.before_fence", step=3, rank=0)])
        ran = train(Warmed(), configure(tmp_path, "run", **options), 2)

    rates = [0.01 * (s / 3 if s < 3 else (1 + math.cos(math.pi * (s - 3) / 9)) / 2) for s in range(12)]
    assert whole.column("lr") == pytest.approx(rates)
    assert ran.events("member_lost")
    assert ran.column("lr") == whole.column("lr")
    assert ran.sha == whole.sha


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_plateaus_and_patience_decide_alike_through_losses_and_resumes(tmp_path):
    """The figure is no better from step 6 on: the rate is halved at each, and at the third the run ends early."""
    options = {"optim__schedule": "constant", "optim__warmup": None, "eval__every": "2st", "eval__patience": 3}
    name = {"checkpoint__best_metric": "eval/near/loss"}
    whole = train(Flat(), configure(tmp_path, "whole", **options, **name), workers=1)

    paused = {**options, **name, "run__stop_after": "6st"}
    train(Flat(), configure(tmp_path, "run", **paused), 2, faults=[fault("eval.begin", step=4, rank=1)])
    ran = train(Flat(), configure(tmp_path, "run", **options, **name), 2)
    again = train(Flat(), configure(tmp_path, "run", **options, **name), 1)

    assert whole.column("lr") == [0.01] * 6 + [0.005] * 2 + [0.0025] * 2
    assert ran.column("lr") == whole.column("lr")
    assert (whole.result["status"], whole.result["steps"]) == ("finished", 10)
    assert "ended early: eval/near/loss" in ran.result["message"]
    assert ran.sha == whole.sha == again.sha
    assert [e["step"] for e in whole.events("rate_reduced")] == [6, 8, 10]
    assert [e["step"] for e in whole.events("stops_early")] == [10]
    assert again.result["steps"] == 10
