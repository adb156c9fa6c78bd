"""Models that are cut over workers: the same bits as whole ones, through kills, joins and changes of strategy."""

from __future__ import annotations

import platform
import shutil
from typing import Any

import pytest
import torch

from elastic.checkpoint.chunks import all_chunks
from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.membership.protocol import Leaving
from elastic.run.prepare import prepare
from tests.field_customs import Crossed
from tests.forked import COMPILING_S, LONG, WAIT_S, Ran, Watch, configure, fault, local_run, plan, sample_at, train
from tests.slowly import slow
from tests.test_bits import assert_same_training, flip_a_byte
from tests.test_checkpoint_initial import write
from tests.tiny_jobs import Deep, Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def sharded(storage: object, strategy: str, name: str = "run", **options: Any):
    """A configuration with this strategy, two workers to a node."""
    return configure(storage, name, **{"parallel__strategy": strategy, "scaling__workers_per_node": 2, **options})


@pytest.fixture(scope="module")
def deep(fork_server, tmp_path_factory):
    """The undisturbed run of the job with blocks: whole models on two workers."""
    ran = train(Deep(), configure(tmp_path_factory.mktemp("deep"), "run"), workers=2)
    assert ran.failure is None
    return ran


# ---- the same bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "workers"), [("fsdp", 3), ("hsdp", 4), *slow(("fsdp", 1), ("fsdp", 2))])
def test_everything_that_makes_equal_bits_hard_trains_the_same_bits(undisturbed, tmp_path, strategy, workers):
    found = train(Everything(), sharded(tmp_path, strategy, eval__every="3st"), workers)

    assert_same_training(found, undisturbed)
    assert found.evaluations == undisturbed.evaluations


@pytest.mark.parametrize(("strategy", "workers"), [("hsdp", 4), *slow(("fsdp", 4))])
def test_blocks_that_are_gathered_one_by_one_train_the_same_bits(deep, tmp_path, strategy, workers):
    found = train(Deep(), sharded(tmp_path, strategy), workers)

    assert_same_training(found, deep)


@pytest.mark.long
def test_half_of_the_nodes_of_hsdp_train_the_same_bits(deep, tmp_path):
    """Two of four workers: one copy over both."""
    run = prepare(Deep(), sharded(tmp_path, "hsdp", scaling__max_workers=4))
    with local_run(run, 2) as local:
        local.wait(WAIT_S)

    assert_same_training(Ran(run, None), deep)


@pytest.mark.long
def test_what_saves_memory_changes_no_bit(deep, tmp_path):
    options = {
        "parallel__activation_checkpointing": True,
        "parallel__reshard_after_forward": False,
        "parallel__prefetch": 1,
        "parallel__blocks": ("Block",),
    }

    assert_same_training(train(Deep(), sharded(tmp_path, "fsdp", **options), 2), deep)


@pytest.mark.long
def test_blocks_that_run_in_another_order_than_they_are_gathered_ahead_in_train_the_same_bits(tmp_path):
    """What a trial has gathered ahead and not used is not what the first step computes with."""
    alone = train(Crossed(), sharded(tmp_path, "ddp", "alone"), 1)

    assert_same_training(train(Crossed(), sharded(tmp_path, "fsdp", parallel__prefetch=1), 2), alone)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_have_the_same_bits_with_every_strategy(tmp_path):
    options = {"run__duration": "4st", "parallel__compile": True, "parallel__blocks": ("Linear",)}

    whole = train(Plain(), sharded(tmp_path, "ddp", "ddp", **options), 1, COMPILING_S)
    for strategy, workers in (("fsdp", 2), ("hsdp", 4)):
        found = train(Plain(), sharded(tmp_path, strategy, strategy, **options), workers, COMPILING_S)
        assert_same_training(found, whole)


def test_an_error_of_the_job_is_repeated_in_place_before_it_ends_the_run(tmp_path):
    job = Plain(samples=LONG, fault="raise", fault_at=sample_at(step=3))

    found = train(job, sharded(tmp_path, "fsdp", run__max_failures=1), 2)

    assert found.failure is not None
    assert "this sample is broken" in found.failure
    assert found.column("step") == [1, 2]
    assert len(found.events("world_formed")) == 3, "once more, and one that saved"
    assert found.events("restored") == [], "everyone still had its part"


def test_a_run_that_changes_its_strategy_at_every_pause_ends_with_the_same_bits(deep, tmp_path):
    for strategy, workers, stop in (("ddp", 2, "3st"), ("fsdp", 3, "3st"), ("hsdp", 4, "3st"), ("ddp", 1, None)):
        found = train(Deep(), sharded(tmp_path, strategy, run__stop_after=stop), workers)
        assert found.failure is None

    assert_same_training(found, deep)
    assert [e["step"] for e in found.events("restored") if e["detail"]["rung"] == "checkpoint"] == [3, 6, 9]


@pytest.mark.long
def test_fp16_scales_the_loss_alike_and_skips_the_same_steps(tmp_path):
    whole = train(Deep(), sharded(tmp_path, "ddp", "whole", precision__autocast="fp16"), workers=1)
    found = train(Deep(), sharded(tmp_path, "fsdp", precision__autocast="fp16", run__stop_after="6st"), workers=3)

    found = train(Deep(), sharded(tmp_path, "fsdp", precision__autocast="fp16"), workers=2)

    assert_same_training(found, whole)
    skipped = [row["step"] for row in found.history if row.get("skipped")]
    assert skipped[:1] == [1], "the first factor is too large for this model"
    factor = 65536.0 / 2 ** len(skipped)
    assert found.state()["values"]["loss_scale"] == {"factor": factor, "good": 12 - max(skipped)}


# ---- losses and joins ------------------------------------------------------------------------------------------


def die_at(step: int, tmp_path):
    once = tmp_path / "die-once"
    once.touch()
    return Everything(samples=LONG, fault="die", fault_at=sample_at(step), fault_file=str(once))


@pytest.mark.parametrize("step", [1, 8], ids=["first", "later"])
def test_copies_that_stayed_whole_supply_the_state_and_no_step_is_lost(undisturbed_epoch, tmp_path, step):
    found = train(die_at(step, tmp_path), sharded(tmp_path, "hsdp"), workers=4)

    assert_same_training(found, undisturbed_epoch)
    assert found.column("world_size") == [4] * (step - 1) + [3] * (13 - step)
    assert len([row for row in found.rows if "sample_hash" in row]) == 12, "no step was done twice"
    assert found.events("restored") == []


def test_a_lost_shard_comes_from_the_newest_checkpoint_and_the_survivors_stay(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    config = sharded(tmp_path, "fsdp", checkpoint__every="4st", scaling__max_workers=3)
    run, watch = prepare(Everything(samples=LONG), config), Watch()
    in_workers = plan(fault("step.forward", 7, 1, "hold", file=held))
    with local_run(run, 3, on_record=watch, environment=in_workers) as local:
        world = watch.wait_for(lambda r: r.get("kind") == "world_formed")
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] == 4)
        watch.wait_for_step(6)
        next(p for p in local.processes if p.pid == world["detail"]["pids"][1]).kill()
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    (restored,) = found.events("restored")
    assert restored["step"] == 4
    assert restored["detail"]["rung"] == "checkpoint"
    assert restored["detail"]["reason"] == "of the state of step 6, shard 1 of 3 was lost"
    first, second = found.events("world_formed")
    assert len(second["detail"]["pids"]) == 2
    assert set(second["detail"]["pids"]) < set(first["detail"]["pids"])
    assert found.column("world_size") == [3] * 4 + [2] * 8


def test_a_lost_shard_without_any_checkpoint_is_a_fresh_start(undisturbed_epoch, tmp_path):
    found = train(die_at(3, tmp_path), sharded(tmp_path, "fsdp"), workers=2)

    assert_same_training(found, undisturbed_epoch)
    (restored,) = found.events("restored")
    assert (restored["step"], restored["detail"]["rung"]) == (0, "fresh")
    assert restored["detail"]["reason"] == "of the state of step 2, shard 0 of 2 was lost"


def test_a_worker_that_joins_takes_its_part_from_the_others(undisturbed_epoch, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    job = Everything(samples=LONG, fault="hold", fault_at=sample_at(step=4), fault_file=str(gate))
    run = prepare(job, sharded(tmp_path, "fsdp", scaling__max_workers=3))
    watch = Watch()
    with local_run(run, 2, on_record=watch) as local:
        watch.wait_for_step(3)
        local.add_worker()
        watch.wait_for(lambda r: r.get("kind") == "worker_warm" and r["member"] == "w1-2")
        gate.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert found.column("world_size") == [2] * 4 + [3] * 8
    (restored,) = found.events("restored")
    assert (restored["member"], restored["step"], restored["detail"]) == ("w1-2", 4, {"rung": "peer", "source": 0})


def test_a_worker_that_is_let_go_leaves_its_part_behind(undisturbed_epoch, tmp_path):
    """Its node goes away: the one copy is made safe at the boundary at which it leaves, so no step is done twice."""
    gate = tmp_path / "gate"
    gate.touch()
    job = Everything(samples=LONG, fault="hold", fault_at=sample_at(step=4), fault_file=str(gate))
    run = prepare(job, sharded(tmp_path, "fsdp", scaling__max_workers=3))
    watch = Watch()
    with local_run(run, 3, on_record=watch) as local:
        watch.wait_for_step(3)
        local.link.request(Leaving(f"{platform.node()}/1", 3))
        watch.wait_for(lambda r: r.get("kind") == "notice" and "re-forming" in r.get("detail", ""))
        gate.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert found.column("world_size") == [3] * 4 + [2] * 8
    assert len([row for row in found.rows if "sample_hash" in row]) == 12
    (restored,) = found.events("restored")
    assert (restored["step"], restored["detail"]["rung"]) == (4, "checkpoint")


@pytest.mark.parametrize(("strategy", "workers"), [("fsdp", 2), *slow(("hsdp", 3))])
def test_a_world_of_the_same_shape_follows_one_that_lost_a_member(undisturbed_epoch, tmp_path, strategy, workers):
    """The new mesh equals the old one, but its groups are others. With hsdp each node has one worker here."""
    options = {"scaling__max_workers": workers, "checkpoint__every": "2st"}
    if strategy == "hsdp":
        options["scaling__workers_per_node"] = 1
    config = sharded(tmp_path, strategy, **options)
    run = prepare(die_at(6, tmp_path), config)
    with local_run(run, workers + 1) as local:  # one waits outside
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert set(found.column("world_size")) == {workers}
    assert len(found.events("world_formed")) == 2


def test_a_spare_stands_by_and_takes_the_place_of_a_lost_worker(undisturbed_epoch, tmp_path):
    run = prepare(die_at(5, tmp_path), sharded(tmp_path, "hsdp", scaling__max_workers=6))
    with local_run(run, 5) as local:
        local.wait(WAIT_S)
        exit_codes = sorted(p.wait(WAIT_S) for p in local.processes)

    found = Ran(run, None)
    assert exit_codes == [-9, 0, 0, 0, 0]
    assert_same_training(found, undisturbed_epoch)
    assert len([row for row in found.rows if "sample_hash" in row]) == 12


# ---- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "workers", "exactness"), [("fsdp", 3, "bitwise"), ("hsdp", 4, "fast")])
def test_a_gradient_that_is_not_finite_is_located(tmp_path, strategy, workers, exactness):
    job = Plain(samples=LONG, fault="nan-gradient", fault_at=sample_at(6, 7))

    found = train(job, sharded(tmp_path, strategy, run__exactness=exactness), workers)

    samples = ", ".join(str(sample_at(6, 7, i)) for i in range(3))
    assert found.failure is not None
    assert f"the gradient norm of step 6 is not finite (loss {found.column('loss')[0]:.0g}"[:48] in found.failure
    assert f"first in microbatch 7 (samples {samples})" in found.failure
    assert found.column("step") == [1, 2, 3, 4, 5]


class Scalar(Plain):
    def model(self):
        from torch import nn

        model = super().model()
        model.gain = nn.Parameter(torch.ones(()))
        return model


class Mixed(Plain):
    def model(self):
        model = super().model()
        model[2].bfloat16()
        return model


class Sparse(Plain):
    def model(self):
        return torch.nn.Sequential(super().model(), torch.nn.Embedding(4, 2, sparse=True))


class Factored(Plain):
    def optimizer(self, model):
        return torch.optim.Adafactor(model.parameters())


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        (Deep(blocks_named="Layer"), {}, "--parallel.blocks names 'Layer', but the model has no module of that class"),
        (Scalar(), {}, "parameter gain has no dimensions, so it cannot be sharded; give it the shape (1,)"),
        (Mixed(), {}, "parameter 0.weight is torch.float32 and 2.weight is torch.bfloat16; parameters that are"),
        (Sparse(), {}, "1 (Embedding) is made with sparse=True, and sparse gradients are only summed with"),
        (Factored(), {}, "the optimizer Adafactor gives other bits when a parameter is cut"),
        (
            Deep(),
            {"run__exactness": "fast", "precision__param_dtype": "bf16"},
            "--precision.param-dtype would give layers.0.norm (BatchNorm1d) parameters in another number format",
        ),
        (
            Plain(),
            {"run__exactness": "fast", "parallel__offload": True, "scaling__accelerator": "auto"},
            "--parallel.offload is True, which moves state from GPUs, but workers run on CPUs",
        ),
    ],
    ids=["blocks", "scalar", "dtypes", "sparse", "optimizer", "param-dtype", "offload"],
)
def test_what_cannot_be_cut_is_refused_by_name_before_the_first_step(tmp_path, job, options, message):
    found = train(job, sharded(tmp_path, "fsdp", **options), workers=1)

    assert found.failure is not None
    assert message in found.failure
    assert found.history == []


# ---- checkpoints of sharded states ---------------------------------------------------------------------------------


def test_a_checkpoint_of_a_cut_state_has_every_row_once_from_whoever_holds_it(tmp_path):
    whole = train(Deep(), sharded(tmp_path, "ddp", "ddp", run__duration="2st"), 1)
    found = train(Deep(), sharded(tmp_path, "hsdp", run__duration="2st"), 4)

    assert found.state() == whole.state()
    (checkpoint,) = newest_first(found.storage)
    tensors = all_chunks(found.storage, checkpoint.folder, read_manifest(found.storage, checkpoint))
    assert len({c.pack for t in tensors.values() for c in t.chunks}) == 4, "everyone writes"
    up = tensors["model/layers.0.up.weight"]
    assert sorted(c.offsets[0] for c in up.chunks) == [0, 11]
    (ours,) = found.events("checkpoint_committed")
    (theirs,) = whole.events("checkpoint_committed")
    assert ours["detail"]["bytes"] == theirs["detail"]["bytes"]


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over_by_everyone(deep, tmp_path):
    paused = train(Deep(), sharded(tmp_path, "fsdp", run__stop_after="4st", checkpoint__every="2st"), 2)
    damaged = flip_a_byte(paused, step=4)

    resumed = train(Deep(), sharded(tmp_path, "fsdp"), 3)

    (found,) = resumed.events("checkpoint_damaged")
    assert found["step"] == 4
    assert damaged in found["detail"]["problem"]
    assert [e["step"] for e in resumed.events("restored")] == [2]
    assert_same_training(resumed, deep)


@pytest.mark.long
def test_a_cut_model_starts_from_the_same_given_weights_as_its_copies_do(tmp_path):
    given = {n: torch.rand(p.shape) - 0.5 for n, p in Plain().model().named_parameters()}
    file = write(tmp_path / "w.safetensors", given)
    options = {"checkpoint__init_from": str(file), "run__duration": "3st"}

    whole = train(Plain(), sharded(tmp_path, "ddp", "ddp", **options), 1)
    for strategy, workers in (("fsdp", 3), ("hsdp", 4)):
        found = train(Plain(), sharded(tmp_path, strategy, strategy, **options), workers)
        assert_same_training(found, whole)
        assert len(found.events("initialised")) == 1
