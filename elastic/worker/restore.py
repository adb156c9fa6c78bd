"""Brings all members of a new world to one state, as `restore_plan` decides."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from typing import Any

import torch

from elastic import fault
from elastic.checkpoint.patience import in_one_sentence
from elastic.errors import CheckpointError
from elastic.parallel.layout import Held, holders, lost_parts
from elastic.parallel.wrapping import local
from elastic.placement import Part, TensorSpec
from elastic.worker import ladder
from elastic.worker.exchange import exchange
from elastic.worker.group import Group
from elastic.worker.restore_plan import Plan, Standing, decide
from elastic.worker.state import TrainState
from elastic.worker.worker import Worker


@dataclass(frozen=True)
class Restored:
    """The state with which a world begins.

    Args:
        step: the number of updates in it.
        goes_on: a member held it in memory, so no step is done again.
        moved: some member has a state that it did not hold before.
    """

    step: int
    goes_on: bool
    moved: bool


def restore(worker: Worker, group: Group) -> Restored:
    """Restore the newest state that a member holds, else a snapshot or checkpoint, else begin fresh.

    All members call this at one time.

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
    elif plan.held[group.rank] < 0:  # also if its newest step was made again by another world
        holding.applied = -1
    step, goes_on, source = _bring(worker, group)
    holding.began_at, holding.agreed_in = step, group.assignment.generation
    # all or none do an evaluation again that was interrupted: one that has the figures gives them to all
    said = [*holding.evaluated, holding.open, worker.provenance.broken, holding.row]
    evaluated, found, holding.open, broken, row = group.send_json(said, source)
    holding.evaluated = (evaluated, found)
    if goes_on and row is not None and row["step"] == step != plan.held[group.rank]:
        worker.record(row, report=False)  # the worker that held this state may be lost before its row is in the ledger
    if group.leads or group.rank == source:  # the source has the rows of the newest state; the leader may be new
        link.report_rows()
    for kind, text in worker.provenance.agree(broken):
        if group.leads:
            link.event(kind, step, text)
    return Restored(step, goes_on, plan.moves)


def _settle_update(worker: Worker, group: Group) -> Plan:
    """Decide together what becomes of the members' states; apply or undo the update that this worker had prepared."""
    holding = worker.holding
    rows = group.gather_rows(list(astuple(holding.standing)))
    plan = decide([Standing(*row) for row in rows], group.assignment.restore.newest, fenced=worker.fenced)
    if holding.ready is not None and plan.applies[group.rank]:
        worker.roll_forward(holding.ready)
    worker.stepper.undo()
    holding.in_hand = None
    return plan


def _bring(worker: Worker, group: Group) -> tuple[int, bool, int]:
    """Restore the newest state: from members' memory if they hold all of it, else down the ladder.

    Members that lack their part of the state receive it from others. A sharded model is made anew by every member, for
    the new mesh; the old parts stay in memory until all members have their new ones.

    Returns:
        The step, whether its state was in memory, and the rank of a member that had it.
    """
    began, holding, layout, cut = time.monotonic(), worker.holding, group.layout, worker.config.parallel.sharded
    if not cut and holding.applied < 0 and holding.touched:  # it holds half an update, or half of a received state
        holding.state = None
        holding.state = worker.code.guard(worker.placing.whole)
        holding.touched = False

    def make(fill: bool) -> TrainState:
        if not cut:
            return holding.placed
        state: TrainState = worker.code.guard(lambda: worker.placing.sharded(group.mesh, fill=fill))
        return state

    part = holding.state.part if holding.state is not None else Part()
    if cut and holding.state is not None:
        holding.state.hold_extra()
    rows = group.gather_json([holding.applied if holding.state is not None else -1, part.axes, holding.lost])
    held = [Held(step, Part.of(axes)) for step, axes, _ in rows]
    found, step = holders(held), max(h.step for h in held)
    rung, holding.open = "memory", found is not None
    if found is None:
        step, rung = _descend(worker, group, make, lost_parts(held) or next((lost for *_, lost in rows if lost), None))
        found = {part: [layout.ranks[places[0]]] for part, places in layout.copies.items()}
    rebuilt = cut and rung == "memory"
    new = {rank: layout.part(place) for place, rank in enumerate(layout.ranks)}
    wants = {rank: part for rank, part in new.items() if rebuilt or rank not in found[part]}
    source = next(iter(found.values()))[0]
    if wants:
        _take(worker, group, make, step, found, wants, source, rebuilt=rebuilt)
        if group.rank in wants and held[group.rank].step != step and rung != "fresh":
            ladder.post_restored(worker.link, step, began, {"rung": "peer", "source": source})
    if group.place is None:
        holding.state, holding.applied = None, -1
    holding.lost, holding.touched = None, True
    return step, rung == "memory", source


def _descend(worker: Worker, group: Group, make: ladder.Make, lost: str | None) -> tuple[int, str]:
    """Restore down the ladder, and record that later steps are undone. Returns the step and the rung.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded.
        StorageError: storage cannot be read.
    """
    holding, snapshots = worker.holding, worker.snapshots
    if worker.config.parallel.sharded:
        holding.let_go(lost)
    holding.touched = True
    options, storage, link = worker.config.checkpoint, worker.storage, worker.link
    with in_one_sentence(storage, "read"):
        found = ladder.descend(group, make, options, storage, link, snapshots, lost)
    if found.state is not None:
        holding.state, holding.applied, holding.open = found.state, found.step, found.open
    if found.manifest is not None:
        worker.provenance.goes_on_from(found.manifest)
    link.undone(found.step)
    snapshots.undone(found.step)
    holding.evaluated = (-1, {})
    return found.step, found.rung


def _take(
    worker: Worker,
    group: Group,
    make: ladder.Make,
    step: int,
    found: dict[Part, list[int]],
    wants: dict[int, Part],
    source: int,
    *,
    rebuilt: bool,
) -> None:
    """Give the members that lack it their part of the state of `step`. All members call this, spares too.

    Args:
        found: the ranks that hold each part.
        wants: the part that each rank is to receive, by rank.
        source: the rank that sends everything beside tensors.
        rebuilt: keep the old states until all members have their new ones.
    """
    holding, rank = worker.holding, group.rank
    old = holding.placed if any(rank in ranks for ranks in found.values()) else None
    said = {"values": old.values(), "tensors": [s.to_json() for s in old.specs()]} if old and rank == source else None
    said = group.send_json(said, source)
    specs = [TensorSpec.of(raw) for raw in said["tensors"]]
    state = make(False) if rank in wants else None
    fault.point("state.moving", rank, step)
    here = {name: local(tensor) for name, tensor in old.tensors().items()} if old is not None else {}
    into: dict[str, torch.Tensor] = {}
    if state is not None and (rebuilt or holding.applied < 0):  # else its older state stays until it has all of the new
        into = _places(state, specs, said["values"])
        holding.touched |= not rebuilt
    tensors = exchange(group, specs, here, found, wants, into)
    if state is not None:
        if not rebuilt:
            holding.applied, holding.touched = -1, True
        state.load(tensors, said["values"], specs)
    if rebuilt:
        group.gather_ints(step)  # a barrier: no member drops its old state before all have their new one
    if state is not None:
        holding.state, holding.applied = state, step


def _places(state: TrainState, specs: list[TensorSpec], values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state by the names in `specs`, for receiving in them. None if the state has other names:
    loading refuses it then, when the other members wait for this one no more."""
    try:
        shards = state.destinations({spec.name: spec for spec in specs}, values)
    except CheckpointError:
        return {}
    return {shard.name: shard.tensor.detach() for shard in shards}
