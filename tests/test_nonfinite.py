"""A NaN in one sample: found, named, and never applied."""

from __future__ import annotations

import json

import pytest

from elastic.errors import ConfigError
from elastic.run.prepare import prepare
from tests.forked import LONG, configure, sample_at, train
from tests.tiny_jobs import Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

BAD_STEP, BAD_MICROBATCH = 6, 7
BAD = sample_at(BAD_STEP, BAD_MICROBATCH)
SAMPLES = [sample_at(BAD_STEP, BAD_MICROBATCH, i) for i in range(3)]


def job(fault="nan-loss", kind=Everything):
    return kind(samples=LONG, fault=fault, fault_at=BAD)


@pytest.fixture(scope="module")
def skipped(fork_server, tmp_path_factory):
    """One worker that skips the bad step and saves after each."""
    options = {"run__on_nonfinite": "skip", "checkpoint__every": "1st", "checkpoint__keep_last": 20}
    return train(job(), configure(tmp_path_factory.mktemp("skipped"), "run", **options), workers=1)


@pytest.fixture(scope="module")
def stopped(fork_server, tmp_path_factory):
    """Two workers that stop at the bad step."""
    return train(job(), configure(tmp_path_factory.mktemp("stopped"), "run", checkpoint__every="2st"), workers=2)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_microbatch_and_samples(stopped):
    text = stopped.failure

    assert text is not None
    assert f"the loss of step {BAD_STEP} is not finite (loss nan" in text
    assert f"first in microbatch {BAD_MICROBATCH} (samples {', '.join(map(str, SAMPLES))})" in text
    assert "--run.on-nonfinite skip" in text
    assert stopped.result["status"] == "failed"
    assert stopped.result["message"] == text
    assert [e["kind"] for e in stopped.events("run_failed")] == ["run_failed"]


def test_nothing_of_the_bad_step_was_applied_or_recorded(stopped):
    assert stopped.column("step") == [1, 2, 3, 4, 5]
    assert [e["step"] for e in stopped.events("checkpoint_committed")] == [2, 4, 5], "the last on the way out"


def test_the_last_checkpoint_of_a_stopped_run_is_unharmed(stopped, skipped):
    """It is what a run had at that step which went on."""
    assert stopped.state(at=0) == skipped.state(at=12 - 5)


def test_a_run_that_stopped_goes_on_with_skip_and_ends_as_if_it_had_skipped_at_once(stopped, skipped):
    storage, name = stopped.run.config.run.storage, stopped.run.name
    with pytest.raises(ConfigError, match=r"--run\.on-nonfinite is 'skip', but run run was started with 'stop'"):
        prepare(job(), configure(storage, name, run__on_nonfinite="skip"))

    resumed = train(
        job(), configure(storage, name, run__on_nonfinite="skip", run__allow_change=("run.on-nonfinite",)), workers=2
    )

    assert resumed.failure is None
    assert resumed.sha == skipped.sha
    assert resumed.column("loss") == skipped.column("loss")
    assert not resumed.result["exactness_held"], "its parts had other options"
    assert skipped.result["exactness_held"], "what is skipped is the same at every number of workers"


def test_exactly_the_bad_update_is_skipped(skipped):
    assert skipped.failure is None
    assert [row["step"] for row in skipped.history if row.get("skipped")] == [BAD_STEP]
    assert [row["step"] for row in skipped.history if row["loss"] is None] == [BAD_STEP]
    states = {state["step"]: state for state in map(skipped.state, range(12))}
    training = {step: {k: v for k, v in s.items() if k != "step"} for step, s in states.items()}

    for step in range(2, 13):
        if step == BAD_STEP:
            assert training[step] == training[step - 1], "weights, buffers, optimizer and extra state stand still"
        else:
            assert training[step] != training[step - 1]


def test_skipping_has_the_same_bits_on_two_workers(skipped, tmp_path):
    found = train(job(), configure(tmp_path, "run", run__on_nonfinite="skip"), workers=2)

    assert found.sha == skipped.sha
    for name in ("loss", "grad_norm", "sample_hash"):
        assert found.column(name) == skipped.column(name)
    assert found.state() == skipped.state()


@pytest.mark.parametrize("exactness", ["bitwise", "fast"])
def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_located(tmp_path, exactness):
    found = train(job("nan-gradient", Plain), configure(tmp_path, "run", run__exactness=exactness), workers=2)

    assert found.failure is not None
    assert f"the gradient norm of step {BAD_STEP} is not finite (loss " in found.failure
    assert "norm nan" in found.failure
    assert f"first in microbatch {BAD_MICROBATCH} (samples {', '.join(map(str, SAMPLES))})" in found.failure
    assert found.column("step") == [1, 2, 3, 4, 5]


def test_fast_skips_too_and_names_the_pass_of_a_bad_loss(tmp_path):
    stop = train(job(kind=Plain), configure(tmp_path, "stop", run__exactness="fast"), workers=2)
    skip = train(
        job(kind=Plain), configure(tmp_path, "skip", run__exactness="fast", run__on_nonfinite="skip"), workers=2
    )

    assert stop.failure is not None
    assert f"the loss of step {BAD_STEP} is not finite" in stop.failure
    assert str(BAD) in stop.failure.split("(samples ")[1].split(")")[0].split(", ")
    assert skip.failure is None
    assert [row["step"] for row in skip.history if row.get("skipped")] == [BAD_STEP]
    assert all(loss is not None for loss in skip.column("loss")[BAD_STEP:])


def test_what_a_run_leaves_behind_is_strict_json_even_if_its_last_step_was_skipped(tmp_path):
    last = Plain(samples=LONG, fault="nan-loss", fault_at=sample_at(step=12))

    found = train(last, configure(tmp_path, "run", run__on_nonfinite="skip"), workers=1)

    assert found.failure is None
    assert found.history[-1]["skipped"] is True

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for name in ("result.json", "status.json", "config.json"):
        json.loads(found.storage.read(name), parse_constant=refuse)
    assert found.result["loss"] is None
