"""What a training state consists of comes back: of its types, in live tensors, in groups that changed meanwhile."""

from __future__ import annotations

import copy
import enum
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.config import OptimOptions
from elastic.errors import CheckpointError, ConfigError
from elastic.worker.naming import live_tensors, persistent_entries
from elastic.worker.state import TrainState
from elastic.worker.weights import weights_sha256
from tests.tiny_jobs import Plain


class Phase(enum.Enum):
    WARM = 1
    COLD = 2


@dataclass
class Note:
    phase: Phase
    at: tuple[int, ...]


class Scaled(nn.Linear):
    """Keeps scales beside its tensors, as layers of FP8 do."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.scales: dict[int, Any] = {}
        self.register_buffer("cache", None)
        self.register_buffer("seen", torch.zeros(1))

    def get_extra_state(self) -> dict[str, Any]:
        return {"scales": self.scales, "phase": Phase.COLD}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["phase"] is Phase.COLD
        self.scales = state["scales"]

    def _save_to_state_dict(self, found, prefix, keep_vars):
        super()._save_to_state_dict(found, prefix, keep_vars)
        found[prefix + "weight"] = found[prefix + "weight"].half()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.submodule, self.module = Scaled(), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.module.requires_grad_(False)


class Keeps(elastic.Job):
    """Keeps all kinds of things."""

    def __init__(self, lr: float = 0.1):
        self.lr, self.kept, self.average = lr, {"n": (1, 2), 7: Phase.WARM}, torch.zeros(2)
        self.notes: Any = [Note(Phase.WARM, (1,)), float("inf")]
        self.listed = [torch.zeros(2), torch.zeros(3)]
        self.later: torch.Tensor | None = None

    def model(self) -> nn.Module:
        return Net()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.submodule.parameters(), lr=self.lr)

    def extra_state(self) -> dict[str, Any]:
        state = {"average": self.average, "copied": self.average + 1, "kept": self.kept, "notes": self.notes}
        return {**state, "listed": self.listed, **({} if self.later is None else {"later": self.later})}

    def load_extra_state(self, values: Any) -> None:
        self.kept, self.notes, self.given = values["kept"], values["notes"], values
        self.later = values.get("later")


def made(job: elastic.Job | None = None, seed: int = 0, **options: Any) -> TrainState:
    torch.manual_seed(seed)
    job = job or Keeps()
    model = job.model()
    return TrainState(job, model, job.optimizer(model), **options)


def step(state: TrainState) -> None:
    for p in state.model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    state.rates.set(0, 1.0)
    state.optimizer.step()


def moved(source: TrainState, target: TrainState) -> TrainState:
    """The state of one in the other, as through a checkpoint."""
    values = json.loads(json.dumps(source.values(), allow_nan=False))
    target.load({n: t.detach().clone() for n, t in source.tensors().items()}, values)
    return target


def test_all_that_a_job_and_its_optimizer_keep_comes_back_of_its_types():
    one = made()
    step(one)
    weight = one.model.submodule.weight
    one.optimizer.state[weight].update(
        norms=[torch.ones(2), torch.full((1,), 2.0)], ages=(12, 78), by={3: torch.zeros(4, dtype=torch.int64)}
    )
    one.optimizer.state["calls"] = {"n": 5}
    one.job.kept, one.job.notes = {3: ("a", 1.5), "x": float("-inf")}, [Note(Phase.COLD, (1, 2))]
    one.job.average.fill_(3)
    one.job.listed[1].fill_(4)
    one.job.later = torch.arange(5)

    two = moved(one, made(seed=1))

    kept = two.optimizer.state[two.model.submodule.weight]
    assert [t.tolist() for t in kept["norms"]] == [[1, 1], [2]]
    assert kept["ages"] == (12, 78)
    assert torch.equal(kept["by"][3], torch.zeros(4, dtype=torch.int64))
    assert torch.equal(kept["exp_avg"], one.optimizer.state[weight]["exp_avg"])
    assert two.optimizer.state["calls"] == {"n": 5}
    assert two.job.kept == {3: ("a", 1.5), "x": float("-inf")}
    assert two.job.notes == [Note(Phase.COLD, (1, 2))]
    assert two.job.average.tolist() == [3, 3]
    assert two.job.listed[1].tolist() == [4, 4, 4], "what lies deeper is restored in place, where it is there"
    assert two.job.given["listed"][1] is two.job.listed[1]
    assert two.job.given["copied"].tolist() == [4, 4], "and others are given back"
    assert two.job.later.tolist() == [0, 1, 2, 3, 4]
    assert weights_sha256(two.model) == weights_sha256(one.model)
    assert two.values() == one.values()


def test_live_tensors_are_saved_and_restored_whatever_state_dict_makes_of_them():
    one, two = made(seed=0), made(seed=1)

    moved(one, two)

    assert torch.equal(two.model.submodule.weight, one.model.submodule.weight)
    assert "model/submodule.weight" in one.tensors(), "no part of a name is taken for a wrapper's"
    assert "model/module.bias" in one.tensors()


def test_names_are_without_known_wrappers_and_never_of_two_tensors():
    plain, compiled = Net(), Net()
    compiled.module = torch.compile(compiled.module)  # type: ignore[assignment]

    assert [one.name for one in live_tensors(compiled)] == [one.name for one in live_tensors(plain)]
    assert list(persistent_entries(torch.compile(plain))) == list(persistent_entries(plain))  # type: ignore[arg-type]
    compiled.module._parameters["weight"] = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match=r"two tensors of the name module\.weight once wrappers"):
        live_tensors(compiled)


def test_state_of_modules_comes_back_tensors_and_all():
    one = made()
    one.model.submodule.scales = {3: torch.full((2,), 0.5), 9: (1.0, float("nan"))}

    two = moved(one, made())

    assert two.model.submodule.scales[3].tolist() == [0.5, 0.5]
    assert type(two.model.submodule.scales[9]) is tuple


def test_buffers_may_come_grow_and_go():
    one, two = made(), made()
    one.model.submodule.cache = torch.arange(6).view(2, 3)
    one.model.submodule.seen = torch.ones(4)

    moved(one, two)

    assert torch.equal(two.model.submodule.cache, one.model.submodule.cache)
    assert two.model.submodule.seen.tolist() == [1, 1, 1, 1]
    moved(made(), two)  # an earlier state, put back
    assert two.model.submodule.cache is None
    assert two.model.submodule.seen.tolist() == [0]
    one.model.submodule.seen = None
    moved(one, two)
    assert two.model.submodule.seen is None
    assert two.values() == one.values()


def test_modes_and_what_is_trained_come_back():
    one = made()
    one.model.module.weight.requires_grad_(True)
    one.model.submodule.bias.requires_grad_(False)
    one.model.norm.eval()

    two = moved(one, made())

    assert [p.requires_grad for p in two.model.parameters()] == [p.requires_grad for p in one.model.parameters()]
    assert [m.training for m in two.model.modules()] == [m.training for m in one.model.modules()]


def test_groups_that_were_added_and_options_that_changed_come_back_and_others_are_the_job_s():
    one = made()
    one.optimizer.add_param_group({"params": list(one.model.module.parameters()), "lr": 0.01, "betas": (0.5, 0.6)})
    step(one)
    one.optimizer.param_groups[0].update(initial_lr=0.05, eps=1e-3, betas=(0.8, 0.9))
    one.optimizer.param_groups[0]["own"] = {1: (2,)}

    two = made(Keeps(lr=0.2))
    two.optimizer.param_groups[0].update(weight_decay=0.3, stale=1)
    moved(one, two)

    first, second = two.optimizer.param_groups
    assert "lr" not in one.values()["groups"][0], "rates are set by the step"
    assert (first["initial_lr"], first["eps"], first["betas"], first["own"]) == (0.05, 1e-3, (0.8, 0.9), {1: (2,)})
    assert first["weight_decay"] == 0.01, "what did not change is as optimizer() made it"
    assert "stale" not in first
    assert second["params"] == list(two.model.module.parameters())
    assert (second["initial_lr"], second["betas"]) == (0.01, (0.5, 0.6))
    moved(made(), two)  # an earlier state, put back
    assert len(two.optimizer.param_groups) == 1
    assert two.optimizer.param_groups[0]["initial_lr"] == 0.2


class Refuses(Keeps):
    def load_extra_state(self, values: Any) -> None:
        self.kept = values["no such"]


def test_a_state_that_does_not_fit_is_refused():
    values = made().values()
    tensors = made().tensors()
    with pytest.raises(CheckpointError, match=r"load_extra_state\(\) does not take the saved values: KeyError"):
        made(Refuses()).load(tensors, values)
    with pytest.raises(CheckpointError, match="states of modules does not fit: missing"):
        made().load(tensors, {**values, "modules": {}})


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            lambda s: s.optimizer.state[s.model.submodule.weight].update(f=[print]),
            r"optimizer\.state\['submodule\.weight'\]\['f'\]\[0\] is a function",
        ),
        (lambda s: s.optimizer.param_groups[0].update(f=abs), r"optimizer\.param_groups\[0\]\['f'\] is a function"),
        (lambda s: s.job.kept.update(o=object()), r"extra_state\(\)\['kept'\]\['o'\] is an object"),
        (lambda s: s.model.submodule.scales.update(o=nn.ReLU()), r"extra_state\(\) of submodule\['scales'\]\['o'\] is"),
        (lambda s: s.optimizer.state.update({torch.ones(3): {}}), r"of shape \(3,\) that is no parameter"),
        (
            lambda s: setattr(s.model.submodule, "weight", nn.Parameter(torch.ones(2, 4))),
            r"group 0 of the optimizer holds a parameter of shape \(2, 4\) that is not one of the model's",
        ),
    ],
    ids=["state", "group", "extra", "module", "other tensor", "replaced"],
)
def test_what_cannot_be_saved_is_refused_by_its_place(where: Any, said: str):
    state = made()
    step(state)
    where(state)
    with pytest.raises(ConfigError, match=said):
        state.values()


class Hidden(nn.Linear):
    def _save_to_state_dict(self, found, prefix, keep_vars):
        super()._save_to_state_dict(found, prefix, keep_vars)
        found[prefix + "observed"] = torch.ones(1)


class Forgets(Keeps):
    load_extra_state = elastic.Job.load_extra_state


class Hides(Keeps):
    def model(self) -> nn.Module:
        net = Net()
        net.hidden = Hidden(1, 1)
        return net


def test_what_would_be_lost_is_refused_before_the_first_step():
    with pytest.raises(ConfigError, match=r"extra_state\(\) returns 'copied', which is given back through load_extra"):
        made(Forgets()).values()
    with pytest.raises(ConfigError, match=r"state_dict\(\) has 'hidden\.observed' \(a Tensor\), which is neither"):
        made(Hides())


# ---- learning rates --------------------------------------------------------------------------------------------------


class Scheduled(Keeps):
    """A scheduler of torch's, stepped in after_step."""

    how: Any = staticmethod(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model)
        self.scheduler = self.how(optimizer)
        return optimizer


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)


def chained(optimizer: torch.optim.Optimizer) -> Any:
    lr = torch.optim.lr_scheduler
    parts = [lr.LinearLR(optimizer, 0.1, total_iters=3), lr.LambdaLR(optimizer, lambda n: 0.5**n)]
    return lr.SequentialLR(optimizer, parts, [4])


@pytest.mark.parametrize("how", [Scheduled.how, one_cycle, chained], ids=["StepLR", "OneCycleLR", "SequentialLR"])
def test_a_scheduler_of_torch_s_is_followed_and_goes_on_where_it_was(how: Any):
    def rates(state: TrainState, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            step(state)
            found.append(state.rates.set(0, 1.0))
            state.job.scheduler.step()
            state.rates.adopt_changes(1)
        return found

    def fresh() -> TrainState:
        job = Scheduled()
        job.how = how
        return made(job)

    expected, alone = [], fresh()
    for _ in range(8):
        expected.append(alone.optimizer.param_groups[0]["lr"])
        alone.optimizer.step()
        alone.job.scheduler.step()
    one = fresh()
    first = rates(one, 5)
    two = moved(one, fresh())

    assert first + rates(two, 3) == expected
    assert len(set(expected)) > 2


def test_a_scheduler_beside_a_schedule_or_kept_by_nobody_is_refused():
    class Lost(Keeps):
        def optimizer(self, model):
            optimizer = super().optimizer(model)
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return optimizer

    with pytest.raises(ConfigError, match=r"set twice: by job\.scheduler \(StepLR\) and by --optim\.schedule cosine"):
        made(Scheduled(), optim=OptimOptions(schedule="cosine"))
    with pytest.raises(
        ConfigError, match=r"no attribute of the job.*self\.scheduler = .*schedule\(step, total_steps\)"
    ):
        made(Lost())


def test_a_rate_that_the_job_sets_is_the_new_one_or_is_refused_where_a_schedule_would_undo_it():
    state = made()
    step(state)
    state.optimizer.param_groups[0]["lr"] = 0.025
    state.rates.adopt_changes(1)
    assert state.rates.set(0, 1.0) == 0.025
    assert moved(state, made()).rates.set(0, 1.0) == 0.025

    state = made(optim=replace(OptimOptions(), warmup="3st"))
    state.rates.set(0, 0.5)
    state.rates.adopt_changes(1)
    state.optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(ConfigError, match=r"rate of parameter group 0 to 0\.3, which --optim\.warmup 3st would set"):
        state.rates.adopt_changes(1)


def test_a_held_state_is_what_it_was_though_the_job_begins_another():
    state = made()
    step(state)
    before = copy.deepcopy(state.values())
    state.hold_extra()
    state.job.kept = {}
    state.job.optimizer(state.model)

    assert state.values() == before


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda model: list(model.parameters()),
            "returned a list or dict with a Parameter, which is no torch",
        ),
        (
            lambda model: torch.optim.LBFGS(model.parameters()),
            r"returned LBFGS, whose step\(\) computes the loss again",
        ),
    ],
)
def test_what_is_no_optimizer_for_one_update_a_step_is_refused_by_name(make, said):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=rf"^optimizer\(\) {said}"):
        TrainState(Plain(), model, make(model))


class OwnAverage(Plain):
    """Saves and restores the state_dict of a model of its own, as one does."""

    def optimizer(self, model):
        self.average = copy.deepcopy(model)
        return super().optimizer(model)

    def extra_state(self):
        return self.average.state_dict()

    def load_extra_state(self, values):
        self.average.load_state_dict(values)


def test_what_load_extra_state_is_given_is_all_that_extra_state_returned():
    one, two = made(OwnAverage()), made(OwnAverage(), seed=1)

    moved(one, two)

    assert torch.equal(two.job.average[0].weight, one.job.average[0].weight)
