"""A sweep from beginning to end: its checks, the turns of Ray Tune, and the results in its folder."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from elastic import config as cfg
from elastic.checkpoint.reader import newest_first
from elastic.checkpoint.retention import pin, unpin
from elastic.cluster.autoscaler import node_types
from elastic.cluster.capacity import choose_accelerator, worker_resources
from elastic.cluster.embedded import connected, node_resources, preflight
from elastic.config import ClusterOptions, TrainConfig
from elastic.errors import ElasticError, Interrupted, error_text
from elastic.job import Job, job_name
from elastic.job_data import training_data
from elastic.job_options import job_options
from elastic.run.plan import resolve
from elastic.run.resuming import CODED
from elastic.run.signals import handled_by
from elastic.sweep.config import SweepConfig
from elastic.sweep.judge import Judge
from elastic.sweep.prepare import PreparedSweep, prepare_sweep
from elastic.sweep.trial import TrialPlan
from elastic.tools.sweeps import TrialRecord, best_trial, ranking

HEARTBEAT_S = 5.0
REST_S = 120.0
KEEP_LAST = 3  # checkpoints of a trial in a population: another trial may still copy that of the last gate


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep: its trials, the best first, and its folder."""

    status: str
    trials: list[TrialRecord]
    best: TrialRecord | None
    folder: str


def run_sweep(job: Job, config: TrainConfig | None, sweep: SweepConfig) -> SweepResult:
    """Run a sweep to its end, or resume the sweep of this name.

    Args:
        config: the options that all trials have in common.

    Raises:
        ConfigError: bad input found before anything started.
        Interrupted: a signal ended it; the same call resumes it.
        ElasticError: the sweep cannot go on.
    """
    return drive_sweep(prepare_sweep(job, config or TrainConfig(), sweep))


def drive_sweep(prepared: PreparedSweep) -> SweepResult:
    """Like `run_sweep`, for a sweep that was prepared."""
    if prepared.finished:
        return result_of(prepared, "finished")
    address = preflight(prepared.config.cluster, prepared.config.scaling)
    folder, sweep = prepared.folder, prepared.sweep
    folder.claim(
        {
            "name": sweep.name,
            "metric": sweep.metric,
            "mode": sweep.mode,
            "fixed": sweep.fixed(),
            CODED: 1,
            "result": cfg.result_options(prepared.config, job_options(prepared.job)),
            "job": job_name(prepared.job),
            "total_evaluations": prepared.total,
        },
        take_over=sweep.take_over,
    )
    with connected(prepared.config.cluster, prepared.config.scaling, address):
        return _Sweeping(prepared).run()


def result_of(prepared: PreparedSweep, status: str) -> SweepResult:
    """The result of a sweep, read from its folder."""
    metric, mode = prepared.sweep.metric, prepared.sweep.mode
    trials = prepared.folder.trials(metric, mode)
    return SweepResult(status, ranking(trials, mode), best_trial(trials, mode), prepared.folder.storage.url)


def slots(config: TrainConfig) -> int:
    """The number of trials, each with all its workers, for which the cluster has resources at a time."""
    nodes, scaling = node_resources(), config.scaling
    accelerator = choose_accelerator(scaling.accelerator, [*nodes, *node_types()])
    unit = worker_resources(accelerator, scaling.cpus_per_worker)
    workers = sum(int(min(node.get(name, 0) // amount for name, amount in unit.items())) for node in nodes)
    return max(1, workers // (scaling.max_workers + scaling.spares))


class _Sweeping:
    """One drive of a sweep."""

    def __init__(self, prepared: PreparedSweep):
        self._prepared, self._sweep, self._folder = prepared, prepared.sweep, prepared.folder
        self._judge = Judge(self._sweep, self._folder, prepared.total, self._print)
        self._signals = 0
        self._left = -1
        self._why = ""  # why no trial is started any more
        self._best: dict[str, Any] | None = self._folder.best

    def _print(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def run(self) -> SweepResult:
        """Take turns until all trials have ended."""
        from elastic.compat.ray import session_folder
        from elastic.sweep.raytune import Tuning

        limit = self._sweep.max_concurrent
        places = slots(self._prepared.config) if limit is None else limit
        places = min(places, self._sweep.total)
        print(
            f"sweep {self._prepared.name} -> {self._folder.storage.url}\n{self._judge.left} of {self._sweep.total} "
            f"trials of {self._prepared.total} evaluations to do, {places} at a time",
            flush=True,
        )
        scratch = tempfile.mkdtemp(prefix="elastic-sweep-", dir=session_folder())
        try:
            with handled_by(self._on_signal):
                tuning = Tuning(self._plan(), self._judge, places, scratch)
                try:
                    self._turn(tuning)
                finally:
                    tuning.close()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if self._why:
            self._judge.give_up(self._why)
        self._note_best()
        self._folder.close()
        result = result_of(self._prepared, "finished")
        notes = self._leave_reports(result)
        self._folder.update(status="finished", message="; ".join(n for n in (self._why, *notes) if n), best=self._best)
        return result

    def _on_signal(self, _: str) -> None:
        self._signals += 1

    def _turn(self, tuning: Any) -> None:
        next_beat = 0.0
        while not tuning.finished:
            tuning.turn()
            if self._signals:
                self._print("saving the trials that run, and ending; once more ends at once")
                self._rest(tuning)
                raise Interrupted(f"sweep {self._prepared.name} was interrupted; the same command goes on with it")
            if self._judge.refused:
                self._rest(tuning, self._judge.refused)
                raise ElasticError(self._judge.refused)
            if self._judge.left != self._left:
                self._left = self._judge.left
                self._note_best()
                next_beat = 0.0
            if not self._why and (why := self._over_budget()):
                self._print(why)
                self._why, self._judge.closing, next_beat = why, True, 0.0
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_S
                self._folder.update(best=self._best)
                if self._why:
                    tuning.stop_all(self._why)
            if self._why and not tuning.running:
                return

    def _over_budget(self) -> str:
        sweep = self._sweep
        if sweep.time_budget_s is not None and self._folder.seconds >= sweep.time_budget_s:
            return f"the time budget of {sweep.time_budget} is spent"
        if sweep.cost_budget is not None and self._judge.cost >= sweep.cost_budget:
            return f"the cost budget of {sweep.cost_budget:g} is spent"
        return ""

    def _rest(self, tuning: Any, message: str = "") -> None:
        """Have running trials save and end, and mark the sweep as interrupted."""
        self._judge.closing = True
        tuning.rest_all()
        deadline, next_call = time.monotonic() + REST_S, time.monotonic() + 1.0
        while tuning.running and time.monotonic() < deadline and self._signals < 2:
            if time.monotonic() >= next_call:  # a trial may just have been started
                next_call = time.monotonic() + 1.0
                tuning.rest_all()
            tuning.turn()
        self._folder.update(status="interrupted", message=message, best=self._best)
        self._folder.close()

    def _note_best(self) -> None:
        """Pin the last checkpoint of the best trial, and unpin that of the trial that was best before."""
        found = result_of(self._prepared, "running").best
        storage = self._folder.storage
        newest = next(newest_first(storage.child(found.run)), None) if found is not None else None
        if found is None or newest is None:
            return
        best = {
            "trial": found.number,
            "run": found.run,
            "step": newest.step,
            "value": found.value,
            "options": found.options,
        }
        if best == self._best:
            return
        pin(storage.child(found.run), newest.step)
        if self._best is not None and (self._best["run"], self._best["step"]) != (found.run, newest.step):
            unpin(storage.child(self._best["run"]), self._best["step"])
        self._best = best

    def _plan(self) -> TrialPlan:
        """The plan that all trial actors get. They are connected to the cluster already, and pause at their gates."""
        prepared, sweep = self._prepared, self._sweep
        config = prepared.config
        hold = config.eval.every is not None and (sweep.scheduler != "none" or bool(sweep.stop))
        checkpoint = config.checkpoint
        if sweep.scheduler == "pbt":
            every = self._every() * sweep.perturbation_interval
            checkpoint = replace(
                checkpoint, every=f"{every}st", when_busy="wait", keep_last=max(KEEP_LAST, checkpoint.keep_last)
            )
        here = ClusterOptions(address=ray.get_runtime_context().gcs_address)
        config = replace(config, eval=replace(config.eval, hold=hold), checkpoint=checkpoint, cluster=here)
        return TrialPlan(prepared.job, config, self._folder.storage.url, tuple(sweep.space), sweep.stop_rules)

    def _every(self) -> int:
        """Steps between two evaluations. They are equal for all trials of a population."""
        job, config = self._prepared.job, self._prepared.config
        _, size = training_data(job)
        plan = resolve(config, dataset_size=size, tokens_per_sample=job.tokens_per_sample)
        assert plan.eval_every is not None
        return plan.eval_every

    def _leave_reports(self, result: SweepResult) -> list[str]:
        """Write the table, plots and TensorBoard files; returns what could not be written, and why."""
        from elastic.sweep.reports import write_plots, write_table, write_tensorboard

        storage, sweep = self._folder.storage, self._sweep
        write_table(storage, result.trials, list(sweep.space), sweep.metric)
        notes = []
        if self._prepared.config.observe.tensorboard:
            write_tensorboard(storage, result.trials, list(sweep.space), sweep.metric)
        if sweep.plots:
            problem = write_plots(
                storage,
                storage.url.rstrip("/").rsplit("/", 1)[-1],
                result.trials,
                sweep.space,
                sweep.metric,
                sweep.mode,
            )
            notes += [problem] if problem else []
        return notes


def drive(prepared: PreparedSweep) -> int:
    """Run the sweep as the command does after validation; returns the exit code."""
    from elastic.tools.sweeps import open_sweep, report_text

    try:
        result = drive_sweep(prepared)
    except ElasticError as error:
        print(error_text(error), file=sys.stderr)
        return error.exit_code
    storage, values = open_sweep(result.folder)
    print(report_text(storage.url, values, result.trials))
    return 0 if result.best is not None else 1
