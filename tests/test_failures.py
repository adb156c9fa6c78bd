"""Errors in the job's own code end a run with all that is needed to find them."""

from __future__ import annotations

import pytest

from elastic.run.folder import RunFolder
from tests.forked import LONG, configure, sample_at, train
from tests.tiny_jobs import BrokenModel, Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

STEP, MICROBATCH = 6, 7
RESUMING = {"run__allow_change": ("job.fault", "job.fault-at")}


@pytest.fixture(scope="module")
def raised(fork_server, tmp_path_factory):
    """Two workers, one of which meets a sample that makes `loss` raise."""
    job = Plain(samples=LONG, fault="raise", fault_at=sample_at(STEP, MICROBATCH))
    return train(job, configure(tmp_path_factory.mktemp("raised"), "run"), workers=2)


def test_an_exception_in_loss_fails_the_run_with_worker_step_microbatch_and_traceback(raised):
    text = raised.failure

    assert text is not None
    assert text.startswith(f"worker w1-1 (rank 1 of 2) failed at step {STEP}, microbatch {MICROBATCH}, samples ")
    assert text.splitlines()[0].endswith(": RuntimeError: this sample is broken")
    assert "tiny_jobs.py" in text
    assert text.endswith("RuntimeError: this sample is broken")


def test_the_failure_is_in_the_result_and_in_the_events(raised):
    assert raised.result["status"] == "failed"
    assert raised.result["message"] == raised.failure
    (event,) = raised.events("run_failed")
    assert event["detail"] == raised.failure
    assert raised.run.folder.status()["status"] == "failed"


def test_the_steps_before_the_failure_are_recorded_and_none_after(raised):
    assert raised.column("step") == list(range(1, STEP))


def test_an_exception_whose_words_sound_like_the_network_is_still_the_job_s(tmp_path):
    text = "the connection to the feature store was refused by its peer"
    job = Plain(samples=LONG, fault="raise", fault_at=sample_at(STEP, MICROBATCH), fault_file=text)

    found = train(job, configure(tmp_path, "run"), workers=1, wait_s=20)

    assert found.failure is not None
    assert found.failure.endswith(f"RuntimeError: {text}")


def test_an_exception_before_the_first_step_is_reported_like_any_other(tmp_path):
    found = train(BrokenModel(), configure(tmp_path, "run"), workers=1)

    assert found.failure is not None
    assert "ValueError: no such layer" in found.failure
    assert found.result["status"] == "failed"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_was_trained_is_saved_before_the_error_ends_the_run_which_goes_on_from_there(
    strategy, undisturbed_epoch, tmp_path
):
    options = {"parallel__strategy": strategy, "run__max_failures": 0}
    broken = Everything(samples=LONG, fault="raise", fault_at=sample_at(STEP, MICROBATCH))

    failed = train(broken, configure(tmp_path, "run", **options), workers=2)
    fixed = train(Everything(samples=LONG), configure(tmp_path, "run", **RESUMING), workers=1)

    assert failed.failure is not None
    assert failed.failure.endswith("RuntimeError: this sample is broken")
    assert [e["step"] for e in fixed.events("checkpoint_committed")] == [STEP - 1, 12]
    assert [e["step"] for e in fixed.events("restored") if e["generation"].startswith("2-")] == [STEP - 1]
    assert fixed.sha == undisturbed_epoch.sha


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_state_before_a_loss_that_is_not_finite_is_saved(strategy, undisturbed_epoch, tmp_path):
    options = {"parallel__strategy": strategy}
    broken = Everything(samples=LONG, fault="nan-loss", fault_at=sample_at(STEP, MICROBATCH))

    failed = train(broken, configure(tmp_path, "run", **options), workers=2)
    fixed = train(Everything(samples=LONG), configure(tmp_path, "run", **RESUMING), workers=1)

    assert failed.failure is not None
    assert f"the loss of step {STEP} is not finite" in failed.failure
    assert [e["step"] for e in fixed.events("checkpoint_committed")] == [STEP - 1, 12]
    assert fixed.sha == undisturbed_epoch.sha


def test_a_failed_run_can_be_started_again_at_once(raised):
    folder = RunFolder(raised.storage)

    assert folder.claim(take_over=False) == 2
