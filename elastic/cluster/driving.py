"""One drive of a run on Ray: its host, its controller, its signals, and what is said of them on the way."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from elastic.cluster.lookout import Lookout, host_answers
from elastic.errors import Interrupted, RunFailed, one_line
from elastic.membership.driver import DriverLink, outlived
from elastic.membership.protocol import Close, Note, Request, Wish
from elastic.observe.console import Console
from elastic.run.prepare import PreparedRun
from elastic.run.signals import heard_by
from elastic.units import parse_amount
from elastic.worker.hosting import LOOKS
from elastic.worker.vaults import STILL_S

if TYPE_CHECKING:
    from elastic.run.host import RunHost

from elastic.cluster.control import RunControl

END_TIMEOUT_S = 30.0
START_TIMEOUT_S = 60.0
HOST_LOST_S = 60.0
MOST_CONTROLLERS = 3
SAVE_S = 60.0  # for a save before workers are ended
AGAIN_S = 0.5  # between two starts of a host
AUTOSCALER_LOOK_S = 5.0  # between two looks at what the autoscaler could not do, while no world was formed


class Drive:
    """One drive of a run: starts its actors, shows its records, passes signals on, and cleans up."""

    def __init__(self, run: PreparedRun, epoch: int, console: Console, control: RunControl | None = None):
        self._run, self._epoch, self._console, self._control = run, epoch, console, control
        self._end: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._formed, self._saved = threading.Event(), threading.Event()
        self._formed_since = threading.Event()  # the present controller was started
        self._signals = 0
        self._signal_name = ""
        self._awaited = ""  # what no node of the cluster has yet
        self._unit: dict[str, float] = {}  # what a worker asks for
        self._said: set[str] = set()  # what the autoscaler could not do, as far as it was said
        self._host: Any = None
        self._still_s = STILL_S
        self._controller_lost = ""  # why, if it is
        self._trainer_error: BaseException | None = None
        self._trainer_done = threading.Event()

    def run(self, connect_s: float) -> dict[str, Any]:
        """Start everything, wait for the end, clean up. `connect_s` is only reported."""
        import ray

        from elastic.cluster.actors import HostActor
        from elastic.cluster.autoscaler import node_types
        from elastic.cluster.capacity import awaited, check_fits, choose_accelerator
        from elastic.cluster.embedded import node_resources
        from elastic.run.host import RunHost, host_settings, keeper_options, new_token

        run, scaling = self._run, self._run.config.scaling
        there = node_resources()
        nodes = [*there, *node_types()]
        accelerator = choose_accelerator(scaling.accelerator, nodes)
        check_fits(scaling.accelerator, accelerator, scaling.workers_per_node, scaling.cpus_per_worker, nodes)
        self._awaited = awaited(accelerator, there)
        token = new_token()
        node_id = ray.get_runtime_context().get_node_id()
        settings = replace(host_settings(run.config, token, ray.util.get_node_ip_address()), port=_free_port())
        self._still_s = settings.hang_s or STILL_S
        options = keeper_options(run, self._epoch, ray_job_id=ray.get_runtime_context().get_job_id())
        detail = {
            "name": run.name,
            "accelerator": accelerator,
            "cluster_s": round(connect_s, 3),
            "changed_code": run.changed_code or None,
        }
        if self._control is not None:
            return self._host_here(RunHost(run.folder.storage.url, options, settings), detail, token, accelerator)
        host_class: Any = ray.remote(num_cpus=0, max_restarts=-1, label_selector={"ray.io/node-id": node_id})(HostActor)
        self._new_host = partial(host_class.remote, run.folder.storage.url, options)
        self._host_settings, self._host_detail = settings, detail
        self._host = self._new_host(settings, detail)
        try:
            url = ray.get(self._host.url.remote(), timeout=START_TIMEOUT_S)
            link, look_s = DriverLink(url, token), max(1.0, settings.limits.lease_s / 3 / LOOKS)
            with Lookout("host-lookout", look_s, partial(host_answers, link), self._replace_host):
                return self._serve(url, token, accelerator, self._stop_host)
        finally:
            ray.kill(self._host)

    def _stop_host(self) -> None:
        import ray

        ray.get(self._host.stop.remote(), timeout=END_TIMEOUT_S)

    def _replace_host(self, still_s: float) -> None:
        """End the host, which stands still, and start another one at the same address."""
        import ray

        if self._ended.is_set():
            return
        ray.kill(self._host)
        settings = replace(self._host_settings, restarted=True)
        detail = {**self._host_detail, "why": f"the host of the run did not answer for {still_s:.0f} s and was ended"}
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            self._host = self._new_host(settings, detail)
            try:
                ray.get(self._host.url.remote(), timeout=START_TIMEOUT_S)
                return
            except ray.exceptions.RayError as error:  # its address may not be free yet
                ray.kill(self._host)
                if time.monotonic() > deadline:
                    self._fail(f"{detail['why']}, and another one did not start: {one_line(error)}")
                    return
                time.sleep(AGAIN_S)

    def _fail(self, message: str) -> None:
        self._end = {"status": "failed", "message": message}
        self._ended.set()

    def _host_here(self, host: RunHost, detail: dict[str, Any], token: str, accelerator: str) -> dict[str, Any]:
        assert self._control is not None
        url = host.start(detail)
        self._control.attach(DriverLink(url, token))
        try:
            return self._serve(url, token, accelerator, host.stop)
        finally:
            self._control.attach(None)

    def _serve(self, url: str, token: str, accelerator: str, stop_host: Callable[[], None]) -> dict[str, Any]:
        """With the host at `url`: train, and follow its records."""
        self._link = DriverLink(url, token)
        if self._run.changed_code:
            self._console.say("warning: the job's code is not the code this run was started with")
        follower = threading.Thread(target=self._follow, name="run-follower", daemon=True)
        follower.start()
        try:
            with heard_by(self._hear):
                return self._train(url, token, accelerator)
        finally:
            stop_host()
            follower.join(END_TIMEOUT_S)

    def _train(self, url: str, token: str, accelerator: str) -> dict[str, Any]:
        from elastic.cluster.actors import training_function
        from elastic.cluster.capacity import worker_resources
        from elastic.cluster.placement_groups import GroupPlan
        from elastic.cluster.raytrain import RayTrainer, placement_group_name, remove_placement_groups
        from elastic.cluster.sharing import Terms
        from elastic.cluster.standings import withdraw_standing
        from elastic.compat.ray import session_folder
        from elastic.worker.run import WorkerRun

        run = self._run
        worker_run = WorkerRun(run.job, run.config, run.plan, run.digest, run.folder.storage.url, url, token)
        scaling, prefix = run.config.scaling, placement_group_name(run.name)
        self._unit = unit = worker_resources(accelerator, scaling.cpus_per_worker)
        patience_s = parse_amount("--scaling.request-timeout", scaling.request_timeout, clock=True).seconds
        terms = Terms(run.name, scaling.priority, time.time(), accelerator, scaling.min_workers, patience_s)
        vaults = run.plan.snapshot_every is not None
        plan = GroupPlan(
            url,
            token,
            scaling.max_workers,
            scaling.spares,
            run.plan.microbatches,
            unit,
            prefix,
            terms,
            scaling.workers_per_node,
            scaling.exclude,
            packed=run.config.parallel.strategy == "hsdp",
            vaults=vaults,
            still_s=self._still_s,
        )
        want = plan.want(scaling.max_workers)
        function = training_function(worker_run, accelerator, prefix if vaults else None)
        fewer = want < scaling.max_workers + scaling.spares
        why = "; more would not lower the rounds of a step" if fewer else ""
        self._console.say(f"starting {want} workers on {accelerator}{why}")
        if self._awaited:
            self._ask(Note("notice", f"waiting for {self._awaited}"))
        try:
            tries = 0  # one after the other whose workers formed no world
            while tries < MOST_CONTROLLERS:
                self._formed_since.clear()
                markers = tempfile.mkdtemp(prefix="elastic-", dir=session_folder())
                trainer = RayTrainer(
                    function,
                    name=run.name,
                    storage_path=markers,
                    plan=plan,
                    accelerator=accelerator,
                    here=self._control is not None,
                )
                try:
                    if self._train_with(trainer):
                        return self._outcome()
                finally:
                    remove_placement_groups(prefix)
                    shutil.rmtree(markers, ignore_errors=True)
                tries = 0 if self._formed_since.is_set() else tries + 1
                with contextlib.suppress(OSError):  # the host is gone too, and the follower says so
                    self._ask(Note("controller_restarted", {"why": self._controller_lost}))
            self._close(
                "failed",
                f"{self._controller_lost}, {tries} times before a first step; give {run.again} to go on from "
                "the newest checkpoint",
            )
            self._ended.wait(END_TIMEOUT_S)
            return self._outcome()
        finally:
            withdraw_standing(run.name)

    def _train_with(self, trainer: Any) -> bool:
        """Returns whether the run ended; else its controller did, and the workers with it."""
        self._trainer_error, self._trainer_done, self._controller_lost = None, threading.Event(), ""
        give_up = partial(self._give_up_controller, trainer)
        thread = threading.Thread(target=self._run_trainer, args=(trainer,), name="ray-trainer", daemon=True)
        thread.start()
        try:
            with Lookout("controller-lookout", self._still_s / LOOKS, trainer.answers, give_up):
                return self._await_end(trainer)
        finally:
            if thread.is_alive():
                trainer.abort(0.0 if self._controller_lost else END_TIMEOUT_S)
            thread.join(END_TIMEOUT_S)

    def _give_up_controller(self, trainer: Any, still_s: float) -> None:
        """The controller stands still. Its workers, and their places, are its own: Ray ends them with it, whoever takes
        its place. They train on without it, so first they save what they have."""
        if self._controller_lost or self._ended.is_set():
            return
        self._controller_lost = f"the controller of its workers did not answer for {still_s:.0f} s and was ended"
        if self._formed.is_set():
            self._saved.clear()
            self._ask(Wish("save", self._controller_lost))
            deadline = time.monotonic() + SAVE_S
            while not self._ended.is_set() and not self._saved.wait(0.1) and time.monotonic() < deadline:
                pass
        trainer.kill()

    def _run_trainer(self, trainer: Any) -> None:
        try:
            trainer.run()
        except BaseException as error:  # the main thread turns it into the run's failure
            self._trainer_error = error
        finally:
            self._trainer_done.set()

    def _await_end(self, trainer: Any) -> bool:
        """Returns whether the run ended; False where its controller did."""
        asked, looked = 0, time.monotonic()
        trainer_ended_at: float | None = None
        while not self._ended.wait(0.1):
            if self._signals > asked:
                asked = self._signals
                self._on_signal(asked)
            if self._trainer_done.is_set() and trainer_ended_at is None:
                trainer_ended_at = time.monotonic()
                if self._trainer_error is not None and _controller_died(self._trainer_error):
                    self._controller_lost = (
                        self._controller_lost or "the controller of its workers died, and they with it"
                    )
                    return False
                if self._trainer_error is not None:
                    self._close("failed", f"the workers failed: {self._trainer_error}")
            if not self._formed.is_set() and time.monotonic() - looked > AUTOSCALER_LOOK_S:
                looked = time.monotonic()
                self._tell_of_autoscaler()
            if trainer_ended_at is not None and time.monotonic() - trainer_ended_at > END_TIMEOUT_S:
                raise RunFailed(f"the workers of run {self._run.name} ended, but no result came")
        return True

    def _tell_of_autoscaler(self) -> None:
        """While workers are waited for: say why no node comes, once."""
        import ray

        from elastic.cluster.autoscaler import failures, known_reasons, reported, unserved
        from elastic.compat.ray import session_folder

        try:
            told = reported(ray.get_runtime_context().gcs_address)
            found = [*failures(told, known_reasons(session_folder())), *unserved(told, self._unit)]
        except (ray.exceptions.RayError, RuntimeError) as error:
            found = [f"the cluster's head does not say what its autoscaler does: {one_line(error)}"]
        for line in found:
            if line not in self._said:
                self._said.add(line)
                self._ask(Note("notice", f"the cluster's autoscaler: {line}"))

    def _hear(self, name: str) -> None:
        self._signals += 1
        self._signal_name = name

    def _on_signal(self, count: int) -> None:
        if count > 1:
            self._close("stopped", "interrupted twice, nothing saved since the newest checkpoint")
        elif not self._formed.is_set():
            self._close("stopped", f"interrupted by {self._signal_name} before the first step")
        else:
            self._ask(Wish("stop", f"interrupted by {self._signal_name}"))
            self._console.say(f"{self._signal_name}: saving and ending; once more ends at once")

    def _close(self, status: Literal["stopped", "failed"], message: str) -> None:
        self._ask(Close(status, message))

    def _ask(self, request: Request) -> None:
        self._link.request(request, patience_s=HOST_LOST_S)  # it may just be started again

    def _outcome(self) -> dict[str, Any]:
        assert self._end is not None
        status, message = self._end["status"], self._end["message"]
        if status in ("failed", "fenced"):
            raise RunFailed(f"run {self._run.name} {status}: {message}")
        if self._signals and status == "stopped":
            raise Interrupted(f"run {self._run.name} was {message}; give {self._run.again} to go on")
        return self._end["result"]

    def _follow(self) -> None:
        show = outlived(self._console.record)
        tell = outlived(self._control.on_record) if self._control is not None else None

        def on_record(record: dict[str, Any]) -> None:
            kind = record.get("kind")
            if kind == "world_formed":
                self._formed.set()
                self._formed_since.set()
            elif kind == "checkpoint_committed":
                self._saved.set()
            show(record)
            if tell is not None:
                tell(record)
            if kind == "end":
                self._end = record
                self._ended.set()

        if not self._link.follow_to_the_end(on_record, self._ended, HOST_LOST_S):
            self._fail("the host of the run is gone and did not come back")


def _controller_died(error: BaseException) -> bool:
    import ray

    return isinstance(error, ray.exceptions.RayActorError)


def _free_port() -> int:
    """A port that is free now: the host listens on it again when it is restarted."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
