"""State of every kind comes back through pauses, joins, other strategies and sizes; what cannot is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from elastic import cli
from elastic.checkpoint.reader import newest_first
from elastic.errors import ConfigError
from elastic.run.prepare import prepare
from tests.forked import Ran, Watch, configure, local_run, train
from tests.odd_state_job import Counted, Ends, NotSaveable, NotSaved, OddState, Pace, Scheduled

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


def quick(tmp_path, name: str, **options):
    return configure(tmp_path, name, **{"optim__schedule": "constant", "optim__warmup": None, **options})


@pytest.fixture(scope="module")
def alone(fork_server, tmp_path_factory) -> Ran:
    ran = train(OddState(), quick(tmp_path_factory.mktemp("odd"), "alone"), 1)
    assert ran.failure is None
    return ran


@pytest.mark.parametrize(("strategy", "workers"), [("ddp", (2, 1)), ("fsdp", (2, 3))])
def test_a_pause_at_another_size_loses_nothing_of_the_state(alone: Ran, tmp_path, strategy: str, workers):
    for count, stop in zip(workers, ("3st", None)):
        config = quick(tmp_path, "run", run__stop_after=stop, parallel__strategy=strategy)
        ran = train(OddState(), config, count)
        assert ran.failure is None

    assert ran.sha == alone.sha
    assert ran.column("lr") == alone.column("lr")
    assert ran.result["sample"] == alone.result["sample"] == "scales 13"
    assert ran.events("restored")[-1]["step"] == 3
    text = (tmp_path / "run" / "config.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert stored["result"]["job.most"] == {"$": "float", "of": "inf"}


def test_parts_whose_names_end_in_module_keep_them_in_files_that_go_out_and_come_in(alone: Ran, tmp_path):
    file, own = tmp_path / "out.safetensors", tmp_path / "own.safetensors"
    assert cli.main(["checkpoints", "export", alone.storage.url, str(file)]) == 0
    weights, model = load_file(file), OddState().model()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    save_file({name: tensors[name].detach().clone() for name in weights}, own)

    ran = train(OddState(), quick(tmp_path, "run", checkpoint__init_from=str(own), run__stop_after="1st"), 1)

    assert ran.failure is None
    assert {name.partition(".")[0] for name in weights} == {"submodule", "module", "norm"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_worker_that_joins_late_is_given_all_of_the_state(alone: Ran, tmp_path, strategy: str):
    watch = Watch()
    config = quick(tmp_path, "run", parallel__strategy=strategy, run__stop_after=None)
    run = prepare(OddState(), replace(config, scaling=replace(config.scaling, max_workers=2, min_workers=1)))
    with local_run(run, 1, on_record=watch) as local:
        watch.wait_for_step(4)
        local.add_worker()
        local.wait(60)
    ran = Ran(run, None)

    assert ran.sha == alone.sha
    if any(row["world_size"] == 2 for row in ran.rows if "world_size" in row):
        assert ran.result["hardware"]["workers"] == 2


def test_a_finished_run_trains_on_to_another_length_and_only_if_that_is_said(alone: Ran, tmp_path):
    first = train(OddState(), quick(tmp_path, "run", run__duration="3st"), 1)
    longer = quick(tmp_path, "run")

    with pytest.raises(ConfigError, match=r"--run\.duration is '12st', but run run was .*--run\.allow-change run\.dur"):
        prepare(OddState(), longer)
    assert prepare(OddState(), quick(tmp_path, "run", run__duration="3st")).finished is not None
    ran = train(OddState(), replace(longer, run=replace(longer.run, allow_change=("run.duration",))), 1)

    assert first.result["steps"] == 3
    assert (ran.failure, ran.result["steps"], ran.sha) == (None, 12, alone.sha)
    assert prepare(OddState(), longer).finished is not None, "it is the run's length now"


def test_an_option_that_cannot_be_resumed_with_leaves_the_run_as_it_was(tmp_path):
    config = quick(tmp_path, "run", run__stop_after="2st")
    train(OddState(), config, 1)
    other = replace(config, run=replace(config.run, allow_change=("job.width", "job.pace")))

    failed = train(OddState(width=8, pace=Pace.SLOW), other, 1)

    assert "no committed checkpoint can be loaded" in (failed.failure or "")
    assert train(OddState(), config, 1).failure is None


def test_what_a_module_keeps_goes_on_after_a_pause_and_may_depend_on_a_workers_passes_in_fast(tmp_path):
    for name, stops in (("whole", (None,)), ("run", ("4st", None))):
        for stop in stops:
            config = quick(tmp_path, name, run__exactness="fast", run__stop_after=stop)
            ran = train(Counted(), config, 1)
            assert (ran.failure, ran.result.get("sample")) == (None, None if stop else "seen 12")
    ran = train(Counted(), quick(tmp_path, "three", run__exactness="fast"), 3)
    assert ran.failure is None
    ran = train(Counted(), quick(tmp_path, "exact"), 3)
    assert "get_extra_state() of the model differs on" in (ran.failure or "")


def test_a_scheduler_of_torch_s_is_followed_through_a_pause(tmp_path):
    whole = train(Scheduled(), quick(tmp_path, "whole"), 1)
    for stop in ("5st", None):
        ran = train(Scheduled(), quick(tmp_path, "run", run__stop_after=stop), 2)

    rates = whole.column("lr")
    assert rates[0] == pytest.approx(0.004)
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates[-1] < 0.01
    assert ran.column("lr") == rates
    assert ran.sha == whole.sha


@pytest.mark.parametrize(
    ("job", "said", "steps"),
    [
        (NotSaved(), r"job.average[0] (a Tensor) (and 5 more) changed in step 1 and is part of no saved state", 0),
        (NotSaveable(), r"optimizer.state['0.weight']['how']['call'][0] is a function, which is not kept", 0),
        (Ends(), "--job.x is 5, which cannot be", 5),
    ],
    ids=["unsaved", "not saveable", "ends"],
)
def test_what_ends_a_run_says_so_in_one_sentence_and_a_whole_state_is_saved_first(tmp_path, job, said: str, steps: int):
    ran = train(job, quick(tmp_path, "run"), 2)

    assert ran.failure is not None
    assert said in ran.failure
    assert "Traceback" not in ran.failure
    assert [c.step for c in newest_first(ran.storage)] == ([steps] if steps else [])
