"""One worker from its first join to the end of the run. Runs without Ray.

warm up -> join -> connect -> restore -> step, step, ... -> done
            ^                                   |
            +--- broken, left, or an error -----+
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import traceback
from dataclasses import astuple, replace
from typing import Any

import torch

from elastic import fault
from elastic.checkpoint.uploader import STILL_S
from elastic.config import result_options
from elastic.data.identity import identify
from elastic.data.loader import Fetcher, Loader, Order
from elastic.errors import (
    CheckpointError,
    ConfigError,
    CopiesDiffer,
    ElasticError,
    FencedError,
    NonFiniteError,
    Reform,
    RunFailed,
    UpdatesDiffer,
    WarmUpError,
    WorldBroken,
)
from elastic.job import eval_sets, job_options
from elastic.likeness import digest_of
from elastic.membership.client import RunOver, WorkerLink
from elastic.membership.messages import Failure
from elastic.membership.protocol import Assignment, Done, Failed, SavedAlone
from elastic.membership.stage import Position, Stage
from elastic.membership.world import Generation, Member
from elastic.observe.streams import keep_output_sturdy
from elastic.parallel.device import describe, memory_share, pick_device, prepare_process
from elastic.parallel.layout import Held
from elastic.parallel.wrapping import call_gathered, move
from elastic.seeds import derive, seed_all
from elastic.storage import Storage
from elastic.units import parse_amount
from elastic.worker.belongings import models_of
from elastic.worker.comeback import check_comes_back
from elastic.worker.copies import NEUTRAL
from elastic.worker.description import (
    comparable,
    describe_held,
    describe_model,
    describe_optimizer,
    describe_options,
    describe_worker,
)
from elastic.worker.evaluate import evaluate
from elastic.worker.group import Group
from elastic.worker.placing import Placing
from elastic.worker.provenance import Provenance
from elastic.worker.rehearsal import Rehearsal
from elastic.worker.remesh import remesh
from elastic.worker.run import Identity, WorkerRun
from elastic.worker.saving import Saving, initialise, restore_from_peers, restore_newest
from elastic.worker.snapshots import Snapshots
from elastic.worker.sockets import use_interface_of
from elastic.worker.state import TrainState, weights_sha256
from elastic.worker.step import Stepper, Update
from elastic.worker.unsaved import Watch
from elastic.worker.updates import Standing, applies
from elastic.worker.user_code import UserCode, UserCodeError

LAST_COMMIT_S = 60.0  # for a save that is under way when an error ends the run
HOLD_POLL_S = 0.01
PAUSE, AT_ONCE = 1, 2  # how a world stops: where --run.stop-after said so, or because somebody asked: saving first
FINAL = (ConfigError, CheckpointError, CopiesDiffer, NonFiniteError)  # they would be so for any worker
COLLECTIVE_TIMEOUT_S = 1800.0  # the last resort: the membership server notices a hang long before


class Session:
    """Trains until the run is finished or paused, in one world after another."""

    def __init__(self, run: WorkerRun, identity: Identity, *, import_s: float = 0.0):
        """Warm up: device, data and model are ready when this returns. `import_s` is only reported.

        Raises:
            WarmUpError: they cannot be; the membership server knows.
        """
        began = time.monotonic()
        self._run, self._job, self._config, self._plan = run, run.job, run.config, run.plan
        self._bitwise = run.config.run.exactness == "bitwise"
        prepare_process(bitwise=self._bitwise, threads=run.config.scaling.cpus_per_worker)
        use_interface_of(identity.host)
        self._device = pick_device(identity.accelerator, identity.local_index)
        self._storage = Storage(run.folder_url)
        self._code = UserCode(run.job, self._device, identity.id, autocast=run.config.precision.autocast)
        member = Member(
            identity.id,
            identity.node,
            identity.local_index,
            os.getpid(),
            identity.host,
            json.dumps(describe(self._device), sort_keys=True),
        )
        lease_s = parse_amount("lease", run.config.recovery.lease, clock=True).seconds
        self._link = WorkerLink(run.server_url, run.token, member, lease_s=lease_s)
        self._snapshots = Snapshots(run.plan.snapshot_every, identity.vault, run.token, self._link, self._device)
        self._state: TrainState | None = None  # what a sharded model's worker has is made in its first world
        self._applied = -1  # updates in the state this worker holds; -1: it holds none
        self._took = False  # somebody has a state in this world that it did not hold before
        self._touched = False  # a whole model's state is not as the job made it
        self._world_step = -1  # updates in the state that this world began with
        self._lost: str | None = None  # why it holds none any more, until there is a new one
        self._prepared: Update | None = None
        self._left: Generation | None = None
        self._forming: dict[str, float] = {}  # seconds it took to form this world; goes into its first row
        self._stepped_in: Assignment | None = None  # the world of the newest step that was begun
        self._goes_on = False  # the state was held in memory
        self._newcomer = False  # others hold the state that this worker is to get
        self._open = False  # what belongs after the state's step, an evaluation, may not have been done
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._started = time.monotonic()
        self._checked = False  # what it holds comes back
        self._savable = True  # as far as is known
        try:
            parts = self._warm_up()
        except Exception as error:
            known = isinstance(error, ElasticError)
            text = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
            message = f"worker {identity.id} could not get ready:{' ' if known else chr(10)}{text}"
            self._link.unfit(message)
            self._link.close()
            raise WarmUpError(message) from error
        self._link.tell_place(lambda: (self._code.where, self._loader.waits_for()))
        self._warm_s = round(time.monotonic() - began + import_s, 3)
        self._warm_parts = {"import_s": round(import_s, 3), **parts}

    def _warm_up(self) -> dict[str, Any]:
        job, plan, seed = self._job, self._plan, self._config.run.seed
        began = time.monotonic()
        held = models_of(job)
        for model in held.values():
            move(model, self._device)
        lines = {"configuration": describe_options(self._options), "models of the job": describe_held(held)}
        seed_all(derive("data", seed))  # a split at random is the same on every worker, and that of what is held out
        data = job.train_data()
        self._check_length(len(data))
        seed_all(derive("data", seed))
        self._eval_sets = eval_sets(job)
        described = self._describe_data(data, digest_of(lines["models of the job"]))
        self._watch = Watch([data, *self._eval_sets.values()], self._warn_of_unsaved)
        data_s = time.monotonic() - began
        self._placing = Placing(job, self._config, self._device)
        self._placing.warm_up()
        lines["model"] = describe_model(self._placing.model)
        if not self._config.parallel.sharded:
            self._state = self._placing.whole()
            lines["optimizer"] = describe_optimizer(self._state.optimizer)
        order = Order(
            seed=seed, dataset_size=plan.dataset_size, global_size=plan.global_size, microbatches=plan.microbatches
        )
        self._loader = Loader(
            Fetcher(data, job.collate_fn, seed, plan.dataset_size),
            order,
            workers=self._config.data.workers,
            prefetch=self._config.data.prefetch,
            total_steps=plan.total_steps,
            on_restart=self._tell_restart,
            begin=keep_output_sturdy,
        )
        self._stepper = Stepper(self._run, self._code, self._loader, self._link)
        lines["loader"] = [f"passes of {'one microbatch' if self._stepper.one_each else 'any number of microbatches'}"]
        self._saving = Saving(
            self._state,
            self._storage,
            self._link,
            self._device,
            seed=seed,
            config_digest=self._run.digest,
            when_busy=self._config.checkpoint.when_busy,
            on_wait=lambda n: self._link.progress(Position(self._applied - 1, Stage.CHECKPOINT, n)),
            made=self._provenance.header,
            still_s=self._still_s(),
        )
        parts: dict[str, Any] = {"data_s": round(data_s, 3), "model_s": round(time.monotonic() - began - data_s, 3)}
        self._rehearsal = Rehearsal(
            job, self._config, self._code, self._loader, self._eval_sets, eval_size=plan.eval_size
        )
        if self._state is not None:
            began = time.monotonic()
            try:
                self._rehearse(None)
            except UserCodeError as error:
                if not self._placing.build_whole(error.__cause__):
                    raise
                self._state = self._with_memory(self._state)
                self._rehearse(None)
            parts["rehearsal_s"] = round(time.monotonic() - began, 3)
            lines |= self._rehearsal.metrics
        self._link.member = replace(self._link.member, says=describe_worker(described, **lines))
        if self._rehearsal.weights_count is False:
            parts["passes"] = "of one microbatch each: the weights of loss() count passes, not samples"
        elif self._stepper.one_each and not self._bitwise:
            parts["passes"] = "of one microbatch each: random numbers are drawn for whole batches of samples"
        return {**parts, "built_whole": self._placing.eager} if self._placing.eager else parts

    def _still_s(self) -> float:
        """For how long a helper process may stand still: as a worker may, where that is given."""
        given = self._config.recovery.hang_timeout
        return STILL_S if given == "auto" else parse_amount("--recovery.hang-timeout", given, clock=True).seconds

    def _check_length(self, samples: int) -> None:
        if samples != self._plan.dataset_size:
            raise RunFailed(
                f"train_data() has {samples} samples on node {self._link.member.node}, but {self._plan.dataset_size} "
                "where the run was started; give every node the same data"
            )

    def _describe_data(self, data: Any, held: str) -> dict[str, Any]:
        """For other workers, and for the parts of the run that come after this one."""
        trained = identify(data)
        self._provenance = Provenance(
            exact=self._bitwise,
            device=describe(self._device),
            data=trained,
            options=comparable(self._options),
            held=held,
            allowed=self._config.run.allow_change,
        )
        held_out = {f"eval_data() {name}".rstrip(): identify(d, some=0) for name, d in self._eval_sets.items()}
        return {"train_data()": trained, **held_out}

    @property
    def _options(self) -> dict[str, Any]:
        return result_options(self._config, job_options(self._job))

    def _warn_of_unsaved(self, sentence: str) -> None:
        self._link.event("unsaved_numbers", self._applied, sentence)

    def _rehearse(self, group: Group | None) -> None:
        self._rehearsal.run(self._the_state.model, self._stepper.tried, group)
        self._stepper.one_each |= not self._rehearsal.weights_count

    def _tell_restart(self, what: str) -> None:
        self._link.event("loader_restarted", self._applied + 1, what)

    # ---- worlds ------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train; returns how this worker's part ended: finished, stopped, failed or handed over.

        Raises:
            NonFiniteError: a loss or norm is not finite, and such steps are not to be skipped.
            CopiesDiffer: what is to be equal on all workers is not.
            CheckpointError: no committed checkpoint can be loaded.
            ConfigError: the newest checkpoint was trained on other data.
            FencedError: the run went on without this worker, or may have: the membership server was silent too long.
            RunFailed: an error came too often.
            WarmUpError: this worker failed before its first step; the others may go on without it.
        """
        failure, why, broke = None, "", ""
        try:
            while True:
                group = self._join(failure, why, broke)
                failure, why, broke = None, "", ""
                self._left = group.assignment.generation
                try:
                    self._link.free_with(group.free)
                    began = time.monotonic()
                    group.connect(COLLECTIVE_TIMEOUT_S)
                    connected = time.monotonic()
                    fault.point("world.connected", group.rank, self._applied)
                    self._restore(group)
                    if group.assignment.failing is not None:
                        self._save_and_fail(group, group.assignment.failing)
                    if group.assignment.parting:
                        self._save_and_part(group)
                        continue
                    self._snapshots.enter(group, self._state, self._world_step)
                    if group.place is None:
                        status = self._stand_by(group)
                    else:
                        self._saving.enter(group, self._the_state)
                        if self._config.parallel.sharded:
                            self._stepper.progress(self._applied - 1, Stage.EVALUATE)
                            self._rehearse(group)
                        self._stepper.enter(group, self._applied, self._the_state)
                        if self._took:
                            self._stepper.check_state(self._applied)
                        self._forming = {
                            "connect_s": round(connected - began, 4),
                            "restore_s": round(time.monotonic() - connected, 4),
                        }
                        status = self._train(group)
                    if status is not None:
                        return status
                except WorldBroken as error:
                    why, broke = (str(error), "") if isinstance(error, Reform) else ("", str(error))
                except UserCodeError as error:
                    failure = None if self._build_whole(error) else error.failure
                except (NonFiniteError, UpdatesDiffer) as error:  # of all members, in the same step
                    self._prepared = None
                    self._stepper.reshard()
                    self._stepper.undo()
                    self._save_newest(group, compare=isinstance(error, NonFiniteError))
                    raise
                except CopiesDiffer:  # whose is right is not known: what was saved before stays the newest
                    raise
                except (ElasticError, RunOver) as error:
                    failure = self._to_save_first(group, error)
                    if failure is None:
                        self._saving.finish_under_way(LAST_COMMIT_S)
                        raise
                except Exception as error:  # ours, or in what belongs to no call of the job's: it counts like the job's
                    failure = self._code.error(error).failure
                finally:
                    self._code.group = None
                    self._link.free_with(None)
                    self._saving.leave()
                    self._snapshots.leave()
                    self._stepper.leave()
                    group.close()
        except RunOver as over:
            return over.status
        except FencedError:
            raise  # others go on with the run
        except Exception as error:
            if self._left is not None:
                known = isinstance(error, ElasticError)
                message = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
                if self._newcomer and self._stepper.fresh:  # the others can do without it
                    told = f"worker {self._link.member.id} could not take part: {message}"
                    self._link.unfit(told)
                    raise WarmUpError(told) from error
                self._link.report_rows(self._left)  # this may end the run, before who reports has said all
                fresh, final = self._stepper.fresh, isinstance(error, FINAL)
                self._link.post(Failed(message, fresh, final), self._left)
                if fresh:  # it may only have ended this worker's part
                    raise WarmUpError(message) from error
            raise
        finally:
            self._saving.close()
            self._snapshots.close()
            self._loader.close()
            self._link.close()

    def _to_save_first(self, group: Group, error: Exception) -> Failure | None:
        """An error that is nobody's of the job: where what is held is whole, and newer than what is saved, all members
        save it before the error ends the run. They come together for that: who else has the error is not known."""
        over = isinstance(error, (RunOver, FencedError)) or group.assignment.failing is not None
        if over or not self._savable or self._applied <= max(self._saved_step(group), 0):
            return None
        if self._newcomer and self._stepper.fresh:
            return None
        return Failure(type(error).__name__, self._applied, -1, str(error), fatal=True)

    def _join(self, failure: Failure | None, why: str, broke: str) -> Group:
        if failure is not None and self._left is not None:
            self._link.report_rows(self._left)  # this may end the run
        assignment = self._link.join(
            self._warm_s, self._warm_parts, self._applied, failure, self._save_alone, why=why, broke=broke
        )
        self._code.rank = f" (rank {assignment.rank} of {assignment.size})"
        self._code.doing(f"forming world {assignment.generation}", self._applied)
        fault.point("world.assigned", assignment.rank, self._applied)
        self._code.group = group = Group(
            assignment,
            self._device,
            self._config.parallel.strategy,
            self._config.scaling.workers_per_node,
            self._link.member.node,
        )
        return group

    def _restore(self, group: Group) -> None:
        """Bring every member to one state: the newest that any of them holds, else a checkpoint, else a fresh start."""
        applied = self._agree_on_updates(group)
        self._took = min(applied) != max(applied) or max(applied) < 0
        self._newcomer = self._applied < 0 <= max(applied)
        self._stepper.undo()
        self._prepared = None
        newest = max(applied)
        committed = group.assignment.restore.newest
        if 0 <= newest < committed:  # held by those who waited while others went on, and were lost
            applied, self._applied = [-1] * group.size, -1
            self._lost = f"workers hold step {newest}, the newest checkpoint is of step {committed}"
        source = self._remesh(group) if self._config.parallel.sharded else self._restore_whole(group, applied)
        if not self._goes_on:  # steps after this one are done again
            self._link.undone(self._world_step)
            self._evaluated = (-1, {})
        if group.leads or group.rank == source:  # who holds the newest state has its rows; who leads may be new
            self._link.report_rows()
        # an evaluation that a break interrupted is done again, by everyone or by nobody
        said = [*self._evaluated, self._open, self._provenance.broken]
        step, found, self._open, broken = group.send_json(said, source)
        self._evaluated = (step, found)
        for kind, text in self._provenance.agree(broken):
            if group.leads:
                self._link.event(kind, self._world_step, text)

    def _agree_on_updates(self, group: Group) -> list[int]:
        """Apply the update that a broken world had in hand, or leave it to be undone.

        Returns:
            the updates in the state of each rank; -1 where it holds none.
        """
        world = self._stepped_in.generation if self._stepped_in is not None else Generation(-1, -1)
        ready = self._prepared is not None and self._prepared.step == self._applied
        mine = Standing(self._applied, int(ready), world.epoch, world.n)
        everyone = [Standing(*row) for row in group.gather_rows(list(astuple(mine)))]
        if applies(mine, everyone):
            assert self._prepared is not None
            self._roll_forward(self._prepared)
        return group.gather_ints(self._applied)

    def _restore_whole(self, group: Group, applied: list[int]) -> int:
        """Returns the rank of one that had the newest state."""
        if self._applied < 0 and self._touched:  # an update broke off in the job's code: no step's state
            self._state = None
            self._state = self._code.guard(self._placing.whole)
        newest, source, state = max(applied), 0, self._the_state
        self._open = newest >= 0
        if newest < 0:
            if group.rank == source:
                found = restore_newest(state, self._storage, self._link, convert=self._config.checkpoint.convert)
                self._applied, self._open = (found.step, not found.metrics) if found else (0, False)
                if found is not None:
                    self._provenance.goes_on_from(found)
                else:
                    initialise(state, self._config.checkpoint, self._link)
        else:
            source = applied.index(newest)
        held = group.gather_ints(self._applied)
        if min(held) != max(held):
            self._applied = restore_from_peers(state, group, held, self._link)
        self._world_step, self._goes_on, self._touched = self._applied, newest >= 0, True
        return source

    def _remesh(self, group: Group) -> int:
        """The same processes, a new mesh: cut the model anew and bring its state there.

        Returns:
            the rank of one that had the newest state, if any did.
        """
        mesh, shard, shards = group.mesh, 0, 1
        if self._state is not None and self._state.mesh is not None:
            shard, shards = self._state.mesh.shard, self._state.mesh.layout.shards
            self._state.hold_extra()
        held = Held(self._applied if self._state else -1, shard, shards)

        def make(fill: bool) -> TrainState:
            return self._code.guard(lambda: self._placing.sharded(mesh, fill=fill))

        found = remesh(
            self._state,
            held,
            group,
            make,
            self._config.checkpoint,
            self._storage,
            self._link,
            self._snapshots,
            self._lost,
            self._let_go,
        )
        self._state, self._applied = found.state, found.step if found.state else -1
        self._world_step, self._goes_on, self._open = found.step, found.rung == "memory", found.open
        self._lost = None
        if found.manifest is not None:
            self._provenance.goes_on_from(found.manifest)
        if not self._goes_on:
            self._snapshots.undone(self._world_step)
        return found.source

    def _build_whole(self, error: UserCodeError) -> bool:
        """Whether the error was that model() left something without memory: then the same state is in a model that was
        built with memory when this returns, or when the next world has cut it."""
        if self._applied < 0 or not self._placing.build_whole(error.__cause__):
            return False
        step = self._applied
        detail = f"worker {self._link.member.id} builds the model in real memory: {self._placing.eager}"
        self._link.event("built_whole", step, detail, generation=self._left)
        if not self._config.parallel.sharded:
            self._stepper.undo()
            self._state = self._with_memory(self._the_state)
        return True

    def _with_memory(self, old: TrainState) -> TrainState:
        """The same state in a model that is built with memory."""
        old.hold_extra()
        tensors, values = old.tensors(), old.values()
        state: TrainState = self._code.guard(self._placing.whole)
        state.load(tensors, values)
        return state

    def _let_go(self, lost: str | None) -> None:
        """The part that this worker holds is of no use any more, for this reason."""
        self._state, self._applied, self._lost = None, -1, lost

    def _roll_forward(self, update: Update, said_in: Generation | None = None) -> None:
        """Apply what waited for the fence. Its row is kept here too: who else has it may be lost."""
        assert self._stepped_in is not None
        self._saving.settle()
        self._snapshots.settle()
        self._apply(update)
        clock = self._stepper.clock
        row = {**self._row(update, self._stepped_in), **clock.columns(clock.data_s + clock.compute_s + clock.sync_s)}
        self._link.record(row, report=False, generation=said_in)

    def _stand_by(self, group: Group) -> str | None:
        """A spare holds nothing and waits at every fence, so that it is there when a place is free."""
        step, stop, leave = self._world_step, PAUSE * self._is_paused(group), 0
        while step < self._plan.total_steps and not stop:
            self._link.check()
            if self._config.eval.hold and self._evaluation_is_due(step):
                stop, leave = self._hold(group, step)
                if stop or leave:
                    break
            self._stepper.progress(step, Stage.FENCE)
            says = [*NEUTRAL, 0, 0, int(self._link.wish("leave") is not None), 0, *self._snapshots.says()]
            _, _, stop, _, leave, _, *said = group.agree(says)
            self._snapshots.hear(said)
            step += 1
            if leave:
                break
        if leave and not stop and step < self._plan.total_steps:
            return None
        status = "stopped" if step < self._plan.total_steps else "finished"
        last = group.size + group.rank  # the result is the lowest rank's, which is to be one that trained
        self._link.post(Done(last, status, "", {}))
        return status

    # ---- steps -------------------------------------------------------------------------------------------------

    def _train(self, group: Group) -> str | None:
        """Step until the end, a pause, or (None) until the members leave this world together."""
        stop, leave = PAUSE * self._is_paused(group), 0
        if self._open:
            self._do_what_is_due(group)
        while self._applied < self._plan.total_steps and not stop:
            self._link.check()
            if self._config.eval.hold and self._evaluation_is_due():
                stop, leave = self._hold(group, self._applied)
            if not stop and not leave:
                stop, leave = self._step(group)
            if leave and not stop and self._applied < self._plan.total_steps:
                self._make_safe(group)
                return None
        return self._finish(group, stop)

    def _is_paused(self, group: Group) -> bool:
        """Whether this part of the run is done: its last update was applied when this world began."""
        most = self._plan.stop_after_steps
        return self._open and most is not None and self._world_step - self._claim_step(group) >= most

    def _claim_step(self, group: Group) -> int:
        """Where this claim began: lower than was thought where that checkpoint could not be loaded."""
        return min(group.assignment.claim_step, self._world_step)

    def _saved_step(self, group: Group) -> int:
        """Of the newest checkpoint when this world began: one that is newer than its state could not be loaded."""
        return min(group.assignment.restore.newest, self._world_step)

    def _do_what_is_due(self, group: Group) -> None:
        """What belongs after the state's step, and was broken off there: evaluation and checkpoint."""
        if self._evaluation_is_due():
            self._evaluate(group)
        every = self._plan.checkpoint_every
        due = every is not None and 0 < self._applied < self._plan.total_steps and self._applied % every == 0
        if due and self._saved_step(group) != self._applied:
            self._save(busy=False)
            self._saving.row_posted(self._applied)  # reported when the world began

    def _hold(self, group: Group, step: int) -> tuple[int, int]:
        """Wait for leave to go on, with the state in memory; returns the agreed wishes to stop and to leave."""
        link, wishes = self._link, ("stop", "save", "leave")
        if group.leads:
            link.report_rows()  # somebody decides by them
        while True:
            self._stepper.progress(step - 1, Stage.HELD)
            while link.allowed <= step and not any(link.wish(w) is not None for w in wishes):
                link.check()
                time.sleep(HOLD_POLL_S)
            stop, save, leave = group.agree([int(link.wish(w) is not None) for w in wishes])
            if stop or leave or not save:
                return AT_ONCE * stop, leave
            if group.place is None:
                link.granted("save")
            else:
                self._save(busy=False)
                self._saving.row_posted(step)  # reported before, or when the world began

    def _step(self, group: Group) -> tuple[int, int]:
        """One step of training; returns the agreed wishes to stop and to leave."""
        began = time.perf_counter()
        step, plan, stepper = self._applied, self._plan, self._stepper
        self._stepped_in = group.assignment
        self._watch.begin(self._the_state)
        with self._watch.reading():
            update = self._prepared = stepper.prepare(step)
        clock, fence = stepper.clock, time.perf_counter()
        stepper.progress(step, Stage.FENCE)
        fault.point("step.before_fence", group.rank, step + 1)
        wishes = self._wishes(step + 1 - self._claim_step(group))
        says = [*stepper.says(update), *wishes, *self._snapshots.says()]
        first, second, stop, save_now, leave, busy, *said = group.agree(says)
        clock.sync_s += time.perf_counter() - fence
        stepper.check_equal(update, [first, second])
        fault.point("step.after_fence", group.rank, step + 1)
        self._snapshots.hear(said)
        clock.checkpoint_s += self._saving.settle() + self._snapshots.settle()
        self._apply(update)
        row = {**self._row(update, group.assignment), **self._forming, **self._snapshots.columns()}
        self._forming = {}
        try:
            if self._applied < plan.total_steps and not stop:
                if not leave:  # else those do it who go on from here
                    if self._evaluation_is_due():
                        self._evaluate(group)
                    if save_now or (plan.checkpoint_every and self._applied % plan.checkpoint_every == 0):
                        self._save(busy=bool(busy))
                if plan.check_every and self._applied % plan.check_every == 0:
                    stepper.check_state(self._applied)
                clock.checkpoint_s += self._snapshots.after(self._applied, time.perf_counter() - began)
        finally:
            self._link.record(row | clock.columns(time.perf_counter() - began), report=group.leads)
        self._saving.row_posted(self._applied)  # only now, so that no committed step is missing in the ledger
        return stop, leave

    @property
    def _the_state(self) -> TrainState:
        assert self._state is not None, "nothing is placed yet"
        return self._state

    def _wishes(self, steps_here: int) -> list[int]:
        """What this member wishes for at the coming boundary, and whether it still saves: [stop, save, leave, busy]."""
        plan, link = self._plan, self._link
        pause = plan.stop_after_steps is not None and steps_here >= plan.stop_after_steps
        pause |= plan.stop_after_s is not None and time.monotonic() - self._started >= plan.stop_after_s
        stop = AT_ONCE if link.wish("stop") is not None else PAUSE * pause
        save = link.wish("save") is not None or self._saving.overdue
        return [stop, int(save), int(link.wish("leave") is not None), int(self._saving.busy)]

    def _apply(self, update: Update) -> None:
        self._link.check_lease()
        self._watch.passed()
        self._applied = -1  # from here to the end of the update the state is neither the old nor the new one
        self._stepper.apply(update)
        self._applied = update.step + 1
        self._prepared = None
        self._stepper.progress(update.step, Stage.APPLIED)
        self._look_at_state(update)

    def _look_at_state(self, update: Update) -> None:
        """After the first updates of a process: refuse what would not come back, or is known to nobody.

        Raises:
            ConfigError: by name.
        """
        state = self._the_state
        state.rates.heed()
        if self._checked and self._watch.done:
            return
        self._savable = False
        self._watch.applied(self._applied, skipped=update.skip)
        if not self._checked:
            check_comes_back(state)
        self._savable = self._checked = True

    # ---- between steps -----------------------------------------------------------------------------------------

    def _evaluation_is_due(self, step: int | None = None) -> bool:
        every, step = self._plan.eval_every, self._applied if step is None else step
        return every is not None and 0 < step < self._plan.total_steps and step % every == 0

    def _evaluate(self, group: Group) -> dict[str, float]:
        if self._evaluated[0] == self._applied:
            return self._evaluated[1]
        self._stepper.progress(self._applied - 1, Stage.EVALUATE)
        self._code.doing(f"the evaluation after step {self._applied}", self._applied - 1)
        fault.point("eval.begin", group.rank, self._applied)
        found: dict[str, float] = {}
        passes = itertools.count(1)
        with self._stepper.unmoved():
            for name, data in self._eval_sets.items():
                found |= evaluate(
                    self._job,
                    self._the_state.model,
                    name,
                    data,
                    group,
                    self._code,
                    size=self._plan.eval_size,
                    seed=self._config.run.seed,
                    device=self._device,
                    each=self._stepper.unmoved if self._bitwise else contextlib.nullcontext,
                    on_pass=lambda: self._link.progress(Position(self._applied - 1, Stage.EVALUATE, next(passes))),
                )
        self._stepper.reshard()
        self._evaluated = (self._applied, found)
        if found:
            row = {"step": self._applied, "time": time.time(), "generation": str(group.assignment.generation)}
            self._link.record({**row, **found}, report=group.leads)
        return found

    def _save(self, *, busy: bool) -> None:
        began = time.perf_counter()
        self._stepper.progress(self._applied - 1, Stage.CHECKPOINT)
        self._link.granted("save")
        self._stepper.check_state(self._applied)
        self._saving.save(self._applied, busy=busy)
        self._stepper.clock.checkpoint_s += time.perf_counter() - began

    def _make_safe(self, group: Group) -> None:
        """Before a world is left: of a single sharded copy, a worker that is let go takes its part along."""
        if group.layout.shards > 1 and group.layout.replicas == 1:
            self._stepper.progress(self._applied - 1, Stage.CHECKPOINT)
            self._stepper.check_state(self._applied)
            with contextlib.suppress(CheckpointError):  # which is in the ledger; then the one before has to do
                self._saving.make_safe(self._applied, LAST_COMMIT_S)

    def _save_newest(self, group: Group, *, compare: bool = True) -> None:
        """An error ends the run: make the newest state safe, together with all members, if it is not yet.

        Args:
            compare: the copies first. Where updates differ, so do the rates that were set for them.
        """
        if self._applied > max(self._saved_step(group), 0):
            self._stepper.progress(self._applied - 1, Stage.CHECKPOINT)
            with contextlib.suppress(ElasticError, RunOver):  # the error that ends the run is the one to be told
                if compare:
                    self._stepper.check_state(self._applied, group, self._the_state)
                self._saving.make_safe(self._applied, LAST_COMMIT_S)

    def _save_and_fail(self, group: Group, message: str) -> None:
        """The job's code failed too often, and this world was formed to save what its members hold.

        Raises:
            RunFailed: with that error.
        """
        if group.place is not None:
            self._saving.enter(group, self._the_state)
            self._save_newest(group)
        group.gather_ints(self._applied)  # nobody ends the run before all have saved
        raise RunFailed(message)

    def _save_and_part(self, group: Group) -> None:
        """A member is to be left out, and this world was formed to save what it holds of the state."""
        if group.place is not None:
            self._saving.enter(group, self._the_state)
            self._make_safe(group)

    def _save_alone(self) -> None:
        """The run is given up, or lets its workers go, while this one waits with the newest state: commit it without a
        world.

        An update that it has in hand is applied first. Nobody holds more, and somebody who is lost now may have passed
        the fence, so that its row is in the ledger.
        """
        assert self._left is not None
        if self._prepared is not None and self._prepared.step == self._applied:
            self._roll_forward(self._prepared, self._left)
        self._stepper.undo()
        self._link.report_rows(self._left)
        mesh = self._the_state.mesh
        if mesh is not None and mesh.layout.shards > 1:
            detail = f"this worker holds shard {mesh.shard} of {mesh.layout.shards} only"
            self._link.event("checkpoint_failed", self._applied, detail, generation=self._left)
        else:
            self._saving.save_alone(self._the_state, self._applied, self._left)
        self._link.post(SavedAlone(), self._left)

    def _row(self, update: Update, world: Assignment) -> dict[str, Any]:
        plan, record, done = self._plan, update.record, update.step + 1
        return {
            "step": done,
            "time": time.time(),
            "loss": record.loss,
            "lr": update.lr,
            "grad_norm": update.norm,
            "world_size": world.size,
            "generation": str(world.generation),
            "samples": done * plan.global_size,
            "tokens": done * plan.global_size * plan.tokens_per_sample if plan.tokens_per_sample else None,
            "device_memory": memory_share(self._device),
            "first_position": update.step * plan.global_size,
            "count": plan.global_size,
            "sample_hash": record.sample_hash,
            **record.mean_metrics(),
            **({"skipped": True} if update.skip else {}),
        }

    def _finish(self, group: Group, stop: int) -> str:
        """Evaluate, save, wait for the commit, and say that this worker is done. Who is to stop at once saves first:
        the evaluation is left to who goes on from there."""
        stopped = stop > 0
        if stop != AT_ONCE or self._applied == self._plan.total_steps:
            self._evaluate(group)
        self._stepper.progress(self._applied - 1, Stage.CHECKPOINT)
        self._stepper.check_state(self._applied)
        self._saving.finish(self._applied)
        status = "stopped" if stopped and self._applied < self._plan.total_steps else "finished"
        state, model = self._the_state, self._the_state.model
        with group.collective("gathering the weights"):
            sha = weights_sha256(model, state.whole)
        result: dict[str, Any] = {
            "steps": self._applied,
            "samples_seen": self._applied * self._plan.global_size,
            "metrics": self._evaluated[1] if self._evaluated[0] == self._applied else {},
            "weights_sha256": sha,
            "exactness": self._config.run.exactness,
            "exactness_held": self._bitwise and not self._provenance.broken,
            **({"exactness_lost": self._provenance.broken} if self._provenance.broken else {}),
            "hardware": {**describe(self._device), "workers": group.size},
        }
        if status == "finished" and (group.leads or self._config.parallel.sharded):
            result["sample"] = self._sample(model)
        message = self._link.wish("stop") or "" if stopped else ""
        self._link.post(Done(group.rank, status, message, result))
        return status

    def _sample(self, model: torch.nn.Module) -> str | None:
        """The job's text; None, with an event, where it raises: the run is trained and saved."""
        self._code.where = "sample()"
        model.eval()
        seed_all(derive("sample", self._config.run.seed))
        try:
            with torch.no_grad():
                text = self._code.guard(lambda: call_gathered(model, lambda: self._job.sample(model)))
                return None if text is None else self._code.guard(lambda: str(text))
        except ElasticError as error:  # of the job's code; or another worker's failed, where the model is cut
            why = error.__cause__ or error
            detail = f"sample() failed, {type(why).__name__}: {why}\n{error}"
            self._link.event("sample_failed", self._applied, detail)
            return None
