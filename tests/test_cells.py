"""Models that are cut over the workers of cells: the same bits at every number of cells, through kills and changes."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from elastic import cli
from elastic.checkpoint.tensors import tensor_bytes
from elastic.errors import ConfigError
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import prepare
from tests.cell_jobs import InCells
from tests.forked import WAIT_S, B, Ran, Watch, configure, fault, local_run, plan, train
from tests.slowly import slow
from tests.test_bits import assert_same_training

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def cells(storage: object, strategy: str = "ddp", name: str = "run", **options: object):
    """A configuration with cells of two workers."""
    return configure(storage, name, **{"parallel__strategy": strategy, "parallel__tensor": 2, **options})


@pytest.fixture(scope="module")
def one_cell(fork_server, tmp_path_factory):
    """The undisturbed run of one cell."""
    ran = train(InCells(), cells(tmp_path_factory.mktemp("cell"), eval__every="3st"), workers=2)
    assert ran.failure is None
    return ran


@pytest.mark.parametrize(
    ("strategy", "workers"), [("fsdp", 4), *slow(("ddp", 4), ("ddp", 6), ("fsdp", 2), ("fsdp", 6), ("hsdp", 4))]
)
def test_every_number_of_cells_trains_the_same_bits(one_cell, tmp_path, strategy, workers):
    more = {"scaling__workers_per_node": 2} if strategy == "hsdp" else {}
    found = train(InCells(), cells(tmp_path, strategy, eval__every="3st", **more), workers)

    assert found.failure is None
    assert_same_training(found, one_cell)
    assert found.evaluations == one_cell.evaluations


@pytest.mark.long
def test_activations_cut_along_the_sequence_train_the_same_bits(tmp_path):
    one = train(InCells(plan="sequence"), cells(tmp_path, "ddp", "one"), workers=2)
    two = train(InCells(plan="sequence"), cells(tmp_path, "fsdp", "two"), workers=4)

    assert_same_training(two, one)


def test_a_cell_computes_what_one_worker_computes(tmp_path):
    """But for rounding: sums have other orders. Without dropout, whose masks are drawn by part."""
    options = {"run__duration": "3st", "optim__clip_norm": 0.3}
    whole = train(InCells(dropout=0.0), configure(tmp_path, "whole", **options), workers=1)
    for kind in ("tensor", "sequence"):
        found = train(InCells(dropout=0.0, plan=kind), cells(tmp_path, "ddp", kind, **options), workers=2)

        assert found.column("sample_hash") == whole.column("sample_hash")
        assert found.column("loss") == pytest.approx(whole.column("loss"), rel=1e-4)
        assert found.column("grad_norm") == pytest.approx(whole.column("grad_norm"), rel=1e-3)
        assert found.sha != whole.sha, "nothing was cut"
        assert max(whole.column("grad_norm")) > 0.3


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_fast_trains_nearly_the_same_at_every_number_of_cells(tmp_path, strategy):
    options = {"run__exactness": "fast", "run__duration": "6st", "batch__pass_size": 3}  # BatchNorm goes by the pass
    one = train(InCells(dropout=0.0), cells(tmp_path, "ddp", "one", **options), workers=2)
    found = train(InCells(dropout=0.0), cells(tmp_path, strategy, **options), workers=4)

    assert found.failure is None
    assert found.column("sample_hash") == one.column("sample_hash")
    assert found.column("loss") == pytest.approx(one.column("loss"), rel=1e-4)
    assert found.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-3)


# ---- losses and joins ------------------------------------------------------------------------------------------

#: Kills of a run of three cells with a whole model each: point, step, and rank in the world of that moment. After each
#: there are whole cells left, and one worker fewer or more stands by.
KILLS = {
    "passes": [("step.forward", 2, 1), ("step.reduce", 5, 3), ("step.before_fence", 8, 0)],
    "fences": [("world.connected", None, 2), ("step.after_fence", 3, 3), ("checkpoint.staged", 4, 1)],
    "saving": [("world.assigned", None, 5), ("eval.begin", 3, 0), ("checkpoint.before_stage", 8, 2)],
}


@pytest.mark.parametrize("kills", [KILLS["passes"], *slow(KILLS["fences"], KILLS["saving"])])
def test_copies_in_other_cells_supply_the_state_and_no_step_is_lost(one_cell, tmp_path, kills):
    config = cells(tmp_path, "ddp", eval__every="3st", checkpoint__every="4st")
    marks = [tmp_path / f"killed-{number}" for number in range(len(kills))]
    faults = [fault(*kill, only=mark) for kill, mark in zip(kills, marks)]

    ran = train(InCells(), config, workers=6, faults=faults)

    assert all(mark.exists() for mark in marks)
    assert ran.failure is None
    assert ran.sha == one_cell.sha
    assert ran.column("loss") == one_cell.column("loss")
    assert ran.evaluations == one_cell.evaluations
    assert gaps_and_doubles(ran.rows, B) == []
    assert len([row for row in ran.rows if "sample_hash" in row]) == 12, "a step was done twice"
    assert ran.events("restored") == [e for e in ran.events("restored") if e["detail"]["rung"] in ("peer", "fresh")]


def test_a_lost_part_of_the_one_copy_comes_from_the_newest_checkpoint_and_mates_stand_by(one_cell, tmp_path):
    config = cells(tmp_path, "fsdp", eval__every="3st", checkpoint__every="4st", checkpoint__when_busy="wait")

    ran = train(InCells(), config, workers=4, faults=[fault("step.forward", 7, 3, only=tmp_path / "killed")])

    assert ran.failure is None
    assert ran.sha == one_cell.sha
    assert ran.column("loss") == one_cell.column("loss")
    (restored,) = ran.events("restored")
    assert restored["detail"]["rung"] == "checkpoint"
    assert restored["detail"]["reason"] == "of the state of step 6, shard 1 of 2 x tensor 1 of 2 was lost"
    assert [e["detail"]["size"] for e in ran.events("world_formed")] == [4, 3], "the mate stands by"


@pytest.mark.long
def test_a_lost_part_of_the_one_copy_comes_from_a_snapshot_of_parts_of_parts(one_cell, tmp_path):
    more = {"recovery__snapshot_every": "1st", "scaling__workers_per_node": 2, "eval__every": "3st"}

    ran = train(
        InCells(), cells(tmp_path, "fsdp", **more), 4, faults=[fault("step.forward", 7, 3, only=tmp_path / "k")]
    )

    assert ran.failure is None
    assert ran.sha == one_cell.sha
    (restored,) = ran.events("restored")
    assert restored["detail"]["rung"] == "snapshot"
    assert 1 <= restored["step"] <= 6


def test_a_worker_that_comes_makes_a_cell_with_the_mate_that_stands_by(one_cell, tmp_path, gate):
    held = gate("held")
    config = cells(tmp_path, "ddp", eval__every="3st", scaling__max_workers=4)
    run, watch = prepare(InCells(), config), Watch()
    faults = plan(fault("step.forward", 3, 3, only=tmp_path / "killed"), fault("step.forward", 6, 0, "hold", file=held))
    with local_run(run, 4, on_record=watch, environment=faults) as local:
        watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["detail"]["size"] == 3)
        watch.wait_for_step(4)
        local.add_worker()
        watch.wait_for(lambda r: r.get("kind") == "worker_warm" and r["member"] == "w1-4")
        held.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert found.sha == one_cell.sha
    assert found.column("loss") == one_cell.column("loss")
    assert len([row for row in found.rows if "sample_hash" in row]) == 12
    assert found.column("world_size")[0] == found.column("world_size")[-1] == 4


def test_a_worker_may_have_another_place_in_a_cell_of_the_same_ranks(one_cell, tmp_path):
    """It takes the place of the one that was lost, and a spare takes its own."""
    config = cells(tmp_path, "ddp", eval__every="3st", checkpoint__every="4st", scaling__max_workers=2)
    run = prepare(InCells(), config)
    in_workers = plan(fault("step.forward", 6, 0, only=tmp_path / "killed"))
    with local_run(run, 3, environment=in_workers) as local:
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert [e["detail"]["size"] for e in found.events("world_formed")] == [2, 2]
    assert found.sha == one_cell.sha
    assert found.column("grad_norm") == one_cell.column("grad_norm")


# ---- other layouts -------------------------------------------------------------------------------------------------


def test_a_run_that_changes_its_strategy_and_its_cells_at_every_pause_ends_with_the_same_bits(one_cell, tmp_path):
    for strategy, workers, stop in (("ddp", 4, "3st"), ("fsdp", 4, "3st"), ("fsdp", 2, None)):
        found = train(InCells(), cells(tmp_path, strategy, eval__every="3st", run__stop_after=stop), workers)
        assert found.failure is None

    assert found.sha == one_cell.sha
    assert found.column("loss") == one_cell.column("loss")
    assert [e["step"] for e in found.events("restored") if e["detail"]["rung"] == "checkpoint"] == [3, 6]


def test_checkpoints_hold_whole_tensors_and_go_to_and_from_runs_without_cells(tmp_path):
    options = {"run__duration": "2st", "checkpoint__every": "2st"}
    whole = train(InCells(dropout=0.0), configure(tmp_path, "whole", **options), workers=1)
    found = train(InCells(dropout=0.0), cells(tmp_path, "fsdp", **options), workers=4)
    one, other = found.state(), whole.state()

    assert one.keys() == other.keys()
    assert one["values"] == other["values"]
    heads = {name: one[name][:2] for name in one if name not in ("step", "values")}
    assert heads == {name: other[name][:2] for name in heads}
    allowed = {"run__duration": "4st", "run__allow_change": ("parallel.tensor", "run.duration")}
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        train(InCells(dropout=0.0), configure(tmp_path, "run", run__duration="2st"), workers=2)
    for strategy, tensor, workers in (("ddp", 1, 2), ("fsdp", 2, 2)):
        more = {**allowed, "run__duration": f"{4 if tensor == 1 else 6}st", "parallel__tensor": tensor}
        again = train(InCells(dropout=0.0), cells(tmp_path, strategy, **more), workers)
        assert again.failure is None
    reference = train(InCells(dropout=0.0), configure(tmp_path, "other", run__duration="6st"), workers=1)
    assert again.column("loss") == pytest.approx(reference.column("loss"), rel=1e-3)


@pytest.mark.long
def test_weights_of_a_run_in_cells_are_exported_whole(tmp_path):
    found = train(InCells(), cells(tmp_path, "fsdp", run__duration="2st", checkpoint__every="2st"), workers=4)

    assert cli.main(["checkpoints", "export", f"{tmp_path}/run", f"{tmp_path}/w.safetensors"]) == 0
    exported = {name: bytes(tensor_bytes(tensor)) for name, tensor in load_file(tmp_path / "w.safetensors").items()}
    state = found.state()
    assert exported["layers.0.up.weight"] == state["model/layers.0.up.weight"][2]
    assert {f"model/{name}" for name in exported} <= state.keys()
    assert all(state[f"model/{name}"][2] == data for name, data in exported.items())


@pytest.mark.long
def test_four_workers_are_one_cell(tmp_path):
    options = {"run__duration": "3st", "optim__clip_norm": 0.3}
    whole = train(InCells(dropout=0.0), configure(tmp_path, "whole", **options), workers=1)
    four = train(InCells(dropout=0.0), cells(tmp_path, "ddp", "four", parallel__tensor=4, **options), workers=4)
    again = train(InCells(dropout=0.0), cells(tmp_path, "fsdp", "again", parallel__tensor=4, **options), workers=4)

    assert four.failure is None
    assert four.sha == again.sha != whole.sha
    assert four.column("loss") == pytest.approx(whole.column("loss"), rel=1e-4)


# ---- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "options", "message"),
    slow(
        (
            InCells(plan="none"),
            {},
            "--parallel.tensor is 2, but tensor_plan() names no module; return patterns of module names with what is "
            'done to them, such as {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}, or leave --parallel.tensor '
            "out",
        ),
        (
            InCells(plan="misnamed"),
            {},
            "tensor_plan() has 'layers.*.out', but no module of the model is called so; name its modules, such as "
            "head, layers.0.up, layers.0.down",
        ),
        (
            InCells(),
            {"parallel__tensor": 3, "scaling__max_workers": 3},
            "--parallel.tensor is 3, which does not divide the 16 of dimension 0 of embed.weight (its shape is "
            "(16, 12)); give a number that does, or leave that module out of tensor_plan()",
        ),
        (
            InCells(plan="untied"),
            {},
            "embed.weight and head.weight are one parameter, but tensor_plan() cuts them otherwise; cut both along the "
            'same dimension (an embedding "rowwise" and a head "colwise_gather_output"), or leave both out',
        ),
        (
            InCells(plan="late"),
            {},
            'layers.0.norm takes its input cut along the sequence, as "sequence" in tensor_plan() has it, but no '
            'module cuts it before; let the plan begin with the embedding ("rowwise")',
        ),
    )
    + [
        (InCells(plan="loose"), {}, "layers.0.gain differs on"),
        (
            InCells(plan="heads"),
            {},
            "a view or reshape in the model does not fit what --parallel.tensor 2 leaves of a layer's outputs on each "
            "worker (",
        ),
    ],
    ids=["none", "misnamed", "divides", "untied", "late", "loose", "heads"],
)
def test_a_plan_that_does_not_fit_is_refused_by_name(tmp_path, job, options, message):
    found = train(job, cells(tmp_path, **options), workers=options.get("parallel__tensor", 2))

    assert found.failure is not None
    assert message in found.failure
    if job.plan != "loose":  # which shows after an update
        assert found.history == []
