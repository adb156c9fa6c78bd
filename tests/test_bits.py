"""The promise of bitwise: the same bits at every world size, through pauses, deaths and damage."""

from __future__ import annotations

import pytest
import torch

from elastic.checkpoint.tensors import tensor_bytes
from elastic.membership.protocol import Wish
from elastic.observe.ledger import gaps_and_doubles
from elastic.parallel.deferred import build
from elastic.run.prepare import prepare
from tests.forked import LONG, WAIT_S, B, Ran, Watch, configure, local_run, sample_at, train
from tests.tiny_jobs import CONFIG, ComputedAgain, Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def assert_same_training(found: Ran, expected: Ran) -> None:
    """Weights, optimizer, extra state and every recorded figure of every step have the same bits."""
    assert found.failure is None
    assert found.result["status"] == expected.result["status"] == "finished"
    for name in ("loss", "grad_norm", "lr", "sample_hash", "accuracy", "samples", "first_position", "count"):
        assert found.column(name) == expected.column(name), name
    assert gaps_and_doubles(found.rows, B) == []
    assert found.sha == expected.sha
    assert found.state() == expected.state()
    assert found.result["loss"] == expected.result["loss"]
    assert found.result["metrics"] == expected.result["metrics"]
    assert found.result["sample"] == expected.result["sample"]


# ---- world sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_trains_the_same_bits(undisturbed, tmp_path, workers):
    found = train(Everything(), configure(tmp_path, "run", eval__every="3st"), workers)

    assert_same_training(found, undisturbed)
    assert found.evaluations == undisturbed.evaluations
    assert set(found.column("world_size")) == {workers}


def test_the_undisturbed_run_has_what_makes_equal_bits_hard(undisturbed):
    """Clipping that engages, several epochs, evaluation of two sets, and a loss that falls."""
    losses, norms = undisturbed.column("loss"), undisturbed.column("grad_norm")

    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert max(norms) > CONFIG.optim.clip_norm
    assert undisturbed.column("samples")[-1] > 3 * Everything().samples
    assert sorted(undisturbed.evaluations) == [3, 6, 9, 12]
    names = {f"eval/{where}/{what}" for where in ("near", "far") for what in ("loss", "accuracy")}
    assert set(undisturbed.evaluations[12]) == names
    assert undisturbed.result["metrics"] == undisturbed.evaluations[12]
    assert undisturbed.result["exactness_held"] is True


WIDE = 600  # hidden units: several buckets of gradients, of which all but the last are exchanged in backward passes


def test_buckets_that_are_exchanged_in_backward_passes_train_the_same_bits_on_one_node_and_on_two(tmp_path):
    alone = train(Everything(width=WIDE), configure(tmp_path, "alone", run__duration="4st"), 1)
    for name, workers, options in (("one", 2, {}), ("two", 4, {"scaling__workers_per_node": 2})):
        found = train(Everything(width=WIDE), configure(tmp_path, name, run__duration="4st", **options), workers)

        assert_same_training(found, alone)


def test_gradients_that_come_in_parts_are_exchanged_after_the_backward_pass(tmp_path):
    alone, together = (
        train(ComputedAgain(width=WIDE), configure(tmp_path, f"run-{workers}", run__duration="4st"), workers)
        for workers in (1, 2)
    )

    assert_same_training(together, alone)
    (told,) = together.events("notice")
    assert "after backward passes from step 1 on: the gradient of shared.bias comes in several parts" in told["detail"]


def test_another_seed_trains_other_bits(undisturbed, tmp_path):
    found = train(Everything(), configure(tmp_path, "run", run__seed=1), workers=1)

    assert found.sha != undisturbed.sha
    assert not set(found.column("sample_hash")) & set(undisturbed.column("sample_hash"))
    assert not set(found.column("loss")) & set(undisturbed.column("loss"))


def test_loader_processes_fetch_the_same_bits(undisturbed, tmp_path):
    found = train(Everything(), configure(tmp_path, "run", data__workers=1), workers=1)

    assert_same_training(found, undisturbed)


def test_autocast_trains_the_same_bits_on_one_worker_and_on_two(tmp_path):
    alone, together, exact = (
        train(Plain(), configure(tmp_path, f"run-{i}", precision__autocast=autocast), workers)
        for i, (workers, autocast) in enumerate([(1, "bf16"), (2, "bf16"), (1, "off")])
    )

    assert_same_training(together, alone)
    assert alone.sha != exact.sha
    assert alone.column("sample_hash") == exact.column("sample_hash")


# ---- what training must leave alone ----------------------------------------------------------------------------


def _bytes(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), bytes(tensor_bytes(tensor))


def test_unused_and_frozen_parameters_keep_their_value_and_tied_ones_are_stored_once(undisturbed):
    initial = build(Everything().model, 0)

    trained = undisturbed.state()

    for name, _ in initial.model.named_parameters():
        parameter = initial.value(name)
        if name.split(".")[0] in ("unused", "frozen"):
            assert trained[f"model/{name}"] == _bytes(parameter), name
            assert f"optimizer/{name}/exp_avg" not in trained
        else:
            assert trained[f"model/{name}"] != _bytes(parameter), name
    assert "model/tied.weight" in trained
    assert "model/tied_again.weight" not in trained


def test_the_job_s_own_state_is_saved_with_the_weights(undisturbed):
    found = undisturbed.state()

    assert found["values"]["extra"] == {"updates": 12}
    assert found["extra/ema"][:2] == (torch.float32, (3, 16))
    assert found["extra/ema"] != found["model/last.weight"]
    assert found["values"]["groups"][0]["weight_decay"] == 0.1
    assert found["values"]["groups"][1]["weight_decay"] == 0.0


# ---- pauses ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paused_twice(fork_server, tmp_path_factory):
    """Three workers for 5 steps, one for 3 more, two to the end."""
    storage = tmp_path_factory.mktemp("paused")
    parts = [
        train(Everything(), configure(storage, "run", eval__every="3st", run__stop_after=stop), workers)
        for workers, stop in ((3, "5st"), (1, "3st"), (2, None))
    ]
    return parts


def test_a_run_paused_twice_and_resumed_at_other_sizes_ends_with_the_same_bits(undisturbed, paused_twice):
    assert_same_training(paused_twice[-1], undisturbed)


def test_a_pause_ends_with_a_checkpoint_where_it_was_asked_for(paused_twice):
    first, second, _ = paused_twice

    assert [(r.result["status"], r.result["steps"]) for r in (first, second)] == [("stopped", 5), ("stopped", 8)]
    final = paused_twice[-1]
    assert [e["step"] for e in final.events("checkpoint_committed")] == [5, 8, 12]
    assert [row["generation"] for row in final.history] == ["1-1"] * 5 + ["2-1"] * 3 + ["3-1"] * 4
    assert final.column("world_size") == [3] * 5 + [1] * 3 + [2] * 4
    assert [e["step"] for e in final.events("restored") if e["detail"]["rung"] == "checkpoint"] == [5, 8]


def test_nothing_is_lost_and_nothing_done_twice_over_pauses(paused_twice):
    final = paused_twice[-1]

    assert gaps_and_doubles(final.rows, B) == []
    assert final.column("first_position") == [B * step for step in range(12)]


def test_evaluations_after_a_resume_are_those_of_the_undisturbed_run(undisturbed, paused_twice):
    found = paused_twice[-1].evaluations

    assert {step: found[step] for step in (3, 6, 9, 12)} == undisturbed.evaluations


def test_momentum_survives_a_pause(tmp_path):
    job = Everything(rule="sgd", lr=0.05)
    straight = train(job, configure(tmp_path, "straight"), workers=1)
    train(job, configure(tmp_path, "paused", run__stop_after="7st"), workers=2)

    resumed = train(job, configure(tmp_path, "paused"), workers=3)

    assert_same_training(resumed, straight)
    assert any(name.endswith("/momentum_buffer") for name in resumed.state())


def test_a_wish_to_stop_pauses_at_a_step_boundary_with_the_wish_s_words(undisturbed_epoch, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    held = Everything(samples=LONG, fault="hold", fault_at=sample_at(step=4), fault_file=str(gate))
    run = prepare(held, configure(tmp_path, "run", scaling__max_workers=2))
    watch = Watch()
    with local_run(run, 2, on_record=watch) as local:
        watch.wait_for_step(3)
        local.stop("the machine is needed")
        gate.unlink()
        result = local.wait(WAIT_S)

    assert result["status"] == "stopped"
    assert result["message"] == "the machine is needed"
    assert result["steps"] < 12
    resumed = train(held, configure(tmp_path, "run"), workers=1)
    assert_same_training(resumed, undisturbed_epoch)


def test_a_wish_to_save_is_granted_once(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    held = Plain(samples=LONG, fault="hold", fault_at=sample_at(step=4), fault_file=str(gate))
    run = prepare(held, configure(tmp_path, "run", scaling__max_workers=1))
    watch = Watch()
    with local_run(run, 1, on_record=watch) as local:
        watch.wait_for_step(3)
        local.link.request(Wish("save"))
        gate.unlink()
        local.wait(WAIT_S)

    saved = [e["step"] for e in Ran(run, None).events("checkpoint_committed")]
    assert len(saved) == 2
    assert 4 <= saved[0] < saved[1] == 12


# ---- deaths ----------------------------------------------------------------------------------------------------


def test_survivors_of_a_killed_worker_go_on_in_their_processes_and_end_with_the_same_bits(undisturbed_epoch, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    # Rank 1 of 3 has microbatches 3 to 5: it is held in the middle of step 4 while another worker dies.
    job = Everything(samples=LONG, fault="hold", fault_at=sample_at(step=4, microbatch=4), fault_file=str(gate))
    run = prepare(job, configure(tmp_path, "run", scaling__max_workers=3))
    watch = Watch()
    with local_run(run, 3, on_record=watch) as local:
        watch.wait_for_step(3)
        victim = local.processes[2]
        victim.kill()
        victim.wait(WAIT_S)
        watch.wait_for(lambda r: r.get("kind") == "member_lost")
        gate.unlink()
        local.wait(WAIT_S)
        exit_codes = [p.wait(WAIT_S) for p in local.processes]

    found = Ran(run, None)
    assert exit_codes == [0, 0, -9]
    (lost,) = found.events("member_lost")
    assert (lost["member"], lost["pid"]) == ("w1-2", victim.pid)
    first, second = found.events("world_formed")
    assert second["detail"]["pids"] == [p for p in first["detail"]["pids"] if p != victim.pid]
    assert found.column("world_size") == [3] * 3 + [2] * 9
    assert_same_training(found, undisturbed_epoch)
    assert len(found.result["stalls"]) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_may_die_between_its_update_and_the_next_step(undisturbed_epoch, tmp_path, rank):
    """Rank 0 reports the steps: its last words must not be the only record of a step that others have applied."""
    named = tmp_path / "named"
    job = Everything(samples=LONG, fault="die-after-step", fault_at=6, fault_file=str(named))
    run = prepare(job, configure(tmp_path, "run", scaling__max_workers=2))
    with local_run(run, 2) as local:
        (tmp_path / "written").write_text(str(local.processes[rank].pid))
        (tmp_path / "written").rename(named)
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert len(found.events("member_lost")) == 1
    assert found.column("step") == list(range(1, 13))
    assert_same_training(found, undisturbed_epoch)


def test_two_nodes_exchange_in_two_levels_until_one_of_their_workers_dies(undisturbed_epoch, tmp_path):
    once = tmp_path / "die-once"
    once.touch()
    job = Everything(samples=LONG, fault="die", fault_at=sample_at(step=6), fault_file=str(once))

    found = train(job, configure(tmp_path, "run", scaling__workers_per_node=2), workers=4)

    assert found.column("world_size") == [4] * 5 + [3] * 7
    assert_same_training(found, undisturbed_epoch)


def test_loader_processes_of_a_killed_worker_end_with_it(undisturbed_epoch, tmp_path):
    once = tmp_path / "die-once"
    once.touch()
    job = Everything(samples=LONG, fault="die", fault_at=sample_at(step=6), fault_file=str(once))

    found = train(job, configure(tmp_path, "run", data__workers=1), workers=2)

    assert len(found.events("member_lost")) == 1
    assert_same_training(found, undisturbed_epoch)


# ---- damage ----------------------------------------------------------------------------------------------------


def flip_a_byte(ran: Ran, step: int) -> str:
    """Damage a pack of the checkpoint of `step`; its name."""
    (attempt,) = ran.storage.names(f"checkpoints/step-{step:08}")
    name = f"checkpoints/step-{step:08}/{attempt}/rank-0000.pack"
    data = bytearray(ran.storage.read(name))
    data[len(data) // 2] ^= 1
    ran.storage.replace(name, bytes(data))
    return name


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(undisturbed, tmp_path):
    paused = train(Everything(), configure(tmp_path, "run", run__stop_after="7st", checkpoint__every="2st"), workers=1)
    assert [e["step"] for e in paused.events("checkpoint_committed")] == [2, 4, 6, 7]
    damaged = flip_a_byte(paused, step=7)

    resumed = train(Everything(), configure(tmp_path, "run"), workers=2)

    (found,) = resumed.events("checkpoint_damaged")
    assert found["step"] == 7
    assert damaged in found["detail"]["problem"]
    assert [e["step"] for e in resumed.events("restored") if e["detail"]["rung"] == "checkpoint"] == [6]
    assert_same_training(resumed, undisturbed)


def test_where_no_checkpoint_can_be_loaded_the_run_fails_and_says_why(tmp_path):
    paused = train(Plain(), configure(tmp_path, "run", run__stop_after="2st"), workers=1)
    damaged = flip_a_byte(paused, step=2)

    failed = train(Plain(), configure(tmp_path, "run"), workers=1)

    assert failed.failure is not None
    assert "no committed checkpoint can be loaded" in failed.failure
    assert damaged in failed.failure
    assert failed.result["status"] == "failed"
