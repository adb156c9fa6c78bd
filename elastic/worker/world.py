"""A world as one of its members sees it: everything that lives exactly as long as the world does."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import replace
from typing import Any

from elastic import fault
from elastic.errors import CheckpointError, ConfigError, ElasticError
from elastic.membership.client import RunOver
from elastic.membership.stage import Position, Stage
from elastic.worker.evaluate import Parameters, evaluate
from elastic.worker.flags import Flags, Stop
from elastic.worker.group import Group
from elastic.worker.rehearsal import SEPARATE
from elastic.worker.restore import Restored
from elastic.worker.sampling import sample
from elastic.worker.state import TrainState
from elastic.worker.step import LOOK_AGAIN
from elastic.worker.update import Update
from elastic.worker.worker import InHand, Worker

LAST_COMMIT_S = 60.0  # seconds for a save that is under way when an error ends the run
HOLD_POLL_S = 0.01
# Copies are compared first after so many updates of a command: if they drift apart, it mostly begins with training.
EARLY_CHECK = 2


class SavingWorld:
    """A formed and restored world, as far as saving its state needs it. `close` it when it is over.

    Args:
        place: this worker's place in the world's mesh.
        begin: the state with which the world begins.
    """

    def __init__(self, worker: Worker, group: Group, place: int, begin: Restored):
        self.worker, self.group, self.assignment, self.begin = worker, group, group.assignment, begin
        self.state: TrainState = worker.holding.placed
        #: The step of the newest checkpoint when this world began; a newer one than its state could not be loaded.
        self.saved_step = min(self.assignment.restore.newest, begin.step)
        self.saves = worker.saving.enter(group, place, self.state)

    def close(self) -> None:
        """Drop everything that belongs to this world alone."""
        self.saves.leave()

    @property
    def step(self) -> int:
        """The number of updates in the state."""
        return self.worker.holding.applied

    def check_state(self) -> None:
        """Compare the copies of the state over all members.

        Raises:
            CopiesDiffer: they are not equal.
        """
        self.worker.stepper.check_state(self.step, self.group, self.state)

    def make_safe(self) -> None:
        """Save before this world is left, if a leaving worker takes the only copy of its part of the state with it."""
        layout = self.group.layout
        if layout.size > 1 and layout.replicas == 1 and self.worker.config.parallel.sharded:
            self.worker.stepper.progress(self.step - 1, Stage.CHECKPOINT)
            self.check_state()
            with contextlib.suppress(CheckpointError):  # The ledger has the error; the checkpoint before must do then.
                self.saves.make_safe(self.step, LAST_COMMIT_S)

    def save_newest(self, *, compare: bool = True) -> None:
        """An error ends the run: save the newest state together with all members, unless it is saved already.

        Args:
            compare: compare the copies of the state first. After UpdatesDiffer they differ anyway: so do the rates that
                were set for the updates.
        """
        if self.step > max(self.saved_step, 0):
            self.worker.stepper.progress(self.step - 1, Stage.CHECKPOINT)
            with contextlib.suppress(ElasticError, RunOver):  # the error that ends the run is the one to report
                if compare:
                    self.check_state()
                self.saves.make_safe(self.step, LAST_COMMIT_S)


class World(SavingWorld):
    """A world in which this worker trains: its model is wrapped and its microbatches are dealt."""

    def __init__(self, worker: Worker, group: Group, place: int, begin: Restored):
        """Wrap the model and deal the microbatches, together with all members.

        Raises:
            WorldBroken: a member was lost meanwhile.
            CopiesDiffer: the members' states differ, or they train different parameters.
            UserCodeError: the job raised while its functions were tried on a sharded model.
        """
        super().__init__(worker, group, place, begin)
        #: The step at which this claim began; lower than the driver knew if that checkpoint could not be loaded.
        self.claim_step = min(self.assignment.claim_step, begin.step)
        self.before: dict[str, Any] = {}  # columns for the row of the next step: what happened before it
        self._told: set[tuple[str, int]] = set()  # (event, step) of decisions that are in the ledger already
        try:
            if worker.config.parallel.sharded:
                worker.stepper.progress(self.step - 1, Stage.EVALUATE)
                worker.rehearse(group)
            self.steps = worker.stepper.enter(group, place, self.step, self.state)
        except BaseException:
            self.saves.leave()
            raise

    def close(self) -> None:
        """Give up what is of this world alone."""
        try:
            self.steps.close()
        finally:
            super().close()

    @property
    def is_trained(self) -> bool:
        """Whether all steps of the run are done."""
        return self.step >= self.worker.plan.total_steps

    @property
    def is_paused(self) -> bool:
        """Whether this part of the run was already over when this world began (`--run.stop-after`)."""
        return is_paused(self.worker, self.begin, self.claim_step)

    # ---- a step ------------------------------------------------------------------------------------------------

    def take_step(self) -> Flags:
        """Take one training step, and return what all members agreed on with it."""
        began = time.perf_counter()
        worker, group, steps, step = self.worker, self.group, self.steps, self.step
        stepper, holding = worker.stepper, worker.holding
        worker.watch.begin(self.state)
        with worker.watch.reading():
            update = steps.prepare(step, tuple if worker.fenced else self._said_with_record)
            hand = holding.in_hand = InHand(update, steps, self.assignment)
        clock = stepper.clock
        fault.point("step.before_fence", group.rank, step + 1)
        agreed = self._agree_at_fence(update) if worker.fenced else self._agree_with_record(update)
        fault.point("step.after_fence", group.rank, step + 1)
        worker.snapshots.agreed(agreed.snapshot)
        clock.checkpoint_s += worker.saving.settle()
        clock.snapshot_s += worker.snapshots.settle()
        worker.apply(hand)
        row = {**worker.row(hand), **self.before, **worker.snapshots.columns()}
        self.before = {}
        try:
            self._follow_up(agreed)
            clock.snapshot_s += worker.snapshots.after(self.step, time.perf_counter() - began)
        finally:
            worker.record(row | clock.columns(time.perf_counter() - began), report=group.leads)
        self.saves.row_posted(self.step)  # only now, so that the ledger has the row of every committed step
        return agreed

    def _agree_at_fence(self, update: Update, said: Flags | None = None) -> Flags:
        """Wait until all members hold a prepared update, and return what they agreed on.

        Args:
            said: what this member says; by default its wishes and the fingerprint of the update.

        Raises:
            CopiesDiffer: the members' updates are not equal.
        """
        steps, clock, began = self.steps, self.worker.stepper.clock, time.perf_counter()
        self.worker.stepper.progress(update.step, Stage.FENCE)
        agreed = self.group.agree(said or self._flags(steps.says(update)))
        clock.sync_s += time.perf_counter() - began
        steps.check_equal(update, agreed.update)
        return agreed

    def _said_with_record(self) -> list[int]:
        return self._flags(self.steps.says_of_last()).pack()

    def _agree_with_record(self, update: Update) -> Flags:
        """Return what all members said with the record of this step, without waiting at a fence.

        Without a fence (ddp) a member may be lost while others apply this update and some cannot; those who lack it
        take the state of one that has it. Only a step after which the members leave together ends with a fence.
        """
        agreed = Flags.unpack(update.record.said)
        self.steps.check_last(agreed.update)
        if not agreed.stop and not agreed.leave:
            return agreed
        return self._agree_at_fence(update, replace(agreed, update=self.steps.says(update)))

    def _flags(self, update: tuple[int, int]) -> Flags:
        """Return what this member says in a step.

        Args:
            update: the fingerprint of an update, as `WorldSteps.says` returns it.
        """
        worker, plan, link = self.worker, self.worker.plan, self.worker.link
        steps_here = self.step + 1 - self.claim_step
        pause = plan.stop_after_steps is not None and steps_here >= plan.stop_after_steps
        pause |= plan.stop_after_s is not None and time.monotonic() - worker.started >= plan.stop_after_s
        return Flags(
            update,
            Stop.AT_ONCE if link.wish("stop") is not None else Stop.PAUSE if pause else Stop.NO,
            link.wish("save") is not None or self.saves.overdue,
            link.wish("leave") is not None,
            self.saves.busy,
            worker.snapshots.for_fence(),
        )

    def _follow_up(self, agreed: Flags) -> None:
        """Do what is due after an update: evaluation, sample, checkpoint, comparison of the copies."""
        plan, step = self.worker.plan, self.step
        # at a pause or in another world, those who go on from here do it
        if not self.is_trained and not agreed.stop and not agreed.leave:
            if self.worker.evaluation_is_due(step):
                self.evaluate_and_decide()
            if plan.sample_every and step % plan.sample_every == 0:
                self.sample()
            if agreed.save or (plan.checkpoint_every and step % plan.checkpoint_every == 0):
                self.save(busy=agreed.busy)
        if step >= LOOK_AGAIN and step & (step - 1) == 0 and self.worker.stepper.joins and not self.is_trained:
            self._look_again()
        early = step == self.claim_step + EARLY_CHECK
        if plan.check_every and (early or step % plan.check_every == 0):
            self.check_state()

    def _look_again(self) -> None:
        """Try loss() on a batch of now: it may no longer add up over microbatches, as it did on the first batches."""
        worker, stepper, step = self.worker, self.worker.stepper, self.step
        stepper.progress(step - 1, Stage.EVALUATE)
        if worker.rehearsal.look_again(self.state.model, stepper.tried, step, self.group):
            stepper.one_each = True
            if self.group.leads:
                worker.link.event(
                    "notice", step, f"passes are of one microbatch each from step {step + 1} on: {SEPARATE[1]}"
                )

    # ---- between steps -----------------------------------------------------------------------------------------

    def do_what_is_due(self) -> None:
        """Do the evaluation and the checkpoint that belong after the state's step, and that an interruption cut off."""
        if self.worker.evaluation_is_due(self.step):
            self.evaluate_and_decide()
        every = self.worker.plan.checkpoint_every
        if every is None or self.step <= 0 or self.is_trained or self.step % every:
            return
        if self.saved_step != self.step:
            self.save(busy=False)
            self.saves.row_posted(self.step)  # its row was reported when the world began

    def evaluate(self) -> dict[str, float]:
        """Evaluate the state together with all members, once per step, and return the figures by name."""
        worker, holding, step = self.worker, self.worker.holding, self.step
        if holding.evaluated[0] == step:
            return holding.evaluated[1]
        worker.stepper.progress(step - 1, Stage.EVALUATE)
        worker.code.doing(f"the evaluation after step {step}", step - 1)
        fault.point("eval.begin", self.group.rank, step)
        began = time.monotonic()
        found: dict[str, float] = {}
        passes = itertools.count(1)
        parameters = Parameters(self.state.model, exact=worker.bitwise)
        with self.steps.unmoved():
            for name, data in worker.eval_sets.items():
                found |= evaluate(
                    worker.job,
                    self.state.model,
                    name,
                    data,
                    self.group,
                    worker.code,
                    size=worker.plan.eval_size,
                    seed=worker.config.run.seed,
                    device=worker.device,
                    each=self.steps.unmoved if worker.bitwise else contextlib.nullcontext,
                    on_pass=lambda: worker.link.progress(Position(step - 1, Stage.EVALUATE, next(passes))),
                )
        self.steps.reshard()
        parameters.check()
        holding.evaluated = (step, found)
        if found:
            row: dict[str, Any] = {"step": step, "time": time.time(), "generation": str(self.assignment.generation)}
            row["eval_s"] = round(time.monotonic() - began, 6)
            worker.link.record({**row, **found}, report=self.group.leads)
        return found

    def evaluate_and_decide(self) -> dict[str, float]:
        """Evaluate the state, and decide by a figure on the learning rate and on the end of training.

        All members decide alike, since all have the same figures. After an interruption the same decision is made
        again.

        Raises:
            ConfigError: no evaluation has the figure that decides.
        """
        found, state = self.evaluate(), self.state
        deciding = {"rate_reduced": state.rates.plateau, "stops_early": state.patience}
        metric = self.worker.config.checkpoint.best_metric
        for kind, one in deciding.items():
            if one is None:
                continue
            if metric not in found:
                raise ConfigError(
                    f"--checkpoint.best-metric is {metric!r}, which no evaluation has, but the rate or the end "
                    f"depends on it; give one of {', '.join(found) or 'none, as there is no eval_data()'}"
                )
            said = one.decide(self.step, found[metric])
            if said and self.group.leads and (kind, self.step) not in self._told:
                self._told.add((kind, self.step))
                self.worker.link.event(kind, self.step, f"{metric} {found[metric]:g}: {said}")
        return found

    @property
    def stops_early(self) -> bool:
        """Whether training ends here, because evaluations have stopped getting better."""
        return self.state.patience is not None and self.state.patience.over

    def sample(self) -> None:
        """Have the job make its sample on all members, which would wait for it anyway; only the leader reports it."""
        self.worker.stepper.progress(self.step - 1, Stage.EVALUATE)
        with self.steps.unmoved():
            sample(self.worker, self.state.model, self.step, leads=self.group.leads)
        self.steps.reshard()

    def save(self, *, busy: bool) -> None:
        """Begin a checkpoint of the state.

        Args:
            busy: the members agreed that one of them is still saving.
        """
        began, worker = time.perf_counter(), self.worker
        worker.stepper.progress(self.step - 1, Stage.CHECKPOINT)
        worker.link.granted("save")
        self.check_state()
        self.saves.save(self.step, busy=busy)
        worker.stepper.clock.checkpoint_s += time.perf_counter() - began

    def hold(self) -> Flags:
        """Keep the state in memory until the driver lets the run go on, and return what all members agreed on."""
        began = time.monotonic()
        agreed = hold(self.worker, self.group, self.step, self._save_held)
        self.before["held_s"] = round(time.monotonic() - began, 6)
        return agreed

    def _save_held(self) -> None:
        self.save(busy=False)
        self.saves.row_posted(self.step)  # its row was reported before the hold, or when the world began

    # ---- on the way out ----------------------------------------------------------------------------------------

    def drop_update(self) -> None:
        """Do not apply the prepared update: put the state back to before its step."""
        self.worker.holding.in_hand = None
        self.steps.reshard()
        self.worker.stepper.undo()


def is_paused(worker: Worker, begin: Restored, claim_step: int) -> bool:
    """Whether a world begins at the step at which `--run.stop-after` ends this part of the run."""
    most = worker.plan.stop_after_steps
    return worker.holding.open and most is not None and begin.step - claim_step >= most


def hold(worker: Worker, group: Group, step: int, save: Any) -> Flags:
    """Wait at `step`, with the state in memory, until the run may go on, or is to stop or to leave this world.

    Args:
        save: called when somebody asked for a checkpoint meanwhile.

    Returns:
        What all members agreed on.
    """
    link = worker.link
    if group.leads:
        link.report_rows()  # the driver decides by these rows whether the run goes on
    while True:
        worker.stepper.progress(step - 1, Stage.HELD)
        wishes = [link.wish(name) is not None for name in ("stop", "save", "leave")]
        while link.allowed <= step and not any(wishes):
            link.check()
            time.sleep(HOLD_POLL_S)
            wishes = [link.wish(name) is not None for name in ("stop", "save", "leave")]
        stop, wanted, leave = wishes
        agreed = group.agree(Flags(stop=Stop.AT_ONCE if stop else Stop.NO, save=wanted, leave=leave))
        if agreed.stop or agreed.leave or not agreed.save:
            return agreed
        save()
