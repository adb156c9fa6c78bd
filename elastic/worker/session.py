"""One worker from its first join to the end of the run. Runs without Ray.

warm up -> join -> connect -> restore -> step, step, ... -> done
            ^                                   |
            +----------- world broken ----------+
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from elastic.data.deal import deal
from elastic.data.loader import Fetcher, Loader, Order
from elastic.data.seeds import derive, seed_all
from elastic.errors import NonFiniteError, WorldBroken
from elastic.job import eval_sets
from elastic.membership.client import WorkerLink
from elastic.parallel.device import describe, memory_share, pick_device, prepare_process
from elastic.parallel.records import StepRecord
from elastic.parallel.replicated import BitwiseReplica, FastReplica, Pass
from elastic.storage import Storage
from elastic.units import parse_amount
from elastic.worker import nonfinite
from elastic.worker.evaluate import evaluate
from elastic.worker.group import Group, is_collective_failure
from elastic.worker.run import Identity, WorkerRun
from elastic.worker.saving import restore_from_peer, restore_newest, save
from elastic.worker.schedule import factor
from elastic.worker.state import TrainState, weights_sha256
from elastic.worker.user_code import UserCode, UserCodeError

JOIN_TIMEOUT_S = 600.0
COMMIT_TIMEOUT_S = 600.0


@dataclass
class _Clock:
    """Seconds of a step, by what they were spent on."""

    data_s: float = 0.0
    compute_s: float = 0.0
    sync_s: float = 0.0
    checkpoint_s: float = 0.0
    other_s: float = 0.0


@dataclass
class _Update:
    """A step with all in hand for its update, which waits for the fence."""

    step: int
    record: StepRecord
    lr: float
    norm: float
    skip: bool


class Session:
    """Trains until the run is finished or paused."""

    def __init__(self, run: WorkerRun, identity: Identity, *, import_s: float = 0.0):
        """Warm up: device, data and model are ready when this returns. `import_s` is only reported."""
        began = time.monotonic()
        self._warm_parts = {"import_s": round(import_s, 3)}
        self._run, self._identity = run, identity
        self._job, self._config, self._plan = run.job, run.config, run.plan
        self._bitwise = run.config.run.exactness == "bitwise"
        self._hang_s = parse_amount("hang", run.config.recovery.hang_timeout, clock=True).seconds
        lease_s = parse_amount("lease", run.config.recovery.lease, clock=True).seconds
        prepare_process(bitwise=self._bitwise, threads=run.config.scaling.cpus_per_worker)
        self._device = pick_device(identity.accelerator, identity.local_index)
        self._storage = Storage(run.folder_url)
        self._code = UserCode(run.job, self._device, identity.id, autocast=run.config.precision.autocast == "bf16")
        self._link = WorkerLink(run.server_url, run.token, identity.id, lease_s=lease_s)
        self._applied = -1  # updates in the state this worker holds; -1: it holds none
        self._prepared: _Update | None = None
        self._undo: Callable[[], None] | None = None  # puts back what an unfinished step did to buffers
        self._clock = _Clock()
        self._saves = 0
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._started = time.monotonic()
        self._warm_up()
        self._warm_s = time.monotonic() - began + import_s

    # ---- life --------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train; returns the run's status: finished or stopped."""
        try:
            while True:
                group = self._join()
                try:
                    group.connect(self._hang_s)
                    self._restore(group)
                    return self._train(group)
                except WorldBroken:
                    self._code.where = "re-joining"
                finally:
                    group.close()
        except (NonFiniteError, UserCodeError) as error:
            self._link.post({"kind": "failed", "message": str(error)})
            raise
        finally:
            self._loader.close()
            self._link.close()

    def _warm_up(self) -> None:
        job, seed = self._job, self._config.run.seed
        began = time.monotonic()
        self._train_data, self._eval_sets = job.train_data(), eval_sets(job)
        self._warm_parts["data_s"] = round(time.monotonic() - began, 3)
        began = time.monotonic()
        seed_all(derive("model", seed))
        self._model = job.model().to(self._device)
        self._model.train()
        self._state = TrainState(job, self._model, job.optimizer(self._model))
        self._warm_parts["model_s"] = round(time.monotonic() - began, 3)
        order = Order(
            seed=seed, dataset_size=self._plan.dataset_size, global_size=self._plan.global_size,
            microbatches=self._plan.microbatches,
        )  # fmt: skip
        fetcher = Fetcher(self._train_data, job.collate_fn, seed, self._plan.dataset_size)
        self._order = order
        self._loader = Loader(
            fetcher, order, workers=self._config.data.workers, prefetch=self._config.data.prefetch,
            total_steps=self._plan.total_steps,
        )  # fmt: skip

    def _join(self) -> Group:
        identity = self._identity
        assignment = self._link.join(
            {
                "group": identity.group, "group_size": identity.group_size, "node": identity.node,
                "local_index": identity.local_index, "host": identity.host, "pid": os.getpid(),
                "device": describe(self._device), "applied": self._applied, "warm_s": round(self._warm_s, 3),
                "warm_parts": self._warm_parts,
            },
            JOIN_TIMEOUT_S,
        )  # fmt: skip
        return Group(assignment, self._device)

    def _restore(self, group: Group) -> None:
        """Bring every member to one state: the newest that any of them holds, else a checkpoint, else a fresh start."""
        applied = group.gather_ints(self._applied)
        newest = max(applied)
        if newest < 0:
            if group.rank == 0:
                self._applied = restore_newest(self._state, self._storage, self._link)
            source = 0
        else:
            if self._applied == newest - 1 and self._prepared is not None and self._prepared.step == newest - 1:
                self._apply(self._prepared)  # somebody passed the fence, so everyone had prepared this update
            source = applied.index(newest)
        if self._undo is not None:
            self._undo()
        self._prepared = self._undo = None
        held = group.gather_ints(self._applied)
        if min(held) != max(held):
            self._applied = restore_from_peer(
                self._state, group, source, self._applied, self._link, wanted=self._applied != max(held)
            )

    def _train(self, group: Group) -> str:
        runs = deal(self._plan.microbatches, group.size)
        spans = self._spans(runs[group.rank])
        self._loader.start(self._applied, spans)
        replica = self._replica(runs, group)
        first = self._applied
        stopped = False
        try:
            while self._applied < self._plan.total_steps and not stopped:
                self._link.check()
                stopped = self._step(group, replica, spans, first)
        finally:
            replica.close()
        return self._finish(group, stopped)

    def _step(
        self, group: Group, replica: FastReplica | BitwiseReplica, spans: list[tuple[int, int]], first: int
    ) -> bool:
        """One step of training; returns whether it is the last before a pause."""
        began = time.perf_counter()
        self._clock = clock = _Clock()
        step = self._applied
        self._code.where = f"step {step + 1}"
        self._link.progress(step, "step")
        self._undo = replica.undo_buffers
        update = self._prepare(step, replica, spans, group)
        self._prepared = update
        fence = time.perf_counter()
        stop, save_now = group.agree(self._flags(step + 1 - first))
        clock.sync_s += time.perf_counter() - fence
        self._apply(update)
        done, plan = self._applied, self._plan
        last = done == plan.total_steps
        if not last and not stop:
            if plan.eval_every and done % plan.eval_every == 0:
                self._evaluate(group)
            if save_now or (plan.checkpoint_every and done % plan.checkpoint_every == 0):
                self._save(group)
        clock.compute_s -= clock.data_s + replica.wait_s
        clock.sync_s += replica.wait_s
        step_s = time.perf_counter() - began
        clock.other_s = max(0.0, step_s - clock.data_s - clock.compute_s - clock.sync_s - clock.checkpoint_s)
        if group.rank == 0:
            self._report(update, group, step_s)
        return bool(stop)

    # ---- parts of a step ---------------------------------------------------------------------------------------

    def _prepare(
        self, step: int, replica: FastReplica | BitwiseReplica, spans: list[tuple[int, int]], group: Group
    ) -> _Update:
        """Forward, backward, reduce, scale and clip: all that the update needs."""
        began = time.perf_counter()
        plan, optim = self._plan, self._config.optim
        record, divisor = self._replica_run(step, replica, spans)
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        raw_norm = float(replica.norm(gradients)) if gradients else 0.0
        norm = raw_norm / divisor if divisor else float("nan")
        finite = all(abs(x) < float("inf") for x in (record.loss, norm))
        if not finite:
            self._on_nonfinite(step, record, norm, spans, group)
            replica.undo_buffers()
        else:
            scale = 1.0 / divisor
            if optim.clip_norm is not None and norm > optim.clip_norm:
                scale *= optim.clip_norm / (norm + 1e-6)
            if scale != 1.0:
                torch._foreach_mul_(gradients, scale)
        share = self._code.guard(lambda: self._job.schedule(step, plan.total_steps))
        if share is None:
            share = factor(
                step, plan.total_steps, schedule=optim.schedule, warmup_steps=plan.warmup_steps, final=optim.final_lr
            )
        for parameter_group in self._state.optimizer.param_groups:
            parameter_group["lr"] = parameter_group["initial_lr"] * share
        self._clock.compute_s += time.perf_counter() - began
        return _Update(step, record, self._state.optimizer.param_groups[0]["lr"], norm, not finite)

    def _replica_run(
        self, step: int, replica: FastReplica | BitwiseReplica, spans: list[tuple[int, int]]
    ) -> tuple[StepRecord, float]:
        try:
            return replica.run(self._passes(step, spans))
        except UserCodeError:
            raise
        except RuntimeError as error:
            if is_collective_failure(error):
                raise WorldBroken(f"step {step + 1} failed: {error}") from error
            raise self._code.error(error) from error

    def _passes(self, step: int, spans: list[tuple[int, int]]) -> Iterator[Pass]:
        for i, (first, count) in enumerate(spans):
            began = time.perf_counter()
            self._code.where = f"step {step + 1}, microbatch {first}"
            span = self._code.guard(partial(self._loader.next, step, first, count))
            self._clock.data_s += time.perf_counter() - began
            seed_all(derive("step", self._config.run.seed, step, first))
            yield Pass(span.batch, first, span.digests, i == len(spans) - 1)

    def _apply(self, update: _Update) -> None:
        """The update itself; from here to its end the state is neither the old nor the new one."""
        began = time.perf_counter()
        self._applied = -1
        if not update.skip:
            self._state.optimizer.step()
            self._code.guard(lambda: self._job.after_step(self._model, update.step + 1))
        self._applied = update.step + 1
        self._prepared = self._undo = None
        self._clock.compute_s += time.perf_counter() - began

    def _flags(self, steps_here: int) -> list[int]:
        """What this member wishes for at the coming boundary: [stop, save]."""
        wish = self._link.wish()
        plan = self._plan
        stop = wish is not None and wish["wish"] == "stop"
        stop |= plan.stop_after_steps is not None and steps_here >= plan.stop_after_steps
        stop |= plan.stop_after_s is not None and time.monotonic() - self._started >= plan.stop_after_s
        return [int(stop), int(wish is not None and wish["wish"] == "save")]

    def _on_nonfinite(
        self, step: int, record: StepRecord, norm: float, spans: list[tuple[int, int]], group: Group
    ) -> None:
        """Stop before the update, or leave the step out.

        Raises:
            NonFiniteError: unless such updates are to be skipped.
        """
        if self._config.run.on_nonfinite == "skip":
            return
        microbatch, count = record.nonfinite_microbatch, 1
        if microbatch is None:
            indices = [i for first, n in spans for i in range(first, first + n)]
            found = [m for m in group.gather_ints(self._find_bad(step, indices)) if m >= 0]
            microbatch = min(found, default=None)
        else:  # the loss is known for each pass
            runs = deal(self._plan.microbatches, group.size)
            count = next(n for run in runs for first, n in self._spans(run) if first == microbatch)
        ids = [] if microbatch is None else self._order.span(step, microbatch, count).ids.tolist()
        raise nonfinite.error(step, record, norm, microbatch, ids)

    def _find_bad(self, step: int, indices: list[int]) -> int:
        def microbatches() -> Iterator[tuple[int, Any]]:
            self._loader.start(step, [(i, 1) for i in indices])
            for index in indices:
                batch = self._loader.next(step, index, 1).batch
                seed_all(derive("step", self._config.run.seed, step, index))
                yield index, batch

        return nonfinite.first_bad_microbatch(self._model, self._code.loss, microbatches())

    # ---- between steps -----------------------------------------------------------------------------------------

    def _replica(self, runs: list[range], group: Group) -> FastReplica | BitwiseReplica:
        parallel = self._config.parallel
        if self._bitwise:
            return BitwiseReplica(
                self._model,
                self._code.loss,
                runs=runs,
                rank=group.rank,
                device=self._device,
                bucket_mb=parallel.bucket_mb,
            )
        try:
            return FastReplica(
                self._model, self._code.loss, runs=runs, rank=group.rank, device=self._device,
                bucket_mb=parallel.bucket_mb, find_unused=parallel.find_unused,
                compression=self._config.precision.grad_compression,
            )  # fmt: skip
        except RuntimeError as error:
            if is_collective_failure(error):
                raise WorldBroken(f"wrapping the model failed: {error}") from error
            raise

    def _spans(self, run: range) -> list[tuple[int, int]]:
        """(first, count) of each pass of a run of microbatches."""
        if self._bitwise:
            return [(i, 1) for i in run]
        microbatch = self._plan.global_size // self._plan.microbatches
        most = -(-self._plan.microbatches // self._config.scaling.max_workers)
        if self._config.batch.pass_size is not None:
            most = max(1, self._config.batch.pass_size // microbatch)
        return [(i, min(most, run.stop - i)) for i in range(run.start, run.stop, most)]

    def _evaluate(self, group: Group) -> dict[str, float]:
        if self._evaluated[0] == self._applied:
            return self._evaluated[1]
        self._link.progress(self._applied, "eval")
        self._code.where = f"evaluation after step {self._applied}"
        microbatch = self._plan.global_size // self._plan.microbatches
        found: dict[str, float] = {}
        for name, data in self._eval_sets.items():
            found |= evaluate(
                self._job, self._model, name, data, group, size=min(4 * microbatch, self._plan.global_size),
                seed=self._config.run.seed, run_loss=self._code.evaluate,
            )  # fmt: skip
        self._evaluated = (self._applied, found)
        if found and group.rank == 0:
            row = {"step": self._applied, "time": time.time(), "generation": str(group.assignment.generation)}
            self._link.post({"kind": "rows", "rows": [{**row, **found}]})
        return found

    def _save(self, group: Group) -> None:
        began = time.perf_counter()
        self._link.progress(self._applied, "checkpoint")
        self._saves += 1
        attempt = f"{group.assignment.generation}-{self._applied:x}"
        try:
            save(
                self._state, self._applied, attempt, group, self._link, self._storage, seed=self._config.run.seed,
                config_digest=self._run.digest,
            )  # fmt: skip
        except OSError as error:
            self._link.post(
                {"kind": "event", "event": "checkpoint_failed", "step": self._applied, "detail": str(error)}
            )
        self._clock.checkpoint_s += time.perf_counter() - began

    def _report(self, update: _Update, group: Group, step_s: float) -> None:
        clock, plan, record = self._clock, self._plan, update.record
        row = {
            "step": update.step + 1, "time": time.time(), "loss": record.loss, "lr": update.lr,
            "grad_norm": update.norm, "world_size": group.size, "generation": str(group.assignment.generation),
            "samples": (update.step + 1) * plan.global_size,
            "tokens": (update.step + 1) * plan.global_size * plan.tokens_per_sample if plan.tokens_per_sample else None,
            "step_s": round(step_s, 6), "data_s": round(clock.data_s, 6), "compute_s": round(clock.compute_s, 6),
            "sync_s": round(clock.sync_s, 6), "checkpoint_s": round(clock.checkpoint_s, 6),
            "other_s": round(clock.other_s, 6), "device_memory": memory_share(self._device),
            "first_position": update.step * plan.global_size, "count": plan.global_size,
            "sample_hash": record.sample_hash, **record.mean_metrics(),
        }  # fmt: skip
        if update.skip:
            row["skipped"] = True
        self._link.post({"kind": "rows", "rows": [row]})

    def _finish(self, group: Group, stopped: bool) -> str:
        """Evaluate, save, wait for the commit, and say that this worker is done."""
        self._evaluate(group)
        self._save(group)
        self._link.await_commit(self._applied, COMMIT_TIMEOUT_S)
        status = "stopped" if stopped and self._applied < self._plan.total_steps else "finished"
        result: dict[str, Any] = {}
        if group.rank == 0:
            result = {
                "steps": self._applied, "samples_seen": self._applied * self._plan.global_size,
                "metrics": self._evaluated[1], "weights_sha256": weights_sha256(self._model),
                "exactness": self._config.run.exactness, "exactness_held": self._bitwise,
                "hardware": {**describe(self._device), "workers": group.size},
            }  # fmt: skip
            if status == "finished":
                self._model.eval()
                seed_all(derive("sample", self._config.run.seed))
                with torch.no_grad():
                    result["sample"] = self._code.guard(lambda: self._job.sample(self._model))
        wish = self._link.wish() or {}
        message = str(wish.get("detail", "")) if stopped else ""
        self._link.post({"kind": "done", "status": status, "message": message, "result": result})
        return status
