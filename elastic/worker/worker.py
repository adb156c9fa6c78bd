"""The parts of a worker that live longer than one world, from its warm-up to its end."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from elastic.config import TrainConfig
from elastic.data.loader import Loader
from elastic.job import Job, MapDataset
from elastic.membership.client import WorkerLink
from elastic.membership.protocol import Assignment, SavedAlone
from elastic.membership.stage import Position, Stage
from elastic.membership.world import Generation
from elastic.parallel.device import memory_share, stop_filling
from elastic.parallel.turns import learning
from elastic.run.plan import RunPlan
from elastic.storage import Storage
from elastic.worker.comeback import check_comes_back
from elastic.worker.placing import Placing
from elastic.worker.provenance import Provenance
from elastic.worker.rehearsal import SEPARATE, Rehearsal
from elastic.worker.restore_plan import Standing
from elastic.worker.run import WorkerRun
from elastic.worker.saving import Saving
from elastic.worker.snapshots import Snapshots
from elastic.worker.state import TrainState
from elastic.worker.step import Stepper, WorldSteps
from elastic.worker.unsaved import Watch
from elastic.worker.update import Update
from elastic.worker.user_code import UserCode

NO_WORLD = Generation(-1, -1)


@dataclass(frozen=True)
class InHand:
    """An update that is to be applied; `steps` prepared it in the world of `assignment`."""

    update: Update
    steps: WorldSteps
    assignment: Assignment


@dataclass
class Holding:
    """The training state of a worker, and what the worker knows about it.

    Args:
        state: None before it is made; a sharded model's is made in the first world.
        applied: number of updates in the state; -1 if it is not the state of a step.
        in_hand: the next update, which is prepared.
        row: of the state's step, if it is known.
        agreed_in: the newest world whose members agreed on this state, or on an earlier one from which this worker
            went on in that world.
        generation: the newest world of this worker.
        began_at: number of updates in the state with which this world began.
        lost: why the worker has no state, until it gets another one.
        touched: the state of a whole model differs from what the job made.
        open: an evaluation that belongs to the state's step may not have been done.
        evaluated: the step of the last evaluation, and its metrics.
        checked: it was checked that the state can be read back as it was saved.
        savable: False while the state may be one that cannot be saved.
    """

    state: TrainState | None = None
    applied: int = -1
    in_hand: InHand | None = None
    row: dict[str, Any] | None = None
    agreed_in: Generation = NO_WORLD
    generation: Generation = NO_WORLD
    began_at: int = -1
    lost: str | None = None
    touched: bool = False
    open: bool = False
    evaluated: tuple[int, dict[str, float]] = (-1, {})
    checked: bool = False
    savable: bool = True

    @property
    def placed(self) -> TrainState:
        """The state.

        Raises:
            RuntimeError: there is none.
        """
        if self.state is None:
            raise RuntimeError("this worker holds no state")
        return self.state

    @property
    def ready(self) -> InHand | None:
        """The update in hand, if it is the next one of this state."""
        return self.in_hand if self.in_hand is not None and self.in_hand.update.step == self.applied else None

    @property
    def standing(self) -> Standing:
        """What this worker brings into a new world."""
        world = self.agreed_in
        return Standing(self.applied, int(self.ready is not None), world.epoch, world.n)

    def let_go(self, why: str | None) -> None:
        """Drop the state, which is of no use any more, and free its memory; `why` goes to the ledger."""
        self.state, self.applied, self.lost = None, -1, why


@dataclass
class Worker:
    """All parts of a worker, made by `warm_up.warm_up`."""

    run: WorkerRun
    device: torch.device
    link: WorkerLink
    code: UserCode
    storage: Storage
    placing: Placing
    loader: Loader
    eval_sets: dict[str, MapDataset]
    stepper: Stepper
    saving: Saving
    snapshots: Snapshots
    rehearsal: Rehearsal
    provenance: Provenance
    watch: Watch
    holding: Holding
    warm_s: float = 0.0
    warm_parts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    newcomer: bool = False  # other workers hold the state that this one is to get

    @property
    def job(self) -> Job:
        return self.run.job

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @property
    def plan(self) -> RunPlan:
        return self.run.plan

    @property
    def bitwise(self) -> bool:
        return self.config.run.exactness == "bitwise"

    @property
    def fenced(self) -> bool:
        """Whether no worker holds all of the state: then every step has a fence, or a part of it could be lost with the
        only one that came to it."""
        return self.config.parallel.sharded

    def rehearse(self, group: Any) -> None:
        """Try the job's functions on one batch; if the model is sharded, together with the members of a world."""
        known = self.rehearsal.separate is not None
        passes, step = itertools.count(1), self.holding.applied - 1
        if group is not None:  # each pass has the patience of an evaluation's
            self.code.on_call = lambda: self.link.progress(Position(step, Stage.EVALUATE, next(passes)))
        try:
            state = self.holding.placed
            self.rehearsal.run(state.model, self.stepper.tried, group, partial(learning, state.optimizer))
        finally:
            self.code.on_call = lambda: None
        self.stepper.one_each |= bool(self.rehearsal.separate)
        self.stepper.written |= self.rehearsal.written
        if group is not None and group.leads and self.rehearsal.separate and not known:
            detail = f"passes are of one microbatch each: {SEPARATE[self.rehearsal.separate]}"
            self.link.event("notice", self.holding.applied, detail)
        unseeded = self.rehearsal.unseeded
        tell = self.provenance.lose if self.bitwise else self.provenance.remark
        new = bool(unseeded) and tell(unseeded)
        if new and group is not None and group.leads:  # without a world the first one says it when it begins
            self.link.event("exactness_lost" if self.bitwise else "notice", self.holding.applied, unseeded)
        stop_filling()

    def with_memory(self, old: TrainState) -> TrainState:
        """Return the same state in a model that is built with memory."""
        old.hold_extra()
        tensors, values = old.tensors(), old.values()
        state: TrainState = self.code.guard(self.placing.whole)
        state.load(tensors, values)
        return state

    def apply(self, hand: InHand) -> None:
        """Apply an update that passed the fence, or that a new world decided to apply.

        Raises:
            FencedError: the run may go on without this worker.
            UserCodeError: the optimizer or the job raised an exception.
            ConfigError: part of the state could not be read back after a save.
        """
        holding, update = self.holding, hand.update
        self.link.check_lease()
        self.watch.passed()
        holding.applied = -1  # from here to the end of the update the state is neither the old nor the new one
        with self.watch.updating():
            hand.steps.apply(update)
        holding.applied, holding.in_hand = update.step + 1, None
        self.stepper.progress(update.step, Stage.APPLIED)
        self._check_state(update)

    def _check_state(self, update: Update) -> None:
        """After the first updates of a process, and some later ones: refuse state that cannot be read back, or that is
        not saved."""
        holding, state = self.holding, self.holding.placed
        state.rates.adopt_changes(holding.applied)
        savable, holding.savable = holding.savable, False
        state.check_parts()
        holding.savable = savable and holding.checked and not self.watch.early
        self.watch.applied(holding.applied, skipped=update.skip)
        if not holding.checked:
            check_comes_back(state)
        holding.savable = True
        holding.checked = self.stepper.steps_done >= self.plan.cycle.steps_each  # each optimizer has its state

    def roll_forward(self, hand: InHand, posted_in: Generation | None = None) -> None:
        """Apply an update outside of its world. Its row is kept here too: other members with that row may be lost."""
        self.saving.settle()
        self.snapshots.settle()
        self.apply(hand)
        clock = self.stepper.clock
        seconds = clock.columns(clock.data_s + clock.compute_s + clock.sync_s)
        self.record({**self.row(hand), **seconds}, report=False, generation=posted_in)

    def record(self, row: dict[str, Any], *, report: bool, generation: Generation | None = None) -> None:
        """Keep the row of the newest step; see `WorkerLink.record`."""
        self.holding.row = row
        self.link.record(row, report=report, generation=generation)

    def row(self, hand: InHand) -> dict[str, Any]:
        """The row of a step for the ledger, without its times."""
        plan, update = self.plan, hand.update
        record, done = update.record, update.step + 1
        samples = plan.samples(done)
        device_memory = memory_share(self.device)
        self.link.show_device_memory(device_memory)
        return {
            "step": done,
            **({"phase": plan.cycle.phase(update.step)} if plan.phases else {}),
            "time": time.time(),
            "loss": record.loss,
            "lr": update.lr,
            "grad_norm": update.norm,
            "world_size": hand.assignment.size,
            "generation": str(hand.assignment.generation),
            "samples": samples,
            "tokens": samples * plan.tokens_per_sample if plan.tokens_per_sample else None,
            "device_memory": device_memory,
            "first_position": samples - plan.global_size,
            "count": plan.global_size,
            "sample_hash": record.sample_hash,
            **record.mean_metrics(),
            **({"skipped": True} if update.skip else {}),
        }

    def evaluation_is_due(self, step: int) -> bool:
        """Whether the state of this step is to be evaluated; not asked at the end of the run."""
        every = self.plan.eval_every
        return every is not None and 0 < step < self.plan.total_steps and step % every == 0

    def save_alone(self) -> None:
        """Commit the newest state without a world, since no group exists: the run is given up, or lets its workers go.

        A prepared update is applied first: no worker holds a newer one, and a lost member may have passed the fence, so
        that the row of this update is in the ledger.
        """
        holding, link = self.holding, self.link
        if holding.ready is not None:
            self.roll_forward(holding.ready, holding.generation)
        self.stepper.undo()
        link.report_rows(holding.generation)
        part = holding.placed.part
        if part.axes:
            detail = f"this worker holds {part} only"
            link.event("checkpoint_failed", holding.applied, detail, generation=holding.generation)
        else:
            saves = self.saving.alone(holding.placed, holding.generation)
            saves.commit_alone(holding.applied)
        link.post(SavedAlone(), holding.generation)

    def close(self) -> None:
        """End the threads and processes that run beside training."""
        self.saving.close()
        self.snapshots.close()
        self.loader.close()
        self.link.close()
