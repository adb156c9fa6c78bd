"""One world of a member: all that lives exactly as long as it."""

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
from elastic.worker.evaluate import evaluate
from elastic.worker.flags import Flags, Stop
from elastic.worker.group import Group
from elastic.worker.rehearsal import SEPARATE
from elastic.worker.restore import Restored
from elastic.worker.sampling import sample
from elastic.worker.state import TrainState
from elastic.worker.update import Update
from elastic.worker.worker import InHand, Worker

LAST_COMMIT_S = 60.0  # for a save that is under way when an error ends the run
HOLD_POLL_S = 0.01
LOOK_AGAIN = 16  # updates; a batch is tried again after so many, and twice, four, eight times as many
EARLY_CHECK = 2  # updates of a command after which copies are compared first: drift mostly begins with training


class SavingWorld:
    """A formed and restored world, as far as it takes to save its state. `close` it when it is over.

    Args:
        place: of this worker in the world's mesh.
        begin: the state that the world begins with.
    """

    def __init__(self, worker: Worker, group: Group, place: int, begin: Restored):
        self.worker, self.group, self.assignment, self.begin = worker, group, group.assignment, begin
        self.state: TrainState = worker.holding.placed
        #: Of the newest checkpoint when this world began: one that is newer than its state could not be loaded.
        self.saved_step = min(self.assignment.restore.newest, begin.step)
        self.saves = worker.saving.enter(group, place, self.state)

    def close(self) -> None:
        """Give up what is of this world alone."""
        self.saves.leave()

    @property
    def step(self) -> int:
        """Updates in the state."""
        return self.worker.holding.applied

    def check_state(self) -> None:
        """Compare the copies of the state with all members.

        Raises:
            CopiesDiffer: they are not equal.
        """
        self.worker.stepper.check_state(self.step, self.group, self.state)

    def make_safe(self) -> None:
        """Before the world is left: of a single sharded copy, a worker that is let go takes its part along."""
        if self.group.layout.shards > 1 and self.group.layout.replicas == 1:
            self.worker.stepper.progress(self.step - 1, Stage.CHECKPOINT)
            self.check_state()
            with contextlib.suppress(CheckpointError):  # which is in the ledger; then the one before has to do
                self.saves.make_safe(self.step, LAST_COMMIT_S)

    def save_newest(self, *, compare: bool = True) -> None:
        """An error ends the run: make the newest state safe, together with all members, if it is not yet.

        Args:
            compare: the copies first. Where updates differ, so do the rates that were set for them.
        """
        if self.step > max(self.saved_step, 0):
            self.worker.stepper.progress(self.step - 1, Stage.CHECKPOINT)
            with contextlib.suppress(ElasticError, RunOver):  # the error that ends the run is the one to be told
                if compare:
                    self.check_state()
                self.saves.make_safe(self.step, LAST_COMMIT_S)


class World(SavingWorld):
    """A world in which this worker trains: its model is wrapped, its microbatches are dealt."""

    def __init__(self, worker: Worker, group: Group, place: int, begin: Restored):
        """Wrap the model and deal the microbatches, together with all members.

        Raises:
            WorldBroken: a member was lost meanwhile.
            CopiesDiffer: the members' copies of the state, or what they train of it, are not equal.
            UserCodeError: the job raised when a cut model was tried.
        """
        super().__init__(worker, group, place, begin)
        #: Where this claim began: lower than was thought where that checkpoint could not be loaded.
        self.claim_step = min(self.assignment.claim_step, begin.step)
        self.before: dict[str, Any] = {}  # what came before the next step, for its row
        self._told: set[tuple[str, int]] = set()  # what was decided after which step
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
        """Whether this part of the run is done: its last update was applied when this world began."""
        return is_paused(self.worker, self.begin, self.claim_step)

    # ---- a step ------------------------------------------------------------------------------------------------

    def take_step(self) -> Flags:
        """One step of training; returns what all members agreed on with it."""
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
        self.saves.row_posted(self.step)  # only now, so that no committed step is missing in the ledger
        return agreed

    def _agree_at_fence(self, update: Update, said: Flags | None = None) -> Flags:
        """Wait until all members have all that they need for the update in hand."""
        steps, clock, began = self.steps, self.worker.stepper.clock, time.perf_counter()
        self.worker.stepper.progress(update.step, Stage.FENCE)
        agreed = self.group.agree(said or self._flags(steps.says(update)))
        clock.sync_s += time.perf_counter() - began
        steps.check_equal(update, agreed.update)
        return agreed

    def _said_with_record(self) -> list[int]:
        return self._flags(self.steps.says_of_last()).pack()

    def _agree_with_record(self, update: Update) -> Flags:
        """What the record of the step has of all members. Nobody waits for the others' updates: who lacks one, since
        somebody was lost, takes the state of those who have it. Only a world that ends with this step is left together.
        """
        agreed = Flags.unpack(update.record.said)
        self.steps.check_last(agreed.update)
        if not agreed.stop and not agreed.leave:
            return agreed
        return self._agree_at_fence(update, replace(agreed, update=self.steps.says(update)))

    def _flags(self, update: tuple[int, int]) -> Flags:
        """What this member says in a step, and of an update."""
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
        """What belongs after an update: evaluation, checkpoint, comparison."""
        plan, step = self.worker.plan, self.step
        if not self.is_trained and not agreed.stop and not agreed.leave:  # else those do it who go on from here
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
        """Whether the loss of a batch of now is the sum of those of its parts, as that of the first ones was."""
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
        """What belongs after the state's step, and was broken off there: evaluation and checkpoint."""
        if self.worker.evaluation_is_due(self.step):
            self.evaluate_and_decide()
        every = self.worker.plan.checkpoint_every
        if every is None or self.step <= 0 or self.is_trained or self.step % every:
            return
        if self.saved_step != self.step:
            self.save(busy=False)
            self.saves.row_posted(self.step)  # reported when the world began

    def evaluate(self) -> dict[str, float]:
        """The metrics of the state, found together with all members; once a step."""
        worker, holding, step = self.worker, self.worker.holding, self.step
        if holding.evaluated[0] == step:
            return holding.evaluated[1]
        worker.stepper.progress(step - 1, Stage.EVALUATE)
        worker.code.doing(f"the evaluation after step {step}", step - 1)
        fault.point("eval.begin", self.group.rank, step)
        began = time.monotonic()
        found: dict[str, float] = {}
        passes = itertools.count(1)
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
        holding.evaluated = (step, found)
        if found:
            row: dict[str, Any] = {"step": step, "time": time.time(), "generation": str(self.assignment.generation)}
            row["eval_s"] = round(time.monotonic() - began, 6)
            worker.link.record({**row, **found}, report=self.group.leads)
        return found

    def evaluate_and_decide(self) -> dict[str, float]:
        """Evaluate the state, and decide by that on the learning rate and on the end of training: on all members alike,
        from the figures of all. What was decided for this step before a break is decided again."""
        found, state = self.evaluate(), self.state
        deciding = {"rate_reduced": state.rates.plateau, "stops_early": state.patience}
        metric = self.worker.config.checkpoint.best_metric
        for kind, one in deciding.items():
            if one is None:
                continue
            if metric not in found:
                raise ConfigError(
                    f"--checkpoint.best-metric is {metric!r}, which no evaluation has, but the rate or the end "
                    f"goes by it; give one of {', '.join(found) or 'none, as there is no eval_data()'}"
                )
            said = one.decide(self.step, found[metric])
            if said and self.group.leads and (kind, self.step) not in self._told:
                self._told.add((kind, self.step))
                self.worker.link.event(kind, self.step, f"{metric} {found[metric]:g}: {said}")
        return found

    @property
    def stops_early(self) -> bool:
        """Whether training ends here, as evaluations have become no better."""
        return self.state.patience is not None and self.state.patience.over

    def sample(self) -> None:
        """Have the job make its sample, on all members: who leads tells of it, and the others would wait anyway."""
        self.worker.stepper.progress(self.step - 1, Stage.EVALUATE)
        with self.steps.unmoved():
            sample(self.worker, self.state.model, self.step, leads=self.group.leads)
        self.steps.reshard()

    def save(self, *, busy: bool) -> None:
        """Begin a checkpoint of the state; `busy` if the members agreed that one of them still saves."""
        began, worker = time.perf_counter(), self.worker
        worker.stepper.progress(self.step - 1, Stage.CHECKPOINT)
        worker.link.granted("save")
        self.check_state()
        self.saves.save(self.step, busy=busy)
        worker.stepper.clock.checkpoint_s += time.perf_counter() - began

    def hold(self) -> Flags:
        """Keep the state in memory until the driver lets the run go on; returns what all members agreed on."""
        began = time.monotonic()
        agreed = hold(self.worker, self.group, self.step, self._save_held)
        self.before["held_s"] = round(time.monotonic() - began, 6)
        return agreed

    def _save_held(self) -> None:
        self.save(busy=False)
        self.saves.row_posted(self.step)  # reported before, or when the world began

    # ---- on the way out ----------------------------------------------------------------------------------------

    def drop_update(self) -> None:
        """The update in hand is not applied: the state is as if its step had not begun."""
        self.worker.holding.in_hand = None
        self.steps.reshard()
        self.worker.stepper.undo()


def is_paused(worker: Worker, begin: Restored, claim_step: int) -> bool:
    """Whether a world begins where `--run.stop-after` ends this part of the run."""
    most = worker.plan.stop_after_steps
    return worker.holding.open and most is not None and begin.step - claim_step >= most


def hold(worker: Worker, group: Group, step: int, save: Any) -> Flags:
    """Wait at `step`, with the state in memory, until the run may go on or is to stop or to leave.

    Args:
        save: called when a checkpoint was wished for meanwhile.
    """
    link = worker.link
    if group.leads:
        link.report_rows()  # somebody decides by them
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
