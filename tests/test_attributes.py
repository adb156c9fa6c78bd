"""What a job changes of its data sets while it trains is part of the state: by comparing attributes, and in runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from elastic.worker.attributes import JobAttributes
from tests.forked import configure, train
from tests.tiny_jobs import Plain, Samples

# ---- pure ----------------------------------------------------------------------------------------------------------


class Noise:
    def __init__(self) -> None:
        self.strength, self.steps = 0.1, [1, 2]


class Data(Samples):
    def __init__(self) -> None:
        super().__init__(10)
        self.epoch, self.transform, self.fetched, self.weights = 0, Noise(), 0, np.ones(4)
        self.net, self.table = torch.nn.Linear(2, 2), torch.zeros(3)


def watched(data):
    attributes, said = JobAttributes(object.__new__(Plain), {"train_data()": data}), []
    attributes.warn = said.append
    attributes.changed = lambda: said.append("changed")
    return attributes, said


def test_what_an_update_changes_is_saved_and_comes_back_or_is_undone():
    data = Data()
    attributes, said = watched(Subset(data, range(5)))
    attributes.between_steps()
    attributes.updated()
    assert (said, attributes.values()) == ([], {})

    data.epoch, data.transform.strength, data.new = 1000, 0.5, (1, 2)
    data.transform.steps.append(3)
    data.weights[1] = 5
    attributes.updated()

    inner = "train_data().dataset"
    saved = attributes.values()
    assert saved.pop(f"{inner}.weights").tolist() == [1, 5, 1, 1]
    assert saved == {
        f"{inner}.epoch": 1000,
        f"{inner}.transform.strength": 0.5,
        f"{inner}.new": (1, 2),
        f"{inner}.transform.steps": [1, 2, 3],
    }
    assert said == ["changed"]

    other = Data()
    theirs, said = watched(Subset(other, range(5)))
    theirs.load(saved)
    assert (other.epoch, other.transform.strength, other.new, other.transform.steps) == (1000, 0.5, (1, 2), [1, 2, 3])
    assert theirs.values() == saved
    theirs.load({f"{inner}.weights": np.zeros(4)})
    assert other.weights.tolist() == [0, 0, 0, 0]
    theirs.load({})  # an earlier state
    attributes.load({})
    assert other.weights.tolist() == data.weights.tolist() == [1, 1, 1, 1]
    assert (other.epoch, other.transform.strength, other.transform.steps) == (0, 0.1, [1, 2])
    assert not hasattr(other, "new")


def test_what_cannot_be_saved_or_changes_elsewhere_is_told_once():
    data = Data()
    attributes, said = watched(data)
    for _ in range(2):
        attributes.between_steps()
        with attributes.fetching():
            data.fetched += 1
        data.table += 1
        attributes.passed()
        data.transform = Noise()
        data.fetched = 0
        attributes.updated()
    assert [s for s in said if s != "changed"] == [
        "train_data().table changed in passes, of which every worker has others; change it in after_step()",
        "train_data().fetched, train_data().transform changed in an update, and is not saved: "
        "after a resume or a join it begins anew; set it from the saved state, in load_extra_state()",
    ]
    assert attributes.values() == {}


def test_equal_values_fetches_and_models_are_no_changes():
    data = Data()
    attributes, said = watched(data)
    attributes.between_steps()
    with attributes.fetching():
        data.fetched += 1
    data.epoch = int("0")
    data.transform.strength = float("0.1")
    with torch.no_grad():
        data.net.weight.zero_()
    attributes.updated()
    assert (said, attributes.values()) == ([], {})


class Counting(Plain):
    def __init__(self) -> None:
        self.seen, self.level, self.history = {}, 1, [0]


def watched_job():
    job = object.__new__(Counting)
    Counting.__init__(job)
    attributes = JobAttributes(job, {})
    attributes.watch(torch.nn.Linear(2, 2))
    return job, attributes


@pytest.mark.parametrize("value", [1, (1, 0.5)], ids=["plain", "rich"])
def test_what_model_and_optimizer_set_again_is_how_a_fresh_start_begins(value):
    job, attributes = watched_job()
    job.seen[1], job.level = value, 2
    attributes.updated()
    assert attributes.values() == {"job.level": 2, "job.seen": {1: value}}

    job.seen = {}  # by optimizer(), for another world
    attributes.watch(torch.nn.Linear(2, 2))
    assert attributes.values() == {"job.level": 2, "job.seen": {}}
    attributes.load({})
    assert (job.seen, job.level) == ({}, 1)
    attributes.load({"job.level": 2, "job.seen": {1: value}})
    assert (job.seen, job.level) == ({1: value}, 2)


def test_each_fresh_start_begins_with_the_first_values():
    job, attributes = watched_job()
    for _ in range(2):
        job.history.append(1)
        attributes.updated()
        assert attributes.values() == {"job.history": [0, 1]}
        attributes.load({})
        assert job.history == [0]


def test_what_was_too_large_to_look_at_is_not_removed_by_a_fresh_start():
    job, attributes = watched_job()
    job.seen[1] = torch.ones(3)
    attributes.updated()
    job.seen, job.level = {}, 2
    attributes.updated()
    attributes.load({})
    assert (job.seen, job.level) == ({}, 1)


# ---- in runs -------------------------------------------------------------------------------------------------------


class Levels(Samples):
    level = 0.0

    def set_epoch(self, epoch: int) -> None:
        self.level = 0.1 * epoch

    def __getitem__(self, index: int):
        features, label, i = super().__getitem__(index)
        return features * (1 + self.level), label, i


@dataclass
class Curriculum(Plain):
    """Its data get harder, from step 4 and from step 7 on."""

    how: str = field(default="after", metadata={"help": "when"})

    def train_data(self):
        self.data = Levels(self.samples)
        return self.data

    def after_step(self, model, step):
        if step in (4, 7):
            self.data.set_epoch(step // 3)

    def loss(self, model, batch):
        if self.how == "passes" and model.training:
            self.data.level += 0.01
        return super().loss(model, batch)


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_a_curriculum_comes_back_and_reaches_loader_processes(tmp_path):
    alone = train(Curriculum(), configure(tmp_path, "alone", run__duration="10st"), 1)
    for name, workers, options in (
        ("resumed", 2, {"run__stop_after": "5st"}),
        ("loaders", 2, {"data__workers": 1}),
        ("cut", 2, {"run__stop_after": "8st", "parallel__strategy": "fsdp"}),
    ):
        config = configure(tmp_path, name, run__duration="10st", **options)
        ran = train(Curriculum(), config, workers)
        if "run__stop_after" in options:
            ran = train(Curriculum(), configure(tmp_path, name, run__duration="10st"), 1)
        assert ran.failure is None
        assert (name, ran.column("loss")) == (name, alone.column("loss"))
        assert ran.sha == alone.sha
        assert ran.result["exactness_held"] is True
        restarts = [e["detail"] for e in ran.events("loader_restarted")]
        assert all(r.startswith("the job changed its data before step 5, so loader processes are") for r in restarts)
        assert len(restarts) == (2 if name == "loaders" else 0)


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_data_that_passes_change_are_told(tmp_path):
    ran = train(Curriculum(how="passes"), configure(tmp_path, "run", run__duration="3st"), 1)
    assert ran.result["exactness_held"] is False
    (told,) = {e["detail"] for e in ran.events("unsaved_numbers")}
    assert told.startswith("train_data().level changed in passes, of which every worker has others")
