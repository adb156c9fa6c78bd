"""Losses, spares, parking, uneven worlds and errors in plain processes: training goes on with the same bits."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from elastic.errors import RunFailed
from elastic.membership.protocol import Acknowledge, Scale, Wish, Yield
from elastic.membership.server import MembershipServer
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import PreparedRun, prepare
from elastic.worker.local import LocalRun
from tests.forked import LONG, WAIT_S, B, Ran, Watch, configure, fault, local_run, plan, sample_at, train, wait_until
from tests.tiny_jobs import Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def prepared(tmp_path: Any, most: int, least: int = 1, **options: Any) -> PreparedRun:
    config = configure(tmp_path, "run", scaling__max_workers=most, scaling__min_workers=least, **options)
    return prepare(Everything(), config)


def event(kind: str, **fields: Any) -> Any:
    wanted = {"kind": kind, **fields}
    return lambda record: wanted.items() <= record.items()


def rungs(ran: Ran, generation: str) -> list[str]:
    """Where the members of a world got their state from."""
    return [e["detail"]["rung"] for e in ran.events("restored") if e["generation"] == generation]


def assert_same_training(ran: Ran, undisturbed: Ran, *sizes: list[int]) -> None:
    """`sizes` are what the world sizes of the steps may be: where one is lost that had all of a step in hand, the
    others may or may not have it too."""
    assert ran.sha == undisturbed.sha
    assert ran.column("loss") == undisturbed.column("loss")
    assert gaps_and_doubles(ran.rows, B) == []
    assert len(ran.history) == len([r for r in ran.rows if "sample_hash" in r]), "a step was done twice"
    assert ran.column("world_size") in sizes
    assert not ran.events("member_late")
    assert not ran.events("member_evicted")


# ---- fewer than min_workers ------------------------------------------------------------------------------------


def test_with_too_few_the_run_is_parked_in_memory_and_resumed_when_another_comes(undisturbed, tmp_path):
    run, watch = prepared(tmp_path, most=2, least=2), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(fault("step.forward", 6, 1))) as local:
        parked = watch.wait_for(event("parked"))
        assert local.link.request("/status")["status"] == "parked"
        local.add_worker(environment={})
        local.wait(WAIT_S)
        pids = [p.pid for p in local.processes]

    ran = Ran(run, None)
    assert parked["detail"] == "1 workers, waiting for at least 2: add nodes, or stop the run"
    first, second = ran.events("world_formed")
    assert (first["detail"]["pids"], second["detail"]["pids"]) == (pids[:2], [pids[0], pids[2]])
    assert len(ran.events("resumed")) == 1
    assert rungs(ran, "1-2") == ["peer"], "the state was in memory"
    assert_same_training(ran, undisturbed, [2] * 12)


@pytest.mark.parametrize(
    ("point", "steps"),
    [("step.forward", [5]), ("step.before_fence", [5, 6]), ("step.after_fence", [5, 6]), ("eval.begin", [6])],
)
def test_parked_for_too_long_a_run_ends_with_its_newest_step_saved_and_goes_on_when_started_again(
    point, steps, undisturbed, tmp_path
):
    """Where one is lost that had all of step 6 in hand, the others may have applied it: then that step is saved.
    What comes after the step, an evaluation, is done when the run goes on."""
    options = {"recovery__max_wait": "0.3s", "eval__every": "3st"}
    run = prepared(tmp_path, most=3, least=3, **options)
    with local_run(run, 3, environment=plan(fault(point, 6, 1))) as local:
        with pytest.raises(RunFailed, match=r"parked for 0.3 s with 2 of at least 3 workers; add nodes, or") as failed:
            local.wait(WAIT_S)
        codes = [p.wait(WAIT_S) for p in local.processes]

    ended = Ran(run, None)
    assert failed.value.exit_code == 1
    assert codes == [0, -9, 0]
    assert ended.result["status"] == "failed"
    (saved,) = (e["step"] for e in ended.events("checkpoint_committed"))
    assert saved in steps
    again = prepared(tmp_path, most=2, **options)
    with local_run(again, 2) as local:
        local.wait(WAIT_S)
    ran = Ran(again, None)
    assert [e["step"] for e in ran.events("restored") if e["detail"]["rung"] == "checkpoint"] == [saved]
    assert ran.evaluations == undisturbed.evaluations
    assert_same_training(ran, undisturbed, [3] * saved + [2] * (12 - saved))


def test_a_run_that_is_given_up_after_its_last_step_has_all_its_figures_when_it_is_started_again(undisturbed, tmp_path):
    options = {"most": 2, "least": 2, "recovery__max_wait": "0.3s"}
    with local_run(prepared(tmp_path, **options), 2, environment=plan(fault("step.after_fence", 12, 1))) as local:
        with pytest.raises(RunFailed, match=r"parked for 0.3 s"):
            local.wait(WAIT_S)
    again = prepared(tmp_path, **options)
    with local_run(again, 2) as local:
        local.wait(WAIT_S)
    ran = Ran(again, None)
    assert {row["generation"] for row in ran.history} == {"1-1"}
    for name in ("loss", "samples_seen", "steps", "metrics", "weights_sha256"):
        assert ran.result[name] == undisturbed.result[name], name


def test_who_waits_with_an_old_state_does_not_take_the_run_back_behind_its_newest_checkpoint(
    undisturbed, tmp_path, gate
):
    """One of two is let go at step 5 and stays as a spare; the other, which goes on to step 9, is lost."""
    first, last = gate("first"), gate("last")
    faults = [fault("step.forward", 6, do="hold", file=first), fault("step.forward", 10, do="hold", file=last)]
    run, watch = prepared(tmp_path, most=2, scaling__spares=1, checkpoint__every="4st"), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for_step(5)
        local.link.request(Scale(1, "a test"))
        first.unlink()
        (left,) = watch.wait_for(event("world_formed", generation="1-2"))["detail"]["pids"]
        watch.wait_for(event("checkpoint_committed", step=8))
        watch.wait_for_step(9)
        next(p for p in local.processes if p.pid == left).kill()
        last.unlink()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    restored = [(e["step"], e["detail"]["rung"]) for e in ran.events("restored") if e["step"]]
    assert restored == [(8, "checkpoint")]
    assert ran.sha == undisturbed.sha
    assert gaps_and_doubles(ran.rows, B) == []


def test_a_parked_run_that_gives_up_its_workers_saves_first_and_goes_on_with_others(undisturbed, tmp_path):
    run, watch = prepared(tmp_path, most=2, least=2, recovery__lease="2s"), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(fault("step.forward", 6, 1))) as local:
        watch.wait_for(event("parked"))
        local.link.request(Yield(0, ["an older one"]))
        codes = [p.wait(WAIT_S) for p in local.processes]
        assert local.link.request("/group")["holds_state"] is False
        local.link.request(Yield(None, []))
        for _ in range(2):
            local.add_worker(environment={})
        local.wait(WAIT_S)

    ran = Ran(run, None)
    assert codes == [0, -9]
    assert ran.events("checkpoint_committed")[0]["step"] == 5
    assert set(rungs(ran, "1-2")) == {"checkpoint", "peer"}
    assert_same_training(ran, undisturbed, [2] * 12)


# ---- spares, sizes, devices ------------------------------------------------------------------------------------


def test_a_warm_spare_fills_a_loss_in_the_same_re_formation(undisturbed, tmp_path, gate):
    held = gate("held")
    run, watch = prepared(tmp_path, most=3, scaling__spares=1), Watch()
    faults = [fault("step.forward", 6, 1, "hold", file=held), fault("step.reduce", 6, 1, only=tmp_path / "mark")]
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:
        for index in range(4):
            watch.wait_for(event("worker_warm", member=f"w1-{index}"))
        held.unlink()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    before, after = (set(e["detail"]["ids"]) for e in ran.events("world_formed"))
    assert len(before) == len(after) == 3
    assert len(before & after) == 2
    (lost,) = ran.events("member_lost")
    assert {lost["member"]} == before - after
    assert_same_training(ran, undisturbed, [3] * 12)


def test_a_worker_that_would_not_lower_the_rounds_stays_a_spare(undisturbed, tmp_path, gate):
    """Ten microbatches are two rounds for five workers as for six."""
    held = gate("held")
    run, watch = prepared(tmp_path, most=6), Watch()
    with local_run(run, 5, on_record=watch, environment=plan(fault("step.forward", 6, 1, "hold", file=held))) as local:
        watch.wait_for_step(5)
        local.add_worker(environment={})
        watch.wait_for(event("worker_warm", member="w1-5"))
        held.unlink()
        local.wait(WAIT_S)
        codes = [p.wait(WAIT_S) for p in local.processes]

    ran = Ran(run, None)
    assert codes == [0] * 6
    assert len(ran.events("world_formed")) == 1
    assert_same_training(ran, undisturbed, [5] * 12)


def test_a_joiner_with_another_device_is_left_out_of_a_bitwise_world(undisturbed, tmp_path, gate):
    held = gate("held")
    run, watch = prepared(tmp_path, most=2), Watch()
    with local_run(run, 1, on_record=watch, environment=plan(fault("step.forward", 6, 0, "hold", file=held))) as local:
        watch.wait_for_step(5)
        local.add_worker(environment={"ATEN_CPU_CAPABILITY": "default"})
        left_out = watch.wait_for(event("notice", member="w1-1"))
        held.unlink()
        local.wait(WAIT_S)

    assert "its device" in left_out["detail"]
    assert_same_training(Ran(run, None), undisturbed, [1] * 12)


def test_a_joiner_with_another_device_is_taken_into_a_fast_world(tmp_path, gate):
    held = gate("held")
    run, watch = prepared(tmp_path, most=2, run__exactness="fast"), Watch()
    with local_run(run, 1, on_record=watch, environment=plan(fault("step.forward", 6, 0, "hold", file=held))) as local:
        watch.wait_for_step(5)
        local.add_worker(environment={"ATEN_CPU_CAPABILITY": "default"})
        watch.wait_for(lambda r: "to take in" in str(r.get("detail")))
        held.unlink()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    one, other = (e["detail"]["device"] for e in ran.events("worker_warm"))
    assert one != other
    assert ran.column("world_size")[-1] == 2
    assert gaps_and_doubles(ran.rows, B) == []


# ---- steps without a fence ---------------------------------------------------------------------------------------


def test_who_lacks_an_update_takes_the_state_that_has_it_and_if_that_is_lost_makes_it_again(
    tmp_path, gate, monkeypatch
):
    """Who is held in `step.reduce` has given its gradients, and does not look at the sum before it knows of the loss;
    the others go on."""
    heard: set[tuple[str, str]] = set()  # (member, generation that it knows to be broken)
    take = MembershipServer._from_worker

    def note(server: MembershipServer, member: str, message: Any, generation: Any) -> None:
        heard.update({(member, str(message.generation))} if isinstance(message, Acknowledge) else ())
        take(server, member, message, generation)

    monkeypatch.setattr(MembershipServer, "_from_worker", note)
    first, others, behind = gate("first"), gate("others"), gate("behind")
    came = tmp_path / "rank 1 has applied step 9"
    faults = [
        *(fault("step.reduce", 6, rank, "hold", file=others) for rank in (1, 2, 3)),
        fault("step.forward", 7, 0, "hold", file=first),
        fault("step.reduce", 9, 0, "hold", file=behind),
        fault("step.forward", 10, 1, "sleep", seconds=0, only=came),
    ]
    # A member that is held here is not to be taken for one that hangs, however busy the machine is.
    options = {"run__exactness": "fast", "scaling__max_workers": 4, "recovery__hang_timeout": "100s"}
    config, watch = configure(tmp_path, "run", **options), Watch()
    run = prepare(Plain(), config)
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:

        def lose(rank: int, generation: str) -> None:
            formed = watch.wait_for(event("world_formed", generation=generation))["detail"]
            os.kill(formed["pids"][rank], signal.SIGKILL)
            left = {(id, generation) for other, id in enumerate(formed["ids"]) if other != rank}
            wait_until(lambda: left <= heard, "the others to know of it")

        watch.wait_for_step(6)
        lose(0, "1-1")
        first.unlink()
        others.unlink()
        wait_until(came.exists, "step 10")
        lose(2, "1-2")
        behind.unlink()
        local.wait(WAIT_S)

    ran, alone = Ran(run, None), train(Plain(), configure(tmp_path, "alone", run__exactness="fast"), 1)
    done = [(r["step"], r["generation"]) for r in ran.rows if "sample_hash" in r and r["step"] in (6, 9)]
    assert done == [(6, "1-1"), (6, "1-2"), (9, "1-2")]
    assert (rungs(ran, "1-2"), rungs(ran, "1-3")) == ([], ["peer"])
    assert gaps_and_doubles(ran.rows, B) == []
    assert ran.column("loss") == pytest.approx(alone.column("loss"), rel=1e-4)


# ---- several losses, and slow workers --------------------------------------------------------------------------


def test_uneven_worlds_lose_one_worker_after_another(undisturbed, tmp_path):
    """Ten microbatches on four, three and two workers."""
    faults = [
        fault("step.before_fence", 4, 3, only=tmp_path / "a"),
        fault("step.after_fence", 8, 0, only=tmp_path / "b"),
    ]

    ran = train(Everything(), configure(tmp_path, "run"), workers=4, faults=faults)

    sizes = ([4] * n + [3] * (m - n) + [2] * (12 - m) for n in (3, 4) for m in (7, 8))
    assert_same_training(ran, undisturbed, *sizes)


@pytest.mark.parametrize("point", ["world.assigned", "world.connected"])
def test_a_second_loss_during_the_recovery_from_the_first(point, undisturbed, tmp_path):
    faults = [fault("step.forward", 6, 2, only=tmp_path / "first"), fault(point, 5, 0, only=tmp_path / "second")]

    ran = train(Everything(), configure(tmp_path, "run"), workers=3, faults=faults)

    assert len({e["member"] for e in ran.events("member_lost") if "member" in e}) == 2
    assert_same_training(ran, undisturbed, [3] * 5 + [1] * 7)


def test_two_are_lost_at_once(undisturbed, tmp_path):
    # A point that each reaches alone: at a later one the first death may have freed the other already.
    faults = [fault("step.forward", 6, rank, only=tmp_path / f"rank-{rank}") for rank in (0, 2)]

    ran = train(Everything(), configure(tmp_path, "run"), workers=4, faults=faults)

    assert len(ran.events("member_lost")) == 2
    assert_same_training(ran, undisturbed, [4] * 5 + [2] * 7)


@pytest.mark.parametrize("point", ["step.before_fence", "step.after_fence"])
def test_a_loss_in_the_last_step_before_a_pause_does_not_move_the_pause(point, tmp_path):
    config = configure(tmp_path, "run", run__stop_after="6st", scaling__spares=1)

    ran = train(Everything(), config, workers=3, faults=[fault(point, 6, 1, only=tmp_path / "mark")])

    assert len(ran.events("member_lost")) == 1
    assert (ran.result["status"], ran.result["steps"]) == ("stopped", 6)


def test_all_but_a_checkpoint_is_lost_and_new_workers_go_on_from_it(undisturbed, tmp_path, gate):
    held = gate("held")
    run, watch = prepared(tmp_path, most=2, checkpoint__every="4st", recovery__lease="2s"), Watch()
    faults = [fault("step.forward", 7, do="hold", file=held), fault("step.forward", 7)]
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed")
        held.unlink()
        for process in local.processes:
            process.wait(WAIT_S)
        local.add_worker(environment={})
        local.add_worker(environment={})
        local.wait(WAIT_S)

    ran = Ran(run, None)
    assert rungs(ran, "1-2")[0] == "checkpoint"
    assert ran.sha == undisturbed.sha
    assert gaps_and_doubles(ran.rows, B) == []
    assert ran.column("generation")[:5] == ["1-1"] * 4 + ["1-2"], "what was not in the checkpoint was done again"
    deaths = [e["detail"] for e in ran.events("process_ended")]
    assert len(deaths) == 2
    assert all(told.startswith("killed by SIGKILL: ") for told in deaths)


def test_a_slow_survivor_is_awaited_and_not_left_behind(undisturbed, tmp_path):
    """A step of three seconds is ten times as long as the time in which the loss must be acknowledged."""
    faults = [fault("step.forward", 6, 2), fault("step.forward", 6, 1, "sleep", seconds=3, only=tmp_path / "slow")]

    ran = train(Everything(), configure(tmp_path, "run"), workers=3, faults=faults)

    assert len(ran.events("member_lost")) == 1
    assert_same_training(ran, undisturbed, [3] * 5 + [2] * 7)


def test_a_slow_worker_that_gets_on_is_not_taken_for_a_hung_one(undisturbed, tmp_path):
    slow = [fault("step.forward", 6, 1, "sleep", seconds=0.8) for _ in range(4)]  # four of its microbatches
    options = {"recovery__hang_timeout": "2s"}

    ran = train(Everything(), configure(tmp_path, "run", **options), workers=2, faults=slow)

    assert len(ran.events("world_formed")) == 1
    assert_same_training(ran, undisturbed, [2] * 12)


def test_a_worker_that_hangs_on_its_way_out_of_a_broken_world_is_evicted(undisturbed, tmp_path, gate):
    """It acknowledges that the world is broken, because its watcher lives, but never joins again."""
    held = gate("held")
    run, watch = prepared(tmp_path, most=3, recovery__hang_timeout="0.5s"), Watch()
    faults = [
        fault("step.forward", 1, 1, "sleep", seconds=0),
        fault("step.forward", 6, 2, only=tmp_path / "mark"),
        fault("step.forward", 6, 1, "hold", file=held),
    ]
    with local_run(run, 3, on_record=watch, environment=plan(*faults)) as local:
        evicted = watch.wait_for(event("member_evicted"))
        local.wait(WAIT_S)
        held.unlink()
        codes = [p.wait(WAIT_S) for p in local.processes]

    ran = Ran(run, None)
    assert evicted["member"] == "w1-1"
    assert codes == [0, 1, -9]
    assert ran.sha == undisturbed.sha
    assert ran.column("world_size") == [3] * 5 + [1] * 7
    stacks = [n for n in ran.storage.names("stacks") if "w1-1" in n]
    assert b"_hold" in ran.storage.read(f"stacks/{stacks[0]}")


# ---- wishes and errors -----------------------------------------------------------------------------------------


def test_a_wish_to_save_is_not_granted_again_by_every_later_world(undisturbed, tmp_path, gate):
    held, saving = gate("held"), gate("saving")
    run, watch = prepared(tmp_path, most=2), Watch()
    faults = [
        fault("step.forward", 4, 0, "hold", file=held),
        fault("step.forward", 9, 1, "hold", file=saving),
        fault("step.forward", 9, 1, only=tmp_path / "mark"),
    ]
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for_step(3)
        local.link.request(Wish("save"))
        held.unlink()
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed")
        saving.unlink()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    saved = [e["step"] for e in ran.events("checkpoint_committed")]
    assert len(saved) == 2
    assert 4 <= saved[0] <= 5
    assert saved[1] == 12
    assert_same_training(ran, undisturbed, [2] * 8 + [1] * 4)


def test_an_error_that_passes_is_replayed_in_place(undisturbed, tmp_path):
    faults = [fault("step.forward", 6, 1, "raise", only=tmp_path / "mark")]

    ran = train(Everything(), configure(tmp_path, "run"), workers=2, faults=faults)

    first, second = ran.events("world_formed")
    assert first["detail"]["pids"] == second["detail"]["pids"]
    assert_same_training(ran, undisturbed, [2] * 12)


def test_the_same_error_at_the_same_place_is_replayed_only_so_often(tmp_path):
    job = Plain(samples=LONG, fault="raise", fault_at=sample_at(6, microbatch=7))

    ran = train(job, configure(tmp_path, "run", run__max_failures=2), workers=2)

    assert ran.failure is not None
    assert ran.failure.startswith("worker w1-1 (rank 1 of 2) failed at step 6, microbatch 7, samples ")
    assert len(ran.events("world_formed")) == 4, "the first time and two replays, and one that saved"
    assert ran.column("step") == [1, 2, 3, 4, 5]
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [5]


@pytest.mark.parametrize("kind", ["host", "device", "python"])
def test_out_of_memory_says_what_to_change(kind, tmp_path):
    job = Plain(samples=LONG, fault="out-of-memory", fault_at=sample_at(2), fault_file=kind)

    ran = train(job, configure(tmp_path, "run", run__max_failures=0), workers=1)

    assert ran.failure is not None
    assert "Out of memory: give a larger --batch.microbatches" in ran.failure.splitlines()[-1]


# ---- starting --------------------------------------------------------------------------------------------------


def test_a_run_that_cannot_start_its_workers_leaves_nothing_behind(tmp_path):
    run = prepare(Plain(), configure(tmp_path, "run"))
    broken: Any = {"NOT_A_STRING": 3}

    with pytest.raises(TypeError):
        with LocalRun(run, 1, environment=broken):
            pytest.fail("it was started")

    again = replace(run.config, run=replace(run.config.run, take_over=True))
    assert prepare(Plain(), again).finished is None
