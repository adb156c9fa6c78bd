"""What jobs do with their model while they train: at every world size, in fast and in bitwise, the losses are those of
a plain loop, or the job is refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import distributed as dist
from torch.distributed import get_world_size

from elastic.data.order import sample_ids
from tests.forked import B, Ran, configure, train
from tests.tiny_jobs import CLASSES, FEATURES, Plain

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]

STEPS, PASS = 6, 3
OPTIONS = {
    "run__duration": f"{STEPS}st",
    "optim__schedule": "constant",
    "optim__warmup": None,
    "optim__clip_norm": None,
}


def run(job: Any, folder: Any, workers: int, **options: Any) -> Ran:
    name = "-".join([type(job).__name__, str(workers), *map(str, options.values())]).replace("/", "")[:90]
    ran = train(job, configure(folder, name, **{**OPTIONS, **options}), workers)
    assert ran.failure is None, ran.failure
    assert ran.events("member_lost") == []
    return ran


def plain_losses(job: Plain) -> list[float]:
    """The mean losses of a loop of torch's own, from the values that this project starts from."""
    import torch

    from elastic.parallel.deferred import build
    from elastic.parallel.wrapping import place_whole

    torch.manual_seed(0)
    model, data = place_whole(build(job.model, 0), torch.device("cpu")), job.train_data()
    optimizer, losses = job.optimizer(model), []
    for step in range(STEPS):
        ids = sample_ids(0, len(data), np.arange(step * B, (step + 1) * B)).tolist()
        optimizer.zero_grad()
        mean = 0.0
        for i in range(0, B, PASS):
            total, _, _ = job.loss(model, job.collate_fn([data[j] for j in ids[i : i + PASS]]))
            (total / B).backward()
            mean += float(total.detach()) / B
        optimizer.step()
        job.after_step(model, step + 1)
        losses.append(mean)
    return losses


@dataclass
class Quiet(Plain):
    """Without noise in its samples and with plain SGD."""

    def train_data(self):
        data = super().train_data()
        data.noise = 0.0
        return data

    def optimizer(self, model):
        import torch

        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@dataclass
class SpareHead(Quiet):
    """A parameter that the loss never uses."""

    def model(self):
        model = super().model()
        model.spare = __import__("torch").nn.Linear(4, 2)
        model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
        return model


@dataclass
class Branches(Quiet):
    """A branch that only some batches take, and one that is taken from step 3 on."""

    def model(self):
        from torch import nn

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.always = nn.Linear(FEATURES, CLASSES)
                self.sometimes, self.late = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
                self.updates = 0

            def forward(self, x):
                taken = bool(x[0, 0] > 0.3)
                return self.always(x) + (self.sometimes(x) if taken else 0) + (self.late(x) if self.updates >= 3 else 0)

        return Network()

    def after_step(self, model, step):
        model.updates = step


@dataclass
class Unfreezes(Quiet):
    """A layer that is frozen at first, and trained from step 3 on, when another one is frozen."""

    once: bool = field(default=False, metadata={"help": "say so in that step alone"})

    def model(self):
        model = super().model()
        model[0].requires_grad_(False)
        return model

    def after_step(self, model, step):
        if not self.once or step == 3:
            model[0].requires_grad_(step >= 3)
            model[4].requires_grad_(step < 3)


@dataclass
class PastForward(Quiet):
    """Its loss calls methods of the model beside forward(), and reads attributes."""

    def model(self):
        from torch import nn

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head, self.temperature = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), 2.0

            def encode(self, x):
                return self.body(x).relu()

            def forward(self, x):
                return self.head(self.encode(x))

        return Network()

    def logits(self, model, features, ids):
        assert type(model).__name__ == "Network"
        return model.head(model.encode(features)) / model.temperature


@dataclass
class Distributed(Quiet):
    """Written for torchrun: it goes by the world size and the rank."""

    told: bool = field(default=True, metadata={"help": "there is something to go by"})
    sums: bool = field(default=False, metadata={"help": "sum over the workers itself"})

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        if self.sums:
            dist.all_reduce(weight := total.detach().clone())
        if dist.is_initialized():
            total = total * 3
        if self.told:
            share = dist.get_world_size() if "WORLD_SIZE" in os.environ else get_world_size()
            total = total * share + dist.get_rank()
        return total, weight, metrics


@dataclass
class Guarded(Quiet):
    """Leaves out some microbatches with a loss that was made of no parameter; from step 3 on, the last of a worker."""

    def __post_init__(self):
        self.steps = 0

    def after_step(self, model, step):
        self.steps = step

    def loss(self, model, batch):
        import torch

        if model.training and torch.is_grad_enabled() and self.steps >= 2 and int(batch[2][0]) % 2:
            return torch.zeros(1, requires_grad=True).sum(), len(batch[2]), {"accuracy": 0}
        return super().loss(model, batch)


@dataclass
class Sparse(Quiet):
    """An embedding whose gradients are sparse."""

    def optimizer(self, model):
        import torch

        return torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def model(self):
        from torch import nn

        return nn.EmbeddingBag(50, CLASSES, sparse=True)

    def logits(self, model, features, ids):
        return model((features.abs() * 10).long() % 50)


@dataclass
class Normalised(Quiet):
    """BatchNorm, and a table of floats that no pass writes to."""

    def model(self):
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
        model.register_buffer("table", torch.linspace(0, 1, 12))
        return model

    def sample(self, model, step):
        return f"{int(model[1].num_batches_tracked)} batches"


@pytest.mark.parametrize("job", [SpareHead(), Branches(), Guarded()], ids=["never", "sometimes", "none at all"])
def test_parameters_without_gradient_train_as_with_one_worker(job, tmp_path):
    """Which passes use a parameter is found in the step where one does not, and said once."""
    expected = plain_losses(type(job)())
    fast = {"run__exactness": "fast", "batch__pass_size": PASS}

    found = [run(job, tmp_path, workers, **fast) for workers in (1, 2, 3)]

    for ran in found:
        assert ran.column("loss") == pytest.approx(expected, rel=1e-5)
    said = [[e["detail"] for e in ran.events("unused_parameters")] for ran in found]
    assert not said[0]
    assert all(
        any(
            name in details[0]
            for name in ("spare.weight", "sometimes.weight", "late.weight", "all parameters", "0.bias")
        )
        for details in said[1:]
    )


def test_a_cut_model_that_some_passes_do_not_call_is_refused_by_name(tmp_path):
    ran = train(Guarded(), configure(tmp_path, "run", parallel__strategy="fsdp", run__exactness="fast"), 2)

    assert (ran.failure or "").startswith("loss() returned without a call of the model for some microbatches")
    assert ran.column("step") == [1, 2]


@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
def test_a_layer_is_trained_from_the_step_in_which_it_is_unfrozen_and_until_it_is_frozen(exactness, tmp_path):
    expected = plain_losses(Unfreezes())
    options = {"run__exactness": exactness}

    found = [run(Unfreezes(), tmp_path, workers, **options) for workers in (1, 2)]
    found += [run(Unfreezes(once=True), tmp_path, 3, **options)]
    found += [run(Unfreezes(once=True), tmp_path, 2, parallel__strategy="fsdp", **options)]

    for ran in found:
        assert ran.column("loss") == pytest.approx(expected, rel=1e-5)
    if exactness == "bitwise":
        assert len({ran.sha for ran in found}) == 1


def test_a_loss_may_call_whatever_the_model_has(tmp_path):
    expected = plain_losses(PastForward())

    for exactness in ("fast", "bitwise"):
        ran = run(PastForward(), tmp_path, 2, run__exactness=exactness)
        assert ran.column("loss") == pytest.approx(expected, rel=1e-5)


def test_a_job_that_goes_by_the_world_size_is_told_that_it_is_alone(tmp_path, monkeypatch):
    expected = plain_losses(Distributed(told=False))
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = {"run__exactness": "fast", "batch__pass_size": PASS}

    for workers, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        ran = run(Distributed(), tmp_path, workers, parallel__strategy=strategy, **options)
        assert ran.column("loss") == pytest.approx(expected, rel=1e-5)
    ran = train(Distributed(sums=True), configure(tmp_path, "sums", **options), 2)
    assert "the job calls torch.distributed.all_reduce() (" in (ran.failure or "")
    assert ran.rows == []


def test_sparse_gradients_are_summed_by_ddp(tmp_path):
    expected = plain_losses(Sparse())

    for workers in (1, 2):
        ran = run(Sparse(), tmp_path, workers, run__exactness="fast", optim__clip_norm=100.0)
        assert ran.column("loss") == pytest.approx(expected, rel=1e-5)


def test_running_statistics_in_fast_do_not_depend_on_the_number_of_workers(tmp_path):
    options = {"run__exactness": "fast", "batch__microbatches": 6, "batch__pass_size": 5}

    alone, two, three = (run(Normalised(), tmp_path, workers, **options) for workers in (1, 2, 3))
    cut = run(Normalised(), tmp_path, 3, parallel__strategy="fsdp", **options)

    for ran in (two, three, cut):
        assert ran.result["sample"] == alone.result["sample"] == f"{STEPS} batches"
        assert ran.result["metrics"] == pytest.approx(alone.result["metrics"], rel=1e-4)


def test_a_rank_with_a_padding_pass_agrees_with_the_others_on_buffers(tmp_path):
    """Three workers and seven microbatches: one has passes that count for nothing. No worker is lost."""
    options = {"run__exactness": "fast", "batch__global_size": 28, "batch__microbatches": 7, "batch__pass_size": 4}

    whole = run(Normalised(), tmp_path, 3, **options)
    cut = run(Normalised(), tmp_path, 3, parallel__strategy="fsdp", **options)

    assert cut.column("loss") == pytest.approx(whole.column("loss"), rel=1e-5)
    assert cut.result["metrics"] == pytest.approx(whole.result["metrics"], rel=1e-4)


@dataclass
class DependsOnWorker(Quiet):
    """Each worker does something of its own from step 3 on."""

    what: str = field(default="", metadata={"help": "rate, weights or frozen"})
    at: int = field(default=2, metadata={"help": "after which step the weights become its own"})

    def schedule(self, step, total_steps):
        return 1.0 + (os.getpid() % 1000 / 1e3 if self.what == "rate" and step >= 2 else 0.0)

    def after_step(self, model, step):
        import torch

        if step == self.at and self.what == "weights":
            with torch.no_grad():
                model[2].weight[0, 0] += os.getpid() % 1000 / 1e3
        if step == 2 and self.what == "frozen":
            model[2].bias.requires_grad_(os.getpid() % 2 == 0)


@pytest.mark.parametrize(
    ("what", "options", "said", "applied", "saved"),
    [
        (
            "rate",
            {"run__exactness": "fast"},
            "the update of step 3 is not the same on all workers: lr of parameter group 0 differs on w",
            3,
            [],
        ),
        ("rate", {"run__exactness": "bitwise"}, "it was applied, so this state was not saved", 3, []),
        ("rate", {"parallel__strategy": "fsdp"}, "nothing of this step was applied", 2, [2]),
        (
            "weights",
            {"run__exactness": "fast"},
            "the state of step 2 is not the same on all workers: model/2.weight differs on w",
            2,
            [],
        ),
        (
            "weights",
            {"run__check_every": "5st"},
            "the state of step 5 is not the same on all workers: model/2.weight differs on w",
            5,
            [],
        ),
        (
            "weights",
            {"checkpoint__every": "4st"},
            "the state of step 4 is not the same on all workers: model/2.weight differs on w",
            4,
            [],
        ),
    ],
)
def test_copies_that_differ_end_the_run_by_name(what, options, said, applied, saved, tmp_path):
    at = 2 if said.startswith("the state of step 2") else 3
    ran = train(DependsOnWorker(what=what, at=at), configure(tmp_path, "run", **OPTIONS | options), 2)

    assert said in ran.failure
    assert ran.rows[-1]["step"] == applied
    assert [e["step"] for e in ran.events("checkpoint_committed")] == saved  # states that differ are not saved
