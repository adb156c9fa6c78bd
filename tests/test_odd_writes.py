"""Jobs that write to their state in odd ways, or fail while they do: the bits are those of a run to which nothing
happened, at every world size, or the job is refused by name."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import pytest

from elastic.errors import CheckpointError
from elastic.job import Job
from tests.forked import Ran, configure, fault, train
from tests.test_bits import assert_same_training
from tests.tiny_jobs import FEATURES, Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


def around(inner: Any, forward: Any, **parts: Any) -> Any:
    """A module with these modules and buffers, which runs `forward(module, inputs)` before `inner`."""
    import torch
    from torch import nn

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            for name, part in parts.items():
                if isinstance(part, torch.Tensor):
                    self.register_buffer(name, part)
                else:
                    setattr(self, name, part)

        def forward(self, x: Any, ids: Any) -> Any:
            return self.inner(forward(self, x, ids))

    return Around()


@dataclass
class Writes(Plain):
    """Everything but `loss` of a job whose forward passes see the samples' numbers."""

    def logits(self, model, features, ids):
        return model(features, ids)


@dataclass
class HiddenAverage(Plain):
    """Keeps an average in a buffer, with writes that move no version counter."""

    def model(self):
        import torch

        model = super().model()
        model.register_buffer("average", torch.zeros_like(model[0].bias))
        return model

    def after_step(self, model, step):
        model.average.data.mul_(0.9).add_(model[0].bias.data, alpha=0.1)


@dataclass
class HiddenMean(Writes):
    """Its forward passes move a buffer by a kernel that moves no version counter."""

    def model(self):
        import torch

        def forward(module, x, ids):
            return torch.nn.functional.batch_norm(x, module.mean, module.var, training=module.training)

        return around(super().model(), forward, mean=torch.zeros(FEATURES), var=torch.ones(FEATURES))


@dataclass
class Counts(Writes):
    """Counts its forward passes, also those of evaluations."""

    def model(self):
        import torch

        def forward(module, x, ids):
            module.calls += 1
            return x + 1e-3 * module.calls

        return around(super().model(), forward, calls=torch.zeros((), dtype=torch.int64))


@dataclass
class Tallies(Writes):
    """An integer buffer that depends on the samples; with `late`, once the first update has moved a weight from 0."""

    late: bool = False

    def model(self):
        import torch
        from torch import nn

        gate = nn.Embedding(1, FEATURES)
        nn.init.zeros_(gate.weight)

        def forward(module, x, ids):
            moved = module.gate(torch.zeros_like(ids))
            module.tally += ids.sum() * (moved.any() if self.late else 1)
            return x + moved

        return around(super().model(), forward, tally=torch.zeros((), dtype=torch.int64), gate=gate)


@dataclass
class Limited(Writes):
    def model(self):
        from torch import nn

        table = nn.Embedding(50, FEATURES, max_norm=0.5)
        return around(super().model(), lambda module, x, ids: x + module.table(ids % 50), table=table)


@dataclass
class Clamped(Writes):
    def model(self):
        import torch

        def forward(module, x, ids):
            with torch.no_grad():
                module.inner[0].weight.clamp_(-0.1, 0.1)
            return x

        return around(super().model(), forward)


@dataclass
class Draws(Plain):
    """Its updates draw numbers."""

    def after_step(self, model, step):
        import torch

        with torch.no_grad():
            model[0].bias.add_(torch.randn_like(model[0].bias), alpha=1e-2)


@dataclass
class FailsOnce(Everything):
    """Fails in the middle of the update of step 3, in as many processes as there are marks."""

    marks: str = ""

    def after_step(self, model, step):
        super().after_step(model, step)
        if step == 3 and self.marks:
            for mark in self.marks.split(":"):
                try:
                    open(mark, "x").close()
                except FileExistsError:
                    continue
                raise OSError("the disk was full for a moment")


class Held:
    """Samples of which the first one asked for after an update cannot be read, once."""

    updated = False  # in this process

    def __init__(self, samples: Any, mark: str):
        self.samples, self.mark = samples, mark

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if self.updated and self.mark and not os.path.exists(self.mark):
            with contextlib.suppress(FileNotFoundError):  # it always fails in a folder that is not there
                open(self.mark, "x").close()
            raise OSError("the link was down for a moment")
        return self.samples[index]


@dataclass
class HeldOutFails(Plain):
    mark: str = ""

    def eval_data(self):
        return {name: Held(samples, self.mark) for name, samples in super().eval_data().items()}

    def after_step(self, model, step):
        Held.updated = True


def alone(job: Job, tmp_path: Any, **options: Any) -> Ran:
    ran = train(job, configure(tmp_path / "alone", "run", **options), workers=1)
    assert ran.failure is None, ran.failure
    return ran


KINDS = [HiddenAverage, HiddenMean, Counts, Draws]


@pytest.mark.parametrize("kind", KINDS)
def test_written_in_ways_that_nobody_counts_the_bits_are_the_same(kind, tmp_path):
    """Also where a worker is lost in step 6, so that the others undo what they did of it."""
    options = {"eval__every": "3st"}
    one = alone(kind(), tmp_path, **options)
    config = configure(tmp_path, "run", **options)

    found = train(kind(), config, workers=3, faults=[fault("step.reduce", 6, 1, only=tmp_path / "mark")])

    assert (tmp_path / "mark").exists()
    assert_same_training(found, one)
    assert found.evaluations == one.evaluations


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
@pytest.mark.parametrize("kind", [HiddenMean, Counts])
def test_so_are_those_of_cut_models(kind, strategy, tmp_path):
    options = {"eval__every": "3st", "scaling__workers_per_node": 2}
    one = alone(kind(), tmp_path, **options)

    found = train(kind(), configure(tmp_path, "run", parallel__strategy=strategy, **options), workers=4)

    assert_same_training(found, one)
    assert found.evaluations == one.evaluations


@pytest.mark.parametrize(
    ("late", "strategy", "workers"), [(True, "ddp", 1), (True, "ddp", 4), (True, "fsdp", 2), (False, "ddp", 2)]
)
def test_an_integer_buffer_that_depends_on_the_samples_ends_the_run_at_every_size(late, strategy, workers, tmp_path):
    options = {"batch__global_size": 16, "batch__microbatches": 4, "parallel__strategy": strategy}

    found = train(Tallies(late=late), configure(tmp_path, "run", **options), workers=workers)

    sentence = "it has no one value" if late else "moves the buffer tally by how many samples it has"
    assert sentence in (found.failure or "")


@dataclass
class Collects(Writes):
    """Its forward passes lengthen a saved buffer."""

    def model(self):
        import torch

        def collect(net: Any, x: Any, ids: Any) -> Any:
            net.seen = torch.cat([net.seen, ids.float()])
            return x

        return around(super().model(), collect, seen=torch.zeros(0))


@pytest.mark.parametrize("exactness", ["fast", "bitwise"])
def test_a_buffer_that_forward_passes_give_another_shape_is_refused_by_name(exactness, tmp_path):
    found = train(Collects(), configure(tmp_path, "run", run__exactness=exactness), workers=2)

    assert "a forward pass gave buffer seen the shape (" in (found.failure or "")
    assert "which was (0,), so it would depend on which worker runs which microbatch" in (found.failure or "")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Limited, r"table (Embedding) is made with max_norm=0.5, which changes its rows in forward passes"),
        (Clamped, "evaluate() changes parameters of the model (inner.0.weight)"),
    ],
)
def test_parameters_that_forward_passes_write_to_are_refused_by_name(kind, why, tmp_path):
    found = train(kind(), configure(tmp_path, "run"), workers=1)

    assert why in (found.failure or "")


@pytest.mark.parametrize(("workers", "failing"), [(1, 1), (2, 1), (2, 2)])
def test_an_update_that_breaks_off_is_not_gone_on_from(workers, failing, tmp_path, undisturbed):
    """Where everyone's broke off, the run starts again from its beginning, in the same processes."""
    job = FailsOnce(marks=":".join(str(tmp_path / f"mark{i}") for i in range(failing)))

    found = train(job, configure(tmp_path, "run", eval__every="3st"), workers=workers)

    assert found.failure is None
    assert len(list(tmp_path.glob("mark*"))) == failing
    assert_same_training(found, undisturbed)
    assert found.evaluations == undisturbed.evaluations


def test_a_sample_that_cannot_be_had_once_in_an_evaluation_is_asked_for_again(tmp_path):
    job = HeldOutFails(mark=str(tmp_path / "mark"))
    one = alone(HeldOutFails(), tmp_path, eval__every="3st")

    found = train(job, configure(tmp_path, "run", eval__every="3st"), workers=2)

    assert os.path.exists(tmp_path / "mark")
    assert_same_training(found, one)
    assert found.evaluations == one.evaluations


def test_an_evaluation_that_ended_the_run_is_done_when_the_run_goes_on(tmp_path):
    """Its state was saved at the step after which it failed, each time that it was tried."""
    mark = tmp_path / "folder" / "mark"
    job, config = HeldOutFails(mark=str(mark)), configure(tmp_path, "run", eval__every="3st")
    one = alone(HeldOutFails(), tmp_path, eval__every="3st")

    failed = train(job, config, workers=2)
    mark.parent.mkdir()
    found = train(job, config, workers=2)

    assert "the link was down" in (failed.failure or "")
    assert found.events("checkpoint_committed")[0]["step"] == 3
    assert_same_training(found, one)
    assert found.evaluations == one.evaluations


def test_no_memory_to_stage_a_checkpoint_costs_that_checkpoint_alone(tmp_path, monkeypatch):
    import torch

    from elastic.checkpoint.saver import Saver
    from elastic.checkpoint.tensors import Shard
    from elastic.storage import Storage

    saver = Saver(Storage(str(tmp_path)))
    shards = [Shard.whole("model/a", torch.zeros(4))]

    def refuse(size: int) -> None:
        raise MemoryError("none")

    with monkeypatch.context() as patch:
        patch.setattr(saver._buffer, "reserve", refuse)
        with pytest.raises(MemoryError):
            saver.start(1, "1-1-1", shards)
    try:
        assert saver.settle() == 0.0
        assert saver.start(2, "1-1-2", shards) is saver.wait(30.0)
        assert saver.wait(30.0).error is None
    except CheckpointError as error:
        pytest.fail(str(error))
    finally:
        saver.close()
