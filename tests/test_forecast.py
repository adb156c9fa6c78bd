"""What snapshots will take of a node's memory, said before anything is started."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.parallel.layout import SHARD, lay_out
from elastic.placement import Part
from elastic.run import forecast
from elastic.run.forecast import StateSize, Unknown, measure, snapshot_bytes
from elastic.run.prepare import prepare, report
from elastic.snapshot.partners import GENERATIONS
from tests.cell_jobs import InCells
from tests.forked import configure
from tests.tiny_jobs import Deep, Everything, Plain

SNAPSHOTS = {"parallel__strategy": "fsdp", "recovery__snapshot_every": "4st", "scaling__workers_per_node": 1}


class Reading(Plain):
    """A job whose model looks at values while it is built."""

    def model(self):
        model = super().model()
        if float(model[0].weight.sum()) > 1e9:
            raise AssertionError
        return model


def config(strategy: str, per_node: int | None, most: int) -> TrainConfig:
    return configure(
        "nowhere", "run", parallel__strategy=strategy, scaling__workers_per_node=per_node, scaling__max_workers=most
    )


@pytest.mark.parametrize("job", [Plain(), Everything(), Everything(rule="sgd"), Deep()], ids=str)
def test_the_size_of_a_state_is_known_without_building_it(job):
    model = job.model()
    optimizer = job.optimizer(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    whole = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    kept = [v for state in optimizer.state.values() for v in state.values()]
    extra = [v for v in job.extra_state().values() if isinstance(v, torch.Tensor)]
    wanted = sum(t.nbytes for t in (*whole.values(), *kept, *extra) if isinstance(t, torch.Tensor))
    steps = sum(t.nbytes for t in kept if isinstance(t, torch.Tensor) and not t.dim())

    before = dict(vars(job))
    assert measure(job, 0).of(Part()) == wanted - steps
    assert vars(job) == before, "building it leaves no trace in the job"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 8)), max_size=5), st.integers(0, 99), st.integers(1, 6))
def test_parts_are_the_rows_that_workers_will_hold(cut, whole, shards):
    size = StateSize(tuple(((rows, 2), item) for rows, item in cut), whole)

    parts = [size.of(part) for part in Part.of([(SHARD, 0, shards)]).siblings]

    assert sum(parts) == shards * whole + sum(rows * 2 * item for rows, item in cut)
    assert parts[0] == whole + sum(-(-rows // shards) * 2 * item for rows, item in cut)


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(["fsdp", "hsdp"]))
def test_a_node_needs_room_where_a_lost_one_would_take_the_only_copy_along(workers, each, strategy):
    size = StateSize((((workers * 60,), 4),), 0)

    found = snapshot_bytes(size, config(strategy, each, 36 * each), workers)

    nodes = -(-workers // each)
    copies = strategy == "hsdp" and workers // each > 1
    assert (found == {}) == copies
    if not copies:
        state = size.of(Part())
        second = GENERATIONS if nodes > 1 else 0
        assert sum(found.values()) == (GENERATIONS + second) * state
        assert len(found) == nodes


def test_a_dry_run_states_it_for_every_number_of_workers(tmp_path):
    run = prepare(Plain(), configure(tmp_path, "run", **SNAPSHOTS, scaling__max_workers=3))

    shown = report(run).splitlines()

    head = next(i for i, line in enumerate(shown) if line.startswith("snapshots"))
    assert shown[head].startswith("snapshots, in MiB of the memory of a node with 1 worker: two generations")
    size = measure(Plain(), 0)
    rows = [line.split() for line in shown[head + 1 :]]
    assert rows == [[str(w), f"{max(snapshot_bytes(size, run.config, w).values()) / 2**20:,.1f}"] for w in (1, 2, 3)]


def test_a_dry_run_says_where_none_are_needed_and_nothing_where_none_are_asked_for(tmp_path):
    hsdp = {**SNAPSHOTS, "parallel__strategy": "hsdp", "scaling__workers_per_node": 2, "scaling__max_workers": 4}

    shown = report(prepare(Plain(), configure(tmp_path, "run", **hsdp))).splitlines()

    assert shown[-1].split() == ["4", "none", "needed"]
    assert shown[-5].startswith("snapshots, in MiB of the memory of a node with 2 workers")
    assert "snapshots, in MiB" not in report(prepare(Plain(), configure(tmp_path, "run")))


def test_of_a_model_that_cannot_be_built_without_memory_workers_know_the_size(tmp_path):
    with pytest.raises(Unknown):
        measure(Reading(), 0)

    run = prepare(Reading(), configure(tmp_path, "run", **SNAPSHOTS))

    assert "known when workers have built the model (" in report(run)
    forecast.refuse_what_does_not_fit_here(run)


def test_what_can_never_fit_on_this_machine_is_refused_before_anything_is_started(tmp_path, monkeypatch):
    run = prepare(Plain(width=700), configure(tmp_path, "run", **SNAPSHOTS, scaling__max_workers=3))
    need = sum(snapshot_bytes(measure(Plain(width=700), 0), run.config, 3).values())

    monkeypatch.setattr(forecast, "available_bytes", lambda: need)
    forecast.refuse_what_does_not_fit_here(run)
    monkeypatch.setattr(forecast, "available_bytes", lambda: need - 1)
    with pytest.raises(ConfigError) as refused:
        forecast.refuse_what_does_not_fit_here(run)
    forecast.refuse_what_does_not_fit_here(replace(run, plan=replace(run.plan, snapshot_every=None)))

    text = str(refused.value)
    assert text.startswith(f"--recovery.snapshot-every is '4st', but snapshots take {need / 2**20:,.1f} MiB of this")
    assert "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_part_in_a_cell_is_a_part_of_what_its_plan_cuts():
    whole, size = measure(InCells(), 0), measure(InCells(), 0, 2)
    parts = lay_out(["a", "a"], "ddp", None, 2).copies
    ups = 2 * (12 * 48 + 48 + 48 * 12) + 12 * 16 + 12 * 48  # of both blocks, of the embedding, and of the average

    assert size.of(Part()) == whole.of(Part())
    assert len({size.of(part) for part in parts}) == 1
    saved = whole.of(Part()) - size.of(next(iter(parts)))
    assert saved == pytest.approx(3 * 4 * (ups - 12 * 48) / 2, rel=0.01), "values and both moments; not the average"
