"""Odd models, every strategy, all that saves memory: the same bits, or a refusal by name. And faults while the state of
a cut model is moved from one world to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from elastic.run.prepare import prepare
from tests.forked import LONG, WAIT_S, Ran, Watch, configure, fault, local_run, plan, train
from tests.test_bits import assert_same_training
from tests.test_sharded import sharded
from tests.test_snapshots import Nodes, snapshots
from tests.tiny_jobs import FEATURES, Deep, Everything, Odd, Plain

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]

STRATEGIES = [("ddp", 2), ("fsdp", 3), ("hsdp", 4)]


@pytest.fixture(scope="module")
def odd(fork_server, tmp_path_factory):
    """The undisturbed run of the odd model: whole, on one worker."""
    ran = train(Odd(), configure(tmp_path_factory.mktemp("odd"), "run"), workers=1)
    assert ran.failure is None
    return ran


# ---- models ----------------------------------------------------------------------------------------------------------


def test_the_odd_model_has_what_is_odd(odd):
    state = odd.state()

    assert state["model/empty"] == (torch.float32, (0, 3), b"")
    assert {state[f"model/{n}"][0] for n in ("mask", "passes", "total", "rough")} == {
        torch.bool,
        torch.int64,
        torch.float64,
        torch.bfloat16,
    }
    assert any(state["model/total"][2]), "it was replaced in every forward pass"
    assert "model/offsets" not in state
    assert odd.column("loss")[-1] < 0.9 * odd.column("loss")[0]


@pytest.mark.parametrize(("strategy", "workers"), [*STRATEGIES, ("fsdp", 1)])
def test_it_trains_the_same_bits_with_every_strategy(odd, tmp_path, strategy, workers):
    found = train(Odd(), sharded(tmp_path, strategy), workers)

    assert_same_training(found, odd)


def test_it_does_so_across_changes_of_strategy_with_blocks_that_are_found(odd, tmp_path):
    options = {"run__allow_change": ("job.named",)}
    for strategy, workers, stop in (("fsdp", 3, "4st"), ("hsdp", 4, "4st"), ("ddp", 2, None)):
        found = train(Odd(named=False), sharded(tmp_path, strategy, run__stop_after=stop, **options), workers)
        assert found.failure is None

    assert_same_training(found, odd)
    assert [e["step"] for e in found.events("restored") if e["detail"]["rung"] == "checkpoint"] == [4, 8]


def test_it_trains_alike_in_fast_with_every_strategy(odd, tmp_path):
    options = {"run__exactness": "fast", "parallel__find_unused": True}
    for strategy, workers in STRATEGIES:
        found = train(Odd(), sharded(tmp_path, strategy, strategy, **options), workers)

        assert found.failure is None
        assert found.column("sample_hash") == odd.column("sample_hash")
        assert found.column("loss") == pytest.approx(odd.column("loss"), rel=1e-5)
        assert found.column("grad_norm") == pytest.approx(odd.column("grad_norm"), rel=1e-3)
        assert found.result["metrics"] == pytest.approx(odd.result["metrics"], rel=1e-4)


class Forgetful(Plain):
    """Forward passes move a buffer that no checkpoint has."""

    def model(self):
        from torch import nn

        class Network(nn.Module):
            def __init__(self, inner: nn.Module):
                super().__init__()
                self.inner = inner
                self.register_buffer("mean", torch.zeros(FEATURES), persistent=False)

            def forward(self, x):
                if self.training:
                    self.mean.lerp_(x.mean(0), 0.1)
                return self.inner(x - self.mean)

        return Network(super().model())


class Hidden(Forgetful):
    """The same by a write that moves no counter."""

    def model(self):
        model = super().model()
        model.register_forward_pre_hook(_add_to_mean)
        return model


def _add_to_mean(module, args):
    module.mean.data.add_(args[0].data.mean(0), alpha=0.01)


@pytest.mark.parametrize("job", [Forgetful(), Hidden()], ids=["counted", "hidden"])
def test_a_buffer_that_passes_move_is_kept_though_it_is_not_persistent(tmp_path, job):
    """With a pause, with a worker that joins and with every strategy it is what it is in one undisturbed process."""
    alone = train(job, sharded(tmp_path, "ddp", "alone"), 1)
    paused = [
        train(job, sharded(tmp_path, "ddp", "paused", run__stop_after=stop), w) for stop, w in (("5st", 2), (None, 1))
    ]
    cut = [train(job, sharded(tmp_path, "fsdp", "cut", run__stop_after=stop), w) for stop, w in (("5st", 3), (None, 2))]
    killed = train(job, sharded(tmp_path, "ddp", "killed"), 2, faults=[fault("step.before_fence", 6, 1)])

    for ran in (paused[-1], cut[-1], killed):
        assert_same_training(ran, alone)


@dataclass
class Dropping(Plain):
    """Leaves out one of two equal blocks in each microbatch: the same number of gathers, of other parameters."""

    after: int = field(default=0, metadata={"help": "steps in which all run"})

    def __post_init__(self):
        self.blocks = ("Layer",)

    def model(self):
        from torch import nn

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(FEATURES, FEATURES)

            def forward(self, x):
                return x + self.linear(x)

        class Network(nn.Module):
            def __init__(self, inner: nn.Module):
                super().__init__()
                self.inner, self.layers = inner, nn.ModuleList(Layer() for _ in range(2))

            def forward(self, x, drop: bool):
                left_out = int(x[0, 0] > 0) if drop else None
                for i, layer in enumerate(self.layers):
                    x = x if i == left_out else layer(x)
                return self.inner(x)

        self.steps = 0
        return Network(super().model())

    def logits(self, model, features, ids):
        return model(features, model.training and self.steps >= self.after)

    def after_step(self, model, step):
        self.steps = step


@pytest.mark.parametrize("after", [0, 3])
def test_blocks_that_run_for_some_microbatches_only_are_refused_by_name(tmp_path, after):
    whole = train(Dropping(after=after), sharded(tmp_path, "ddp", "whole", parallel__find_unused=True), 1)
    found = train(Dropping(after=after), sharded(tmp_path, "fsdp"), 2)

    assert whole.failure is None
    assert found.failure is not None
    assert found.failure.startswith("blocks of the model run for some microbatches and not for others")
    assert found.column("step") == list(range(1, after + 1)), "before anything of it was applied"


class Tuned(Plain):
    """A job that turns on what chooses kernels by their speed."""

    def model(self):
        import torch._inductor.config

        torch._inductor.config.max_autotune = True
        return super().model()


def test_compiling_for_speed_is_refused_in_bitwise_by_name(tmp_path):
    found = train(Tuned(), configure(tmp_path, "run", parallel__compile=True, parallel__blocks=("Linear",)), 1)

    assert found.failure is not None
    assert "torch._inductor.config.max_autotune is on, which takes the kernels that are fastest" in found.failure
    assert found.history == []


# ---- options, with every strategy ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(fork_server, tmp_path_factory):
    """Six steps of the job with blocks: a whole model on one worker."""
    return train(Deep(), configure(tmp_path_factory.mktemp("deep"), "run", run__duration="6st"), workers=1)


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", 2), ("hsdp", 4)])
def test_activations_that_are_computed_again_change_no_bit(deep, tmp_path, strategy, workers):
    options = {"run__duration": "6st", "parallel__activation_checkpointing": True}

    assert_same_training(train(Deep(), sharded(tmp_path, strategy, **options), workers), deep)


def test_fp16_skips_the_same_steps_with_every_strategy_and_its_scale_is_in_the_manifest(tmp_path):
    options = {"precision__autocast": "fp16", "run__duration": "6st"}
    whole = train(Deep(), configure(tmp_path, "whole", **options), workers=1)
    factor = whole.state()["values"]["loss_scale"]
    assert factor["factor"] < 65536.0

    assert_same_training(train(Deep(), sharded(tmp_path, "hsdp", **options), 4), whole)
    for strategy, workers in STRATEGIES:
        found = train(
            Plain(), sharded(tmp_path, strategy, f"fast-{strategy}", run__exactness="fast", **options), workers
        )
        assert found.failure is None
        skipped = [row["step"] for row in found.history if row.get("skipped")]
        expected = {"factor": 65536.0 / 2 ** len(skipped), "good": 6 - max(skipped)}
        assert found.state()["values"]["loss_scale"] == expected


IN_FAST = {"run__exactness": "fast", "optim__warmup": None}
FORMATS = [{"param_dtype": "bf16"}, {"param_dtype": "fp16", "loss_scale": 1024.0}, {"grad_compression": "bf16"}]


@pytest.fixture(scope="module")
def in_fast(fork_server, tmp_path_factory):
    """One worker in `fast`, with the usual number formats."""
    return train(Plain(), configure(tmp_path_factory.mktemp("fast"), "whole", **IN_FAST), 1)


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", 2), ("fsdp", 3), ("hsdp", 4)])
@pytest.mark.parametrize("options", FORMATS, ids=["bf16", "fp16", "gradients"])
def test_other_number_formats_train_nearly_as_well(in_fast, tmp_path, strategy, workers, options):
    whole = in_fast

    found = train(
        Plain(), sharded(tmp_path, strategy, **{f"precision__{k}": v for k, v in options.items()}, **IN_FAST), workers
    )

    assert found.failure is None
    assert found.column("loss") != whole.column("loss")
    assert found.column("loss")[-1] == pytest.approx(whole.column("loss")[-1], rel=0.05)
    state = found.state()
    assert {v[0] for n, v in state.items() if n.startswith("model/")} == {torch.float32}
    assert ("loss_scale" in state["values"]) == ("fp16" in options.values())


# ---- faults ----------------------------------------------------------------------------------------------------------


def steps_done(ran: Ran) -> int:
    return len([row for row in ran.rows if "sample_hash" in row])


def pids(watch: Watch, size: int) -> list[int]:
    """Of the first world of this size, by rank."""
    formed = watch.wait_for(lambda r: r.get("kind") == "world_formed" and len(r["detail"]["pids"]) == size)
    return formed["detail"]["pids"]


def kill(local: Any, *wanted: int) -> None:
    victims = [process for process in local.processes if process.pid in wanted]
    assert len(victims) == len(wanted)
    for process in victims:
        process.kill()


POINTS = [
    ("step.reduce", 4),
    ("step.before_fence", 5),
    ("step.after_fence", 5),
    ("eval.begin", 3),
    ("checkpoint.staged", 4),
]


@pytest.mark.parametrize(("point", "step"), POINTS)
def test_a_kill_at_any_point_of_a_step_costs_copies_of_a_cut_model_no_step(undisturbed, tmp_path, point, step):
    config = sharded(tmp_path, "hsdp", eval__every="3st", checkpoint__every="4st")

    found = train(Everything(), config, 4, faults=[fault(point, step, 2, only=tmp_path / "mark")])

    assert_same_training(found, undisturbed)
    assert found.evaluations == undisturbed.evaluations
    assert steps_done(found) == 12
    assert [e["detail"]["rung"] for e in found.events("restored")] == []


def test_parts_of_two_broken_copies_make_a_whole_one(undisturbed_epoch, tmp_path, gate):
    """Of two copies in two parts each, one loses the first part and the other the second."""
    held = gate("held")
    run, watch = prepare(Everything(samples=LONG), sharded(tmp_path, "hsdp", scaling__max_workers=4)), Watch()
    faults = [fault("step.forward", 6, rank, "hold", file=held) for rank in (1, 2)]
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for_step(5)
        kill(local, pids(watch, 4)[0], pids(watch, 4)[3])
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert found.column("world_size") == [4] * 5 + [2] * 7
    assert steps_done(found) == 12
    assert found.events("restored") == []


def test_a_second_kill_while_copies_are_moved_costs_no_step(undisturbed_epoch, tmp_path, gate):
    """Two copies of two parts, and a spare; the second kill hits one that is to give its part away."""
    held = gate("held")
    run, watch = prepare(Everything(samples=LONG), sharded(tmp_path, "hsdp", scaling__max_workers=6)), Watch()
    faults = [fault("step.forward", 6, 1, "hold", file=held), fault("state.moving", 5, 0, only=tmp_path / "second")]
    with local_run(run, 5, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for_step(5)
        kill(local, pids(watch, 5)[3])
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert (tmp_path / "second").exists()
    assert found.column("world_size") == [5] * 5 + [3] * 7
    assert steps_done(found) == 12
    assert {e["detail"]["rung"] for e in found.events("restored")} <= {"peer"}, "the spare had nothing"


def test_one_that_joins_and_dies_while_parts_are_moved_takes_nothing_along(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    run, watch = prepare(Everything(samples=LONG), sharded(tmp_path, "fsdp", scaling__max_workers=3)), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(fault("step.forward", 4, 1, "hold", file=held))) as local:
        watch.wait_for_step(3)
        local.add_worker(environment=plan(fault("state.moving")))
        watch.wait_for(lambda r: r.get("kind") == "worker_warm" and r["member"] == "w1-2")
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert {e["member"] for e in found.events("member_lost") if "member" in e} == {"w1-2"}
    assert set(found.column("world_size")) == {2}
    assert steps_done(found) == 12
    assert found.events("restored") == [], "both had kept their parts"


def test_a_kill_while_a_snapshot_is_read_leaves_it_to_the_next_world(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    run, watch = prepare(Everything(samples=LONG), snapshots(tmp_path, scaling__max_workers=4)), Watch()
    faults = [fault("step.forward", 6, 1, "hold", file=held), fault("snapshot.reading", 4, 1, only=tmp_path / "second")]
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:
        nodes = Nodes(local, watch)
        nodes.wait_for_parts(4, 8)
        watch.wait_for_step(5)
        kill(local, pids(watch, 4)[2])
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert (tmp_path / "second").exists()
    (restored,) = found.events("restored")
    assert (restored["step"], restored["detail"]["rung"]) == (4, "snapshot")
    assert restored["detail"]["reason"].startswith("of the state of step 5, shard 2 of 4 was lost")
    assert found.column("world_size") == [4] * 4 + [2] * 8


def test_a_second_node_takes_copies_of_the_model(undisturbed_epoch, tmp_path, gate):
    """From one row of two workers to two rows, and back when the first node goes."""
    first, later = gate("first"), gate("later")
    run, watch = prepare(Everything(samples=LONG), sharded(tmp_path, "hsdp", scaling__max_workers=4)), Watch()
    faults = [fault("step.forward", 4, 1, "hold", file=first), fault("step.forward", 9, 3, "hold", file=later)]
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for_step(3)
        for _ in range(2):
            local.add_worker()
        for name in ("w1-2", "w1-3"):
            watch.wait_for(lambda r, name=name: r.get("kind") == "worker_warm" and r["member"] == name)
        first.unlink()
        watch.wait_for_step(8)
        kill(local, *pids(watch, 2))
        later.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert found.column("world_size") == [2] * 4 + [4] * 4 + [2] * 4
    assert steps_done(found) == 12
    assert {e["detail"]["rung"] for e in found.events("restored")} <= {"peer", "checkpoint"}
    assert {e["step"] for e in found.events("restored")} == {4}


def test_two_copies_in_fast_lose_no_step_either(tmp_path):
    options = {"run__exactness": "fast", "optim__warmup": None}
    job = Plain(samples=LONG)
    calm = train(job, configure(tmp_path, "calm", **options), 1)

    found = train(
        job, sharded(tmp_path, "hsdp", **options), 4, faults=[fault("step.reduce", 6, 3, only=tmp_path / "m")]
    )

    assert found.failure is None
    assert found.column("sample_hash") == calm.column("sample_hash")
    assert found.column("loss") == pytest.approx(calm.column("loss"), rel=1e-5)
    assert found.column("world_size") == [4] * 5 + [3] * 7
    assert steps_done(found) == 12
    assert found.events("restored") == []
