"""One drive of a run on Ray: its host, its workers, and the console lines and notices on the way."""

from __future__ import annotations

import time
from typing import Any

import ray

from elastic.cluster.actors import training_function
from elastic.cluster.autoscaler import node_types
from elastic.cluster.capacity import awaited, check_fits, choose_accelerator, worker_resources
from elastic.cluster.control import RunControl
from elastic.cluster.embedded import node_resources
from elastic.cluster.forks import Forks, forks_here
from elastic.cluster.hosting import HostOnRay
from elastic.cluster.metrics import RayMetrics
from elastic.cluster.outputs import WorkersOutput
from elastic.cluster.placement_groups import GroupPlan, group_prefix
from elastic.cluster.references import Sent
from elastic.cluster.sharing import Terms
from elastic.cluster.workers import RayWorkers
from elastic.membership.driver import DriverLink, outlived
from elastic.membership.protocol import Note
from elastic.observe.console import Console
from elastic.run.drive import Drive
from elastic.run.host import HostSettings, host_settings, keeper_options, new_token, start_detail
from elastic.run.logs import RunLogs
from elastic.run.prepare import PreparedRun
from elastic.run.signals import handled_by
from elastic.units import parse_amount
from elastic.worker.hosting import HostHere
from elastic.worker.run import WorkerRun
from elastic.worker.vaults import HANG_TIMEOUT_S


def drive_on_ray(
    run: PreparedRun, epoch: int, console: Console, control: RunControl | None, connect_s: float
) -> dict[str, Any]:
    """Start everything, wait for the end, clean up; returns the contents of result.json. `connect_s` is only recorded.

    Raises:
        ConfigError: the cluster can never have such workers.
        RunFailed: the run ended without finishing.
        Interrupted: a signal stopped it.
    """
    scaling, present = run.config.scaling, node_resources()
    nodes = [*present, *node_types()]
    accelerator = choose_accelerator(scaling.accelerator, nodes)
    cpus, cell_size = scaling.cpus_per_worker, run.config.parallel.tensor
    check_fits(scaling.accelerator, accelerator, scaling.workers_per_node, cpus, nodes, cell_size)
    settings = host_settings(run.config, new_token(), ray.util.get_node_ip_address())
    detail = {
        "name": run.name,
        "accelerator": accelerator,
        "cluster_s": round(connect_s, 3),
        **start_detail(run),
    }
    options = keeper_options(run, epoch, ray_job_id=ray.get_runtime_context().get_job_id())
    arguments = run.folder.storage.url, options, settings, detail
    logs = RunLogs(run.folder.storage)
    output = WorkersOutput(logs)
    metrics = RayMetrics(run.name, run.plan.total_steps)
    listeners = [outlived(console.record), output.on_record, outlived(metrics.on_record)] + (
        [outlived(control.on_record)] if control is not None else []
    )
    drive = Drive(run, listeners, console.print)
    forks, warm = None, run.config.cluster.keep_warm
    if warm is not None:
        idle_s = parse_amount("--cluster.keep-warm", warm, clock=True).seconds
        forks = forks_here(idle_s, besides=2 if control is None else 0)  # the host and the controller
    host = HostHere(*arguments) if control is not None else HostOnRay(*arguments, drive.fail, forks)
    try:
        with handled_by(drive.on_signal), logs, output.heard(), logs.telling_of_deaths():
            url = host.begin()
            plan = _group_plan(run, url, settings, accelerator, forks)
            workers = RayWorkers(plan, _function(run, plan, accelerator), here=control is not None)
            try:
                workers.start()  # they take longer to start than their host, and need it only then
                host.wait()
                link = DriverLink(url, settings.token)
                output.link = link
                drive.follow(link)
                if control is not None:
                    control.attach(link)
                if run.changed_code:
                    console.print("warning: the job's code is not the code this run was started with")
                _print_start(plan, accelerator, console)
                missing = awaited(accelerator, present)
                if missing:
                    drive.ask(Note("notice", f"waiting for {missing}"))
                return drive.wait(workers)
            finally:
                workers.close()
    finally:
        if control is not None:
            control.attach(None)
        try:
            host.stop()
        finally:
            drive.close()


def _group_plan(run: PreparedRun, url: str, settings: HostSettings, accelerator: str, forks: Forks | None) -> GroupPlan:
    scaling = run.config.scaling
    patience_s = parse_amount("--scaling.request-timeout", scaling.request_timeout, clock=True).seconds
    return GroupPlan(
        url,
        settings.token,
        scaling.max_workers,
        scaling.spares,
        run.plan.microbatches,
        worker_resources(accelerator, scaling.cpus_per_worker),
        group_prefix(run.name),
        Terms(run.name, scaling.priority, time.time(), accelerator, run.config.least_workers, patience_s),
        scaling.workers_per_node,
        scaling.exclude,
        packed=run.config.parallel.strategy == "hsdp",
        cell_size=run.config.parallel.tensor,
        stages=run.config.parallel.stages,
        vaults=run.plan.snapshot_every is not None,
        hang_timeout_s=settings.hang_s or HANG_TIMEOUT_S,
        forks=forks,
    )


def _function(run: PreparedRun, plan: GroupPlan, accelerator: str) -> Sent:
    where = (run.folder.storage.url, plan.url, plan.token)
    worker_run = WorkerRun(run.job, run.config, run.plan, run.digest, *where, prepared=run.prepared)
    return Sent(training_function(worker_run, accelerator, plan.name if plan.vaults else None))


def _print_start(plan: GroupPlan, accelerator: str, console: Console) -> None:
    want = plan.want(plan.max_workers)
    why = "; more would not lower the rounds of a step" if want < plan.max_workers + plan.spares else ""
    console.print(f"starting {want} workers on {accelerator}{why}")
