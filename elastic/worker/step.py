"""One training step of one worker: prepare an update together with all workers, then apply it alone.

A prepared update is complete: applying it needs no other worker. A step that is not applied leaves no trace: its
gradients are dropped and its buffers are put back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import xxhash

from elastic import fault
from elastic.data.loader import Loader
from elastic.errors import ConfigError, Reform
from elastic.membership.client import WorkerLink
from elastic.membership.protocol import LedgerEvent
from elastic.membership.stage import OF_A_STEP, Position, Stage
from elastic.parallel.device import describe, host_wait
from elastic.parallel.leaf import GradientTooLate
from elastic.parallel.matrices import Matrices
from elastic.parallel.records import StepRecord
from elastic.parallel.replicated import BitwiseReplica, FastReplica, NotReduced, Pass
from elastic.parallel.row_updates import update as update_parameters
from elastic.parallel.scaling import multiply
from elastic.parallel.turns import Turns
from elastic.seeds import derive, seed_all
from elastic.worker import copies, nonfinite
from elastic.worker.attributes import JobAttributes
from elastic.worker.flags import NEUTRAL
from elastic.worker.group import Group
from elastic.worker.replicas import Replica, wrap
from elastic.worker.run import WorkerRun
from elastic.worker.schedule import factor
from elastic.worker.share import Share, Span, longest_pass, spans_of
from elastic.worker.state import TrainState
from elastic.worker.traces import counting_writes, watching_for_writes
from elastic.worker.unsaved import UPDATES
from elastic.worker.update import Clock, Update
from elastic.worker.user_code import UserCode

#: Updates after which what was tried before the first step is tried again; also after twice, four, ... times as many.
LOOK_AGAIN = 16


class Stepper:
    """What a worker keeps for its steps across worlds. `enter` a world to take steps in it."""

    def __init__(self, run: WorkerRun, code: UserCode, loader: Loader, link: WorkerLink, attributes: JobAttributes):
        self.run, self.code, self.loader, self.link, self.attributes = run, code, loader, link, attributes
        self.bitwise = run.config.run.exactness == "bitwise"
        #: Each pass has one microbatch. What a pass draws at random for its whole batch would otherwise depend on the
        #: world.
        self.one_each = self.bitwise or loader.draws_together()
        self.steps_done = 0
        self.find_unused = run.config.parallel.find_unused
        self.exchanges_early = True  # in bitwise: in the last backward pass of a step
        self.written: set[str] = set()  # names of parameters that passes may write to; see `Rehearsal.written`
        self.compares = True  # whether the devices of all workers in the newest world round alike
        self.clock = Clock()
        self.unfinished: Replica | None = None  # the replica of a step that is not applied yet

    @property
    def fresh(self) -> bool:
        """Whether this process has applied no update yet."""
        return not self.steps_done

    def enter(self, group: Group, place: int, applied: int, state: TrainState) -> WorldSteps:
        """Begin a world.

        Args:
            place: this worker's place in the world's mesh.
            applied: the number of updates in the state.

        Raises:
            WorldBroken: a member was lost meanwhile.
            CopiesDiffer: the members do not train the same parameters.
        """
        return WorldSteps(self, group, place, applied, state)

    def undo(self) -> None:
        """Put back the buffers that an unfinished step changed; nothing happens if the last step was applied."""
        if self.unfinished is not None:
            self.unfinished.undo_buffers()
            self.unfinished = None

    def progress(self, step: int, stage: Stage, count: int = 0) -> None:
        """Report the position of this worker. The first step of a process may take long: it builds and compiles."""
        self.link.progress(Position(step, stage, count, first=stage in OF_A_STEP and not self.steps_done))

    def check_state(self, step: int, group: Group, state: TrainState) -> None:
        """Compare the copies of the state over all workers, unless their devices round differently.

        Raises:
            CopiesDiffer: they are not equal.
        """
        if self.compares:
            copies.check_state(state, group, self.link.member.id, step, exact=self.bitwise)

    def spans_of(self, run: range) -> list[Span]:
        """Cut a run of microbatches into passes."""
        return spans_of(run, self.run.plan, self.run.config, one_each=self.one_each)

    @property
    def joins(self) -> bool:
        """Whether a pass may have several microbatches."""
        return longest_pass(self.run.plan, self.run.config, one_each=self.one_each) > 1

    @property
    def tried(self) -> int:
        """The number of microbatches in the smallest batch that has two samples and that a pass may have; else 1."""
        plan = self.run.plan
        longest = longest_pass(plan, self.run.config, one_each=self.one_each)
        return 1 if plan.global_size > plan.microbatches else min(2, longest)


class WorldSteps:
    """The steps of one world: its microbatches are dealt and its model is wrapped. Made by `Stepper.enter`."""

    def __init__(self, stepper: Stepper, group: Group, place: int, applied: int, state: TrainState):
        self._stepper, self._group, self._state = stepper, group, state
        self._config, self._plan = stepper.run.config, stepper.run.plan
        self._code, self._loader, self._link = stepper.code, stepper.loader, stepper.link
        self._trained = state.trained()
        self._agree(group)
        self._one_each = stepper.one_each
        exact = stepper.bitwise
        self.share = Share.of(self._plan, self._config, group.layout, place, bitwise=exact, one_each=self._one_each)
        self._loader.start(applied, self.share.spans)
        self._step = self._pass = 0
        self._last: Update | None = None  # the update that was applied last in this world
        self._code.on_loss = self._after_loss
        self._matrices = Matrices(state.optimizer, state.mesh)
        with group.collective("wrapping the model"):
            make = partial(
                wrap,
                state.model,
                stepper.run.job,
                self._code,
                self._config,
                group,
                self.share,
                find_unused=stepper.find_unused,
                early=stepper.exchanges_early,
                at_pass=self._at_pass,
                written=stepper.written,
                check_every=self._plan.check_every,
            )
            self._turns = Turns(self._plan.cycle, state.optimizer, make, shared=self._config.parallel.sharded)

    def _agree(self, group: Group) -> None:
        """Agree with all members on what must be alike: one microbatch per pass, unused parameters, comparable devices.

        Raises:
            CopiesDiffer: the members do not train the same parameters.
        """
        device = xxhash.xxh3_64_intdigest(json.dumps(describe(group.device), sort_keys=True).encode()) >> 1
        trained = xxhash.xxh3_64_intdigest(bytes(self._trained)) >> 1
        stepper = self._stepper
        kept = [int(stepper.find_unused), device, trained, int(stepper.one_each), int(stepper.exchanges_early)]
        rows = group.gather_rows_in_mesh(kept)
        stepper.find_unused = any(row[0] for row in rows)
        stepper.one_each = any(row[3] for row in rows)
        stepper.exchanges_early = all(row[4] for row in rows)
        stepper.compares = len({row[1] for row in rows}) == 1  # other kernels round differently
        if not stepper.compares and group.leads:
            detail = "its workers' devices differ, so that the copies of the model may differ in last bits"
            self._link.post(LedgerEvent("copies_not_compared", detail=detail))
        if len({row[2] for row in rows}) > 1:
            raise copies.trained_error(group, self._link.member.id, self._state.trained_by_name())

    def close(self) -> None:
        """Drop what holds the world's process group."""
        for replica in self._turns.all.values():
            replica.close()

    def reshard(self) -> None:
        """Free the parameters that forward passes outside of a step (evaluation, sample) left gathered."""
        self._turns.first.reshard()

    def unmoved(self) -> AbstractContextManager[None]:
        """A context for forward passes between steps: buffers have their old values when it is left."""
        return self._turns.first.unmoved()

    # ---- steps -------------------------------------------------------------------------------------------------

    def prepare(self, step: int, says: Callable[[], Sequence[int]] = tuple) -> Update:
        """Run the forward and backward passes, reduce the gradients, scale and clip them.

        Args:
            step: the number of updates applied so far.
            says: returns what this worker says with the step's record, where the model is whole (ddp). It is called as
                late as possible, so that the answer is fresh.

        Raises:
            WorldBroken: a member was lost.
            Reform: the world must be formed again for this step.
            UserCodeError: the job's code raised.
            NonFiniteError: loss or norm is not finite, and the run does not skip such steps.
        """
        clock, stepper = Clock(), self._stepper
        if self._state.trained() != self._trained:
            change = copies.change_of_trained(self._state.trained_by_name(), self._trained)
            raise Reform(f"the job trains other parameters from step {step + 1} on ({change})")
        if stepper.one_each and not self._one_each:
            raise Reform(f"passes have one microbatch each from step {step + 1} on")
        stepper.clock, self._step, cycle = clock, step, self._plan.cycle
        self._code.phase = cycle.phase(step)
        self._code.watches_gradients = stepper.steps_done < UPDATES * cycle.steps_each
        stepper.attributes.between_steps()
        began = time.perf_counter()
        scaler, turn = self._state.scaler, step // cycle.steps_each + 1
        watching = watching_for_writes if turn >= LOOK_AGAIN and not turn & (turn - 1) else counting_writes
        try:
            with (
                self._turns.of(step) as replica,
                self._group.collective(f"step {step + 1}"),
                watching(self._state.model, stepper.written, self._code),
            ):
                stepper.unfinished = replica
                replica.scale = scaler.factor if scaler else 1.0
                if isinstance(replica, (FastReplica, BitwiseReplica)):
                    replica.says = says
                record, divisor = replica.run(self._passes(step))
            self._state.keep_buffers(replica.unsaved)
        except NotReduced as error:
            stepper.find_unused = True
            names = ", ".join(error.names[:3]) + (", ..." if len(error.names) > 3 else "")
            detail = f"not every pass gives a gradient to {names or 'all parameters'}: --parallel.find-unused is on now"
            self._link.event("unused_parameters", step, detail)
            raise Reform(detail) from error
        except GradientTooLate as error:
            stepper.exchanges_early = False
            raise Reform(f"gradients are exchanged after backward passes from step {step + 1} on: {error}") from error
        optim, plan = self._config.optim, self._plan
        gradients = replica.gradients()
        with self._group.collective("the norm"):
            norm = (float(replica.norm(gradients)) / divisor if divisor else float("nan")) if gradients else 0.0
            host_wait(self._group.device)  # also waits for the collectives that average buffers
        self._group.check()
        finite = abs(record.loss) < float("inf") and abs(norm) < float("inf")
        if finite:
            scale = 1.0 / divisor
            if optim.clip_norm is not None and norm > optim.clip_norm:
                scale *= optim.clip_norm / (norm + 1e-6)
            if scale != 1.0:
                multiply(gradients, scale)
            if self._matrices.any:
                with self._group.collective("gathering whole matrices"):
                    self._matrices.prepare()
                self._group.check()
        else:
            overflow = scaler is not None and scaler.factor > 1 and abs(record.loss) < float("inf")
            if not overflow:
                self._on_nonfinite(step, record, norm)
            replica.undo_buffers()
        share = self._code.guard(lambda: stepper.run.job.schedule(step, plan.total_steps))
        if share is not None and not isinstance(share, (int, float)):
            raise ConfigError(
                f"schedule() returned a {type(share).__name__}, but it is to return a factor on the learning rates, or "
                "None; return a scheduler of torch's from scheduler(optimizer)"
            )
        if share is None:
            share = factor(
                step, plan.total_steps, schedule=optim.schedule, warmup_steps=plan.warmup_steps, final=optim.final_lr
            )
        lr = self._state.rates.set(step, share, self._turns.optimizer(step))
        clock.sync_s = replica.wait_s
        clock.compute_s = time.perf_counter() - began - clock.data_s - clock.sync_s
        fingerprint = copies.update_fingerprint((record.loss, norm, divisor), self._state.optimizer)
        return Update(step, record, lr, norm, not finite, fingerprint)

    def says(self, update: Update | None) -> tuple[int, int]:
        """Return what this worker says about an update: its fingerprint, or a neutral value if there is none to
        compare."""
        return copies.for_all(update.fingerprint) if self._stepper.compares and update is not None else NEUTRAL

    def says_of_last(self) -> tuple[int, int]:
        """Return what this worker says about the update that it applied last in this world."""
        return self.says(self._last)

    def check_equal(self, update: Update, largest: tuple[int, int]) -> None:
        """Refuse, after the fence, an update that differs between workers.

        Args:
            largest: the largest value that any worker said, element by element.

        Raises:
            CopiesDiffer: the updates differ.
        """
        if not copies.equal(largest):
            names, part = self._state.parameter_names(), self._state.part
            entries = copies.update_entries(update.numbers, self._state.optimizer, names, part)
            raise copies.update_error(update.step + 1, self._group, self._link.member.id, entries)

    def check_last(self, largest: tuple[int, int]) -> None:
        """Refuse to go on from an update that differed between workers, as the record of the step after it shows.

        Args:
            largest: the largest value that any worker said, element by element.

        Raises:
            CopiesDiffer: the updates differed.
        """
        if self._last is not None and not copies.equal(largest):
            entries = copies.update_entries(self._last.numbers, self._state.optimizer)
            raise copies.applied_error(self._last.step + 1, self._group, self._link.member.id, entries)

    def apply(self, update: Update) -> None:
        """Apply an update. Until this returns, the state is neither the old nor the new one."""
        began = time.perf_counter()
        if self._state.scaler is not None:
            self._state.scaler.update(update.skip)
        if not update.skip:
            seed_all(derive("update", self._config.run.seed, update.step))
            self._code.doing(f"the update of step {update.step + 1}", update.step)
            self._code.guard(partial(self._optimize, self._turns.optimizer(update.step)))
            self._code.guard(lambda: self._stepper.run.job.after_step(self._state.model, update.step + 1))
            self._stepper.attributes.updated()
        self._stepper.unfinished, self._last = None, update
        self._stepper.steps_done += 1
        self._stepper.clock.compute_s += time.perf_counter() - began

    def _optimize(self, optimizer: torch.optim.Optimizer) -> None:
        with self._matrices.used():
            update_parameters(optimizer, cut=self._config.parallel.sharded)

    def _passes(self, step: int) -> Iterator[Pass]:
        progress, clock, attributes = self._stepper.progress, self._stepper.clock, self._stepper.attributes
        fetching = nullcontext if self._config.data.workers else attributes.fetching
        passes = [(span, False) for span in self.share.spans] + [(self.share.spans[-1], True)] * self.share.padding
        for i, ((first, count), padding) in enumerate(passes):
            began = time.perf_counter()
            self._pass = i
            self._code.at(step, first)
            progress(step, Stage.PASS, 2 * i)
            self._code.guard(partial(fault.point, "step.forward", self._group.rank, step + 1))
            if not padding:
                progress(step, Stage.DATA, 2 * i)
                with fetching():
                    span = self._code.guard(partial(self._loader.next, step, first, count), alone=True)
                progress(step, Stage.PASS, 2 * i)
            self._code.samples = span.ids
            clock.data_s += time.perf_counter() - began
            seed_all(derive("step", self._config.run.seed, step, first))
            yield Pass(span.batch, first, span.digests, i == len(passes) - 1, padding)
        attributes.passed()
        progress(step, Stage.REDUCE)
        fault.point("step.reduce", self._group.rank, step + 1)

    def _after_loss(self) -> None:
        self._stepper.progress(self._step, Stage.PASS, 2 * self._pass + 1)

    def _at_pass(self, microbatch: int) -> None:
        self._code.at(self._step, microbatch)
        self._stepper.progress(self._step, Stage.PASS, self._pass)
        self._code.guard(partial(fault.point, "step.stage", self._group.rank, self._step + 1))

    # ---- what is not finite ------------------------------------------------------------------------------------

    def _on_nonfinite(self, step: int, record: StepRecord, norm: float) -> None:
        if self._config.run.on_nonfinite == "skip":
            return
        microbatch, count = record.nonfinite_microbatch, 1
        if record.weight == 0:
            microbatch, count = 0, self._plan.microbatches
        elif microbatch is None:
            with self._group.collective(f"looking at step {step + 1} again"):
                bad = self._find_bad(step)
            found = [m for m in self._group.gather_in_mesh(bad) if m >= 0]
            microbatch = min(found, default=None)
        else:  # each pass has a loss of its own in the record
            spans = [span for run in self.share.runs for span in self._stepper.spans_of(run)]
            count = next(n for first, n in spans if first == microbatch)
        ids = [] if microbatch is None else self._loader.order.span(step, microbatch, count).ids.tolist()
        raise nonfinite.error(step, self._code.phase, record, norm, microbatch, ids)

    def _find_bad(self, step: int) -> int:
        indices = self.share.own

        def microbatches() -> Iterator[tuple[int, Any]]:
            self._loader.start(step, [(i, 1) for i in indices])
            for index in indices:
                batch = self._loader.next(step, index, 1).batch
                seed_all(derive("step", self._config.run.seed, step, index))
                yield index, batch

        with self._turns.of(step) as replica:
            return nonfinite.first_bad_microbatch(replica.has_finite_gradients, microbatches(), self.share.singles)
