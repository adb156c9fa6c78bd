"""Models that are cut into the stages of pipelines: the bits of one process, through kills and changes."""

from __future__ import annotations

import pytest

from elastic.errors import ConfigError
from elastic.observe.ledger import gaps_and_doubles
from elastic.placement import pipelines as cut_into
from elastic.run.accounts import account_of_run
from elastic.run.prepare import prepare, report
from tests.forked import WAIT_S, B, Ran, Watch, configure, fault, local_run, plan, train
from tests.slowly import slow
from tests.stage_jobs import BESIDE, Beside, InStages
from tests.test_bits import assert_same_training
from tests.tiny_jobs import CONFIG

V = CONFIG.batch.microbatches
DURATION = "17st"  # in step 16 writes to parameters are looked for by value

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def pipelines(storage: object, stages: int | str = 2, name: str = "run", **options: object):
    """A configuration with pipelines."""
    return configure(storage, name, **{"parallel__pipeline": stages, "run__duration": DURATION, **options})


@pytest.fixture(scope="module")
def one_process(fork_server, tmp_path_factory):
    """The undisturbed run of one process with a whole model."""
    ran = train(InStages(), pipelines(tmp_path_factory.mktemp("one"), 1, eval__every="3st"), workers=1)
    assert ran.failure is None
    return ran


@pytest.mark.parametrize(
    ("stages", "workers", "strategy"),
    [(2, 4, "ddp"), *slow((2, 2, "ddp"), (3, 5, "ddp"), (4, 4, "ddp"), (2, 4, "fsdp"), (3, 6, "fsdp"), (2, 5, "ddp"))],
)
def test_every_number_of_stages_and_pipelines_trains_the_bits_of_one_process(
    one_process, tmp_path, stages, workers, strategy
):
    config = pipelines(tmp_path, stages, eval__every="3st", parallel__strategy=strategy)
    found = train(InStages(), config, workers)

    assert found.failure is None
    assert_same_training(found, one_process)
    assert found.evaluations == one_process.evaluations
    count, each = cut_into(workers, stages)
    busy, spent = V / (count * (-(-V // count) + each - 1)), account_of_run(found.run.folder).seconds
    assert spent["productive"] / (spent["productive"] + spent["imbalance"]) == pytest.approx(busy), (
        "it fills and empties"
    )


@pytest.mark.long
def test_fast_trains_the_same_bits(one_process, tmp_path):
    """It sums in the same order: there is no other way that would cost less."""
    found = train(InStages(), pipelines(tmp_path, eval__every="3st", run__exactness="fast"), workers=2)

    assert found.failure is None
    assert found.sha == one_process.sha


@pytest.fixture(scope="module")
def one_cell(fork_server, tmp_path_factory):
    """The undisturbed run of one cell of two workers with a whole model."""
    config = pipelines(tmp_path_factory.mktemp("cell"), 1, eval__every="3st", parallel__tensor=2)
    ran = train(InStages(), config, workers=2)
    assert ran.failure is None
    return ran


@pytest.mark.long
@pytest.mark.parametrize(("workers", "strategy"), [(4, "ddp"), (8, "ddp"), (8, "fsdp")])
def test_pipelines_of_cells_train_the_bits_of_one_cell(one_cell, tmp_path, workers, strategy):
    config = pipelines(tmp_path, eval__every="3st", parallel__tensor=2, parallel__strategy=strategy)
    found = train(InStages(), config, workers)

    assert found.failure is None
    assert_same_training(found, one_cell)
    assert found.evaluations == one_cell.evaluations


@pytest.mark.long
def test_two_pipelines_of_two_stages_of_two_workers_lose_two_of_them(one_cell, tmp_path):
    """First there are three cells left, a pipeline of three stages, then two."""
    config = pipelines(tmp_path, eval__every="3st", parallel__tensor=2, checkpoint__every="4st")
    kills = [("step.stage", 3, 5), ("step.before_fence", 7, 1)]
    faults = [fault(*kill, only=tmp_path / f"killed-{number}") for number, kill in enumerate(kills)]

    ran = train(InStages(), config, workers=8, faults=faults)

    assert ran.failure is None
    assert ran.sha == one_cell.sha
    assert ran.column("loss") == one_cell.column("loss")
    assert [e["detail"]["size"] for e in ran.events("world_formed")] == [8, 7, 6]
    assert gaps_and_doubles(ran.rows, B) == []


# ---- losses and joins ------------------------------------------------------------------------------------------

#: Kills of a run of two pipelines of two stages: point, step, and rank in the world of that moment. After the first
#: there is one pipeline of three stages, after the second one of two.
KILLS = {
    "passes": [("step.stage", 2, 3), ("step.before_fence", 8, 0)],
    "fences": [("step.after_fence", 3, 1), ("checkpoint.staged", 4, 1)],
    "saving": [("world.connected", None, 2), ("eval.begin", 3, 0)],
}


@pytest.mark.parametrize("kills", [KILLS["passes"], *slow(KILLS["fences"], KILLS["saving"])])
def test_a_lost_stage_is_cut_anew_over_those_that_are_left(one_process, tmp_path, kills):
    config = pipelines(tmp_path, eval__every="3st", checkpoint__every="4st")
    marks = [tmp_path / f"killed-{number}" for number in range(len(kills))]
    faults = [fault(*kill, only=mark) for kill, mark in zip(kills, marks)]

    ran = train(InStages(), config, workers=4, faults=faults)

    assert all(mark.exists() for mark in marks)
    assert ran.failure is None
    assert ran.sha == one_process.sha
    assert ran.column("loss") == one_process.column("loss")
    assert ran.evaluations == one_process.evaluations
    assert gaps_and_doubles(ran.rows, B) == []
    if kills is KILLS["passes"]:
        lost = [e["detail"]["reason"] for e in ran.events("restored") if e["detail"]["rung"] == "checkpoint"]
        assert [reason.partition(", ")[2] for reason in lost] == ["shard 0 of 3 was lost"]


@pytest.mark.long
def test_the_second_pipeline_supplies_what_a_lost_stage_held_and_no_step_is_lost(one_process, tmp_path):
    config = pipelines(tmp_path, eval__every="3st")

    ran = train(InStages(), config, workers=4, faults=[fault("step.stage", 5, 1, only=tmp_path / "killed")])

    assert ran.failure is None
    assert ran.sha == one_process.sha
    assert len([row for row in ran.rows if "sample_hash" in row]) == 17, "a step was done twice"
    assert ran.column("world_size")[-1] == 3


@pytest.mark.long
def test_what_the_only_pipeline_lost_comes_from_a_snapshot(one_process, tmp_path):
    config = pipelines(tmp_path, eval__every="3st", recovery__snapshot_every="1st", scaling__min_workers=1)

    ran = train(InStages(), config, workers=3, faults=[fault("step.stage", 7, 1, only=tmp_path / "killed")])

    assert ran.failure is None
    assert ran.sha == one_process.sha
    assert [e["detail"]["rung"] for e in ran.events("restored")] == ["snapshot"]


@pytest.mark.long
def test_a_worker_that_comes_becomes_a_stage(one_process, tmp_path, gate):
    held = gate("held")
    run, watch = prepare(InStages(), pipelines(tmp_path, eval__every="3st", scaling__max_workers=3)), Watch()
    faults = plan(fault("step.forward", 6, 0, "hold", file=held))
    with local_run(run, 2, on_record=watch, environment=faults) as local:
        watch.wait_for_step(4)
        local.add_worker()
        watch.wait_for(lambda r: r.get("kind") == "worker_warm" and r["member"] == "w1-2")
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert found.sha == one_process.sha
    assert (found.column("world_size")[0], found.column("world_size")[-1]) == (2, 3)


# ---- other layouts -------------------------------------------------------------------------------------------------


def test_a_run_changes_from_and_to_pipelines_at_every_pause(one_process, tmp_path):
    for stages, strategy, workers, stop in (
        (1, "ddp", 2, "3st"),
        (3, "ddp", 3, "3st"),
        (2, "fsdp", 4, "3st"),
        (1, "fsdp", 2, None),
    ):
        options = {"eval__every": "3st", "run__stop_after": stop, "parallel__strategy": strategy}
        found = train(InStages(), pipelines(tmp_path, stages, **options), workers)
        assert found.failure is None

    assert found.sha == one_process.sha
    assert found.column("loss") == one_process.column("loss")
    assert [e["step"] for e in found.events("restored") if e["detail"]["rung"] == "checkpoint"] == [3, 6, 9]
    mine, whole = found.state(), one_process.state()
    assert {name: mine[name] for name in mine if name not in ("step", "values")} == {
        name: whole[name] for name in whole if name not in ("step", "values")
    }


# ---- what is said and refused ----------------------------------------------------------------------------------------


def test_the_first_line_says_how_many_pipelines_of_how_many_stages_there_are(tmp_path):
    config = pipelines(tmp_path, 2, scaling__max_workers=5, scaling__spares=1)

    assert "5 workers = 2 pipelines x 2 stages, 2 spare -> 5 rounds" in report(prepare(InStages(), config))
    config = pipelines(tmp_path, 2, scaling__max_workers=8, parallel__tensor=2)
    assert "8 workers = 2 pipelines x 2 stages x 2 tensor, 0 spare -> 5 rounds" in report(prepare(InStages(), config))


def test_auto_chooses_the_fewest_stages_that_fit_and_says_so(tmp_path):
    config = pipelines(tmp_path, "auto", scaling__memory_per_worker=0.15 / 1024)
    run = prepare(InStages(), config)

    assert run.config.parallel.pipeline == 2
    said = report(run)
    assert "--parallel.pipeline auto: 2 stages, with which a worker needs about 0.1" in said
    assert "4 workers = 2 pipelines x 2 stages, 0 spare -> 5 rounds" in said
    assert "fewer than 2 workers have too little memory: give --scaling.min-workers 2" in said
    plenty = prepare(InStages(), pipelines(tmp_path, "auto", scaling__memory_per_worker=1.0))
    assert plenty.config.parallel.pipeline == 1
    given = prepare(InStages(), pipelines(tmp_path, 2, scaling__memory_per_worker=1.0))
    assert given.notes == ("--scaling.memory-per-worker is not used: only --parallel.pipeline auto goes by it",)
    with pytest.raises(
        ConfigError, match=r"is auto, but even with 4 stages a worker needs about 0.* take more workers"
    ):
        prepare(InStages(), pipelines(tmp_path, "auto", scaling__memory_per_worker=1e-5))
    with pytest.raises(ConfigError, match=r"--parallel.pipeline is auto, but the job has no stages\(\)"):
        prepare(InStages(wrong="none"), pipelines(tmp_path, "auto"))


@pytest.mark.long
def test_a_run_with_chosen_stages_trains_the_bits_of_one_process(one_process, tmp_path):
    config = pipelines(tmp_path, "auto", eval__every="3st", scaling__memory_per_worker=0.15 / 1024)

    assert train(InStages(), config, workers=4).sha == one_process.sha


@pytest.mark.parametrize(
    ("job", "message"),
    [
        *slow(
            (InStages(wrong="none"), "--parallel.pipeline is 2, but the job has no stages(), and the model no pp_plan"),
            (InStages(wrong="twice"), "stages() returns head twice; return each module once"),
            (
                InStages(wrong="left out"),
                "the parameter head.weight is trained, but no module that stages() returns has it",
            ),
            (
                InStages(wrong="tied"),
                "blocks.0 and blocks.1 share the parameter blocks.0.up.weight, and stages() returns them as two",
            ),
            (InStages(wrong="sequence"), "tensor_plan() cuts activations along the sequence between layers, which"),
            (
                InStages(wrong="shapes"),
                "all microbatches must make activations of one shape between the stages, but blocks.",
            ),
            (InStages(wrong="same"), "a First of stages() returns one tensor twice"),
        ),
        (
            InStages(wrong="more"),
            "stages() returns modules that, called one after another, compute something else than the model's",
        ),
    ],
    ids=["none", "twice", "left out", "tied", "sequence", "shapes", "same", "more"],
)
def test_stages_that_do_not_fit_are_refused_by_name_before_training(tmp_path, job, message):
    tensor = 2 if job.wrong == "sequence" else 1
    found = train(job, pipelines(tmp_path, parallel__tensor=tensor), workers=2 * tensor)

    assert found.failure is not None
    assert message in found.failure
    assert found.history == []


@pytest.mark.parametrize(
    "kind", [*slow(*(kind for kind in BESIDE if kind not in ("left behind", "detach"))), "left behind", "detach"]
)
def test_what_is_done_beside_the_layers_is_refused_before_it_reaches_the_weights(tmp_path, kind):
    found = train(Beside(kind=kind), pipelines(tmp_path, run__check_every="2st", run__duration="4st"), workers=2)

    assert found.failure is not None
    assert f"with --parallel.pipeline a microbatch has another {BESIDE[kind]}" in found.failure
    assert [row["step"] for row in found.history] == ([1, 2] if kind == "grows" else [])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["penalty", "metric"])
def test_computing_with_parameters_of_other_stages_is_refused(tmp_path, kind):
    found = train(Beside(kind=kind), pipelines(tmp_path), workers=2)

    assert found.failure is not None
    assert (
        "loss() computes with the parameter embed.weight, but with --parallel.pipeline each worker has" in found.failure
    )
    assert found.history == []


@pytest.mark.long
def test_a_stage_that_begins_late_to_write_to_its_parameters_is_found_by_value(tmp_path):
    found = train(Beside(kind="writes late"), pipelines(tmp_path), workers=2)

    assert found.failure is not None
    assert "parameter blocks.0.weight is written to in forward or backward passes" in found.failure
    assert [row["step"] for row in found.history] == [*range(1, 16)]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["1-tuple", "written to", "frozen"])
def test_what_layers_do_inside_trains_the_bits_of_one_process(tmp_path, kind):
    found = [
        train(Beside(kind=kind), pipelines(tmp_path, stages, f"run-{stages}", run__duration="4st"), workers=stages)
        for stages in (1, 2, 3)
    ]

    assert [one.failure for one in found] == [None, None, None]
    assert found[0].sha == found[1].sha == found[2].sha


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel__strategy": "hsdp", "scaling__workers_per_node": 2}, "--parallel.strategy is hsdp, which"),
        ({"parallel__compile": True}, "--parallel.compile is True, which --parallel.pipeline 2 does not go with"),
        (
            {"parallel__tensor": 4},
            "--scaling.max-workers is 4, too few for the stages of one pipeline; give at least 8",
        ),
        ({"parallel__pipeline": 5}, "--parallel.pipeline is 5, but --scaling.max-workers is 4, too few for the stages"),
    ],
)
def test_options_that_do_not_go_with_pipelines_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(ConfigError) as caught:
        pipelines(tmp_path, **options)
    assert message in str(caught.value)
