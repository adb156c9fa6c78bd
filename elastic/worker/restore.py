"""Bringing all members of a new world to one state, as `restore_plan` decides."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from elastic.parallel.layout import Held
from elastic.worker.group import Group
from elastic.worker.remesh import remesh
from elastic.worker.restore_plan import Plan, Standing, decide
from elastic.worker.state import TrainState
from elastic.worker.state_sources import initialise, restore_from_peers, restore_newest
from elastic.worker.worker import Worker


@dataclass(frozen=True)
class Restored:
    """The state that a world begins with.

    Args:
        step: updates in it.
        goes_on: a member held it in memory: nothing is done again.
        moved: some member has a state that it did not hold before.
    """

    step: int
    goes_on: bool
    moved: bool


def restore(worker: Worker, group: Group) -> Restored:
    """The newest state that any member holds, else a checkpoint, else a fresh start. All members call this together.

    Raises:
        WorldBroken: a member was lost meanwhile.
        CheckpointError: no committed checkpoint can be loaded.
        ConfigError: the newest checkpoint was trained on other data.
        UserCodeError: the job raised while a model was built or an update was applied.
    """
    holding, link = worker.holding, worker.link
    plan = _settle_update(worker, group)
    worker.newcomer = plan.is_newcomer(group.rank)
    if plan.outdated:
        holding.applied = -1
        holding.lost = f"workers hold step {max(plan.held)}, the newest checkpoint is of step " + str(
            group.assignment.restore.newest
        )
    if worker.config.parallel.sharded:
        step, goes_on, source = _remesh(worker, group)
    else:
        step, goes_on, source = _restore_whole(worker, group, plan)
    holding.began_at = step
    if not goes_on:  # steps after this one are done again
        link.undone(step)
        holding.evaluated = (-1, {})
    if group.leads or group.rank == source:  # who holds the newest state has its rows; who leads may be new
        link.report_rows()
    # an evaluation that a break interrupted is done again, by everyone or by nobody
    said = [*holding.evaluated, holding.open, worker.provenance.broken]
    evaluated, found, holding.open, broken = group.send_json(said, source)
    holding.evaluated = (evaluated, found)
    for kind, text in worker.provenance.agree(broken):
        if group.leads:
            link.event(kind, step, text)
    return Restored(step, goes_on, plan.moves)


def _settle_update(worker: Worker, group: Group) -> Plan:
    """Decide with everyone what becomes of the states, and apply or undo the update that a broken world had in hand."""
    holding = worker.holding
    rows = group.gather_rows(list(astuple(holding.standing)))
    plan = decide([Standing(*row) for row in rows], group.assignment.restore.newest)
    if holding.ready is not None and plan.applies[group.rank]:
        worker.roll_forward(holding.ready)
    worker.stepper.undo()
    holding.in_hand = None
    return plan


def _restore_whole(worker: Worker, group: Group, plan: Plan) -> tuple[int, bool, int]:
    """Returns the step, whether somebody held it, and the rank of one that did."""
    holding, config = worker.holding, worker.config
    if holding.applied < 0 and holding.touched:  # an update broke off in the job's code: no step's state
        holding.state = None
        holding.state = worker.code.guard(worker.placing.whole)
    state, goes_on = holding.placed, plan.newest >= 0
    holding.open = goes_on
    if not goes_on and group.rank == plan.source:
        found = restore_newest(state, worker.storage, worker.link, convert=config.checkpoint.convert)
        holding.applied, holding.open = (found.step, not found.metrics) if found else (0, False)
        if found is not None:
            worker.provenance.goes_on_from(found)
        else:
            initialise(state, config.checkpoint, worker.link)
    held = group.gather_ints(holding.applied)
    if min(held) != max(held):
        holding.applied = restore_from_peers(state, group, held, worker.link)
    holding.touched = True
    return holding.applied, goes_on, plan.source


def _remesh(worker: Worker, group: Group) -> tuple[int, bool, int]:
    """The same processes, a new mesh: cut the model anew and bring its state there.

    Returns:
        the step, whether its state was in memory, and the rank of one that had it.
    """
    holding, mesh, shard, shards = worker.holding, group.mesh, 0, 1
    if holding.state is not None and holding.state.mesh is not None:
        shard, shards = holding.state.mesh.shard, holding.state.mesh.layout.shards
        holding.state.hold_extra()
    held = Held(holding.applied if holding.state else -1, shard, shards)

    def make(fill: bool) -> TrainState:
        state: TrainState = worker.code.guard(lambda: worker.placing.sharded(mesh, fill=fill))
        return state

    found = remesh(
        holding.state,
        held,
        group,
        make,
        worker.config.checkpoint,
        worker.storage,
        worker.link,
        worker.snapshots,
        holding.lost,
        holding.let_go,
    )
    holding.state, holding.applied = found.state, found.step if found.state else -1
    holding.open, holding.lost = found.open, None
    if found.manifest is not None:
        worker.provenance.goes_on_from(found.manifest)
    goes_on = found.rung == "memory"
    if not goes_on:
        worker.snapshots.undone(found.step)
    return found.step, goes_on, found.source
