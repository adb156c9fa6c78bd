"""What is never trained is in no saved state: models of `frozen()`, and parameters that come from a source."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import elastic
from elastic.errors import CheckpointError, ConfigError
from elastic.job import Job
from elastic.worker.belongings import frozen_of
from elastic.worker.comeback import check_comes_back
from elastic.worker.description import describe_frozen
from elastic.worker.state import TrainState
from tests.forked import configure, fault, train
from tests.surface_jobs import Adapted, FromFiles


class Frozen(Job):
    def __init__(self, found):
        self.found = found

    def frozen(self):
        return self.found


def test_frozen_models_are_in_evaluation_mode_and_known_by_all_their_bytes():
    teacher = nn.BatchNorm1d(2)

    found = frozen_of(Frozen([teacher]))
    lines = describe_frozen(found)
    teacher.running_mean[1] += 1e-7

    assert found == {"0": teacher}
    assert not teacher.training
    assert not teacher.weight.requires_grad
    assert [a == b for a, b in zip(lines, describe_frozen(found))] == [True, True, False, True, True]
    assert frozen_of(Frozen(None)) == {}
    with pytest.raises(ConfigError, match=r"frozen.* returned a str, which is no torch.nn.Module"):
        frozen_of(Frozen(["gpt2"]))
    with pytest.raises(ConfigError, match=r"has tensors on the meta device, which have no values"):
        frozen_of(Frozen(nn.Linear(1, 1, device="meta")))


def state(digest: str = "a") -> TrainState:
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(model[1].parameters())
    return TrainState(Job(), model, optimizer, sources={"0.weight": digest, "0.bias": digest})


def test_parameters_from_a_source_are_left_out_and_a_source_that_changed_is_refused():
    one = state()
    check_comes_back(one)
    tensors, values = one.tensors(), one.values()

    assert sorted(tensors) == ["model/1.bias", "model/1.weight"]
    state().load(tensors, values)
    with pytest.raises(
        CheckpointError, match=r"the parameter 0.bias comes from elsewhere .* its source has other values"
    ):
        state("b").load(tensors, values)
    whole = TrainState(Job(), one.model, one.optimizer)
    with pytest.raises(CheckpointError, match=r"the saved list of parameters that come from elsewhere"):
        whole.load(tensors, values)
    one.model[0].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"has_source.* says that 0.* need not be saved, but it is trained"):
        one.tensors()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_frozen_base_and_a_teacher_are_built_anew_and_never_saved(tmp_path):
    """Whole and cut, through a loss, a pause, and a worker that joins; then with another base."""
    alone = train(Adapted(), configure(tmp_path, "alone"), workers=1)
    cut = {"parallel__strategy": "fsdp"}
    train(Adapted(), configure(tmp_path, "cut", **cut, run__stop_after="5st"), workers=1)
    lost = train(Adapted(), configure(tmp_path, "cut", **cut), 2, faults=[fault("step.before_fence", step=9, rank=1)])
    other = configure(tmp_path, "alone", run__duration="14st", run__allow_change=("run.duration", "job.base"))
    changed = train(Adapted(base=1), other, workers=1)

    assert lost.sha == alone.sha
    for ran in (alone, lost):
        names = {name for name in ran.state() if name.startswith("model/")}
        assert {"model/last.weight", "model/last.bias"} <= names
        assert not any("weight" in n and "last" not in n for n in names)
    assert "the parameter embed.weight comes from elsewhere (has_source()), and its source has" in changed.failure
    loaded = elastic.load_model(Adapted, str(tmp_path / "alone"))
    assert float(loaded.embed.weight.abs().sum()) == 0.0


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_another_teacher_and_a_base_that_is_trained_are_refused_by_name(tmp_path):
    teacher = train(Adapted(teacher_of="each"), configure(tmp_path, "teacher"), workers=2)
    thawed = train(Adapted(thaws=True), configure(tmp_path, "thawed"), workers=1)

    said = str(teacher.failure) + str([e["detail"] for e in teacher.events("notice")])
    assert "frozen()" in said
    assert "teacher.0.bias" in said
    assert "has_source() says that layers.0.up.weight need not be saved, but it is trained" in thawed.failure


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_frozen_base_that_comes_by_ranges_from_files_is_never_saved(tmp_path):
    """Whole and cut, through a pause and a loss; then from a file that changed."""
    file = tmp_path / "base.safetensors"
    frozen = [(n, p) for n, p in Adapted().model().named_parameters() if not p.requires_grad]
    made = {f"base.{n}": torch.full_like(p, 0.125 + i / 64) for i, (n, p) in enumerate(frozen)}
    save_file(made, str(file))
    job, cut = FromFiles(file=str(file)), {"parallel__strategy": "fsdp"}

    alone = train(job, configure(tmp_path, "alone"), workers=1)
    train(job, configure(tmp_path, "cut", **cut, run__stop_after="5st"), workers=1)
    lost = train(job, configure(tmp_path, "cut", **cut), 2, faults=[fault("step.before_fence", step=9, rank=1)])
    other = elastic.load_model(FromFiles, str(tmp_path / "cut"))
    save_file({name: value + 1 for name, value in made.items()}, str(file))
    changed = train(job, configure(tmp_path, "alone", run__duration="14st", run__allow_change=("run.duration",)), 1)

    assert (alone.failure, lost.failure) == (None, None)
    assert lost.sha == alone.sha
    saved = {name for name in lost.state() if name.startswith("model/")}
    assert {"model/last.weight", "model/last.bias"} <= saved
    assert not saved & {f"model/{name}" for name, _ in frozen}
    assert torch.equal(dict(other.named_parameters())["embed.weight"], made["base.embed.weight"])
    assert "comes from elsewhere (has_source()), and its source has other values" in changed.failure
