"""Gets a worker ready: device, data and model, before it asks for a world."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from typing import Any

from elastic.checkpoint.uploader_client import HANG_TIMEOUT_S
from elastic.config import result_options
from elastic.data.fetching import Fetcher, Order
from elastic.data.identity import identify
from elastic.data.loader import Loader
from elastic.data.memory import Remembered, look
from elastic.data.preparing import prepare_node, timeout_s
from elastic.data.samplers import positions_to_ids, signs
from elastic.data.samples import nested_datasets
from elastic.errors import ElasticError, RunFailed, WarmUpError, whole_text
from elastic.job import set_plan
from elastic.job_data import eval_sets
from elastic.job_options import job_options
from elastic.likeness import digest_of
from elastic.membership.client import WorkerLink
from elastic.membership.stage import Position, Stage
from elastic.parallel.device import describe, pick_device, prepare_process
from elastic.parallel.wrapping import move
from elastic.seeds import derive, seed_all
from elastic.storage import Storage
from elastic.units import parse_amount
from elastic.worker.alone import begin_loader, wants_process_group
from elastic.worker.attributes import JobAttributes
from elastic.worker.belongings import frozen_of, models_of, movable
from elastic.worker.comeback import check_comes_back
from elastic.worker.description import (
    comparable,
    describe_frozen,
    describe_held,
    describe_model,
    describe_optimizer,
    describe_options,
    describe_worker,
)
from elastic.worker.group import backend_of
from elastic.worker.linking import link_of
from elastic.worker.placing import Placing
from elastic.worker.provenance import Provenance
from elastic.worker.rehearsal import SEPARATE, Rehearsal
from elastic.worker.run import Identity, WorkerRun
from elastic.worker.saving import Saving
from elastic.worker.snapshots import Snapshots
from elastic.worker.step import Stepper
from elastic.worker.unsaved import Watch
from elastic.worker.user_code import UserCode, UserCodeError
from elastic.worker.worker import Holding, Worker


def warm_up(run: WorkerRun, identity: Identity, *, import_s: float = 0.0) -> Worker:
    """A worker whose device, data and model are ready.

    Args:
        import_s: seconds that the imports took, which are only recorded.

    Raises:
        WarmUpError: it cannot get ready; the membership server was told why.
    """
    began = time.monotonic()
    bitwise = run.config.run.exactness == "bitwise"
    prepare_process(bitwise=bitwise, threads=run.config.scaling.cpus_per_worker)
    device = pick_device(identity.accelerator, identity.local_index)
    backend_of(device).prepare(identity.host)
    link = link_of(run, identity)
    try:
        worker = _WarmUp(run, identity, link, device).worker()
    except (Exception, SystemExit) as error:
        sentence = wants_process_group(error)
        gap = " " if sentence is not None or isinstance(error, ElasticError) else "\n"
        message = f"worker {identity.id} could not get ready:{gap}{sentence or whole_text(error)}"
        link.unfit(message)
        link.close()
        raise WarmUpError(message) from error
    link.show_place(lambda: (worker.code.where, worker.loader.waits_for()))
    worker.warm_s = round(time.monotonic() - began + import_s, 3)
    worker.warm_parts = {"import_s": round(import_s, 3), **worker.warm_parts, **_node()}
    return worker


def _node() -> dict[str, str]:
    """The type and market of this worker's node, for its price, from environment variables set by what starts nodes."""
    known = os.environ
    node_type = known.get("ELASTIC_NODE_TYPE") or known.get("RAY_CLOUD_INSTANCE_TYPE_NAME")  # Ray's autoscaler sets it
    given = {"node_type": node_type, "market": known.get("ELASTIC_NODE_MARKET")}
    return {name: value for name, value in given.items() if value}


class _WarmUp:
    """The parts of the warm-up."""

    def __init__(self, run: WorkerRun, identity: Identity, link: WorkerLink, device: Any):
        self._run, self._identity, self._link, self._device = run, identity, link, device
        self._job, self._config, self._plan = run.job, run.config, run.plan
        self._bitwise = run.config.run.exactness == "bitwise"
        self._holding = Holding()

    def worker(self) -> Worker:
        """Create the worker with all its parts."""
        job, config, plan, seed = self._job, self._config, self._plan, self._config.run.seed
        began = time.monotonic()
        set_plan(job, plan.for_job)
        storage = Storage(self._run.folder_url)
        code = UserCode(job, self._device, self._identity.id, autocast=config.precision.autocast)
        snapshots = Snapshots(plan.snapshot_every, self._identity.vault, self._run.token, self._link, self._device)
        prepare_node(job, self._run.prepared, timeout_s=timeout_s(config), say=self._say_waiting)
        seed_all(derive("frozen", seed))
        frozen = frozen_of(job)
        lines = {"frozen()": describe_frozen(frozen)}
        held = {name: model for name, model in models_of(job).items() if not any(model is f for f in frozen.values())}
        for model in [*held.values(), *frozen.values()]:
            move(model, self._device)
        options = result_options(config, job_options(job))
        lines |= {"configuration": describe_options(options), "models of the job": describe_held(held)}
        seed_all(derive("data", seed))  # so that a random split is equal on all workers, and matches eval_data()
        data = job.train_data()
        self._check_length(len(data))
        seed_all(derive("data", seed))
        held_out = eval_sets(job)
        order = Order(
            seed=seed,
            dataset_size=plan.dataset_size,
            global_size=plan.global_size,
            microbatches=plan.microbatches,
            ids=positions_to_ids(job, data, plan.for_job),
            cycle=plan.cycle,
        )
        loader = Loader(
            Fetcher(data, job.collate_fn, seed, plan.dataset_size, by_position=order.own),
            order,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            total_steps=plan.total_steps,
            on_restart=self._report_restart,
            begin=begin_loader,
        )
        remembered = self._remembered(loader, data)
        trained = identify(data) | {"order": signs(order.ids, plan.for_job), "seed": seed}
        of_data = {f"eval_data() {name}".rstrip(): identify(d, some=0) for name, d in held_out.items()}
        watch = Watch([data, *held_out.values()], self._warn_of_unsaved, exact=config.run.exactness == "bitwise")
        changing = JobAttributes(job, {"train_data()": data} | {f"eval_data() {n}": d for n, d in held_out.items()})
        data_s = time.monotonic() - began
        placing = Placing(job, config, self._device, changing)
        placing.warm_up(lambda: next((batch for _, batch in loader.first_batches(1)), None))
        lines["model"] = describe_model(placing.model)
        with_moments = 3 * sum(p.nbytes for p in placing.model.parameters())  # Adam's; others allocate more at a save
        provenance = Provenance(
            exact=self._bitwise,
            device=describe(self._device),  # includes settings that the job has made by now
            data=trained,
            options=comparable(options),
            remembered=remembered,
            held=digest_of([*lines["models of the job"], *lines["frozen()"]]),
            allowed=config.run.allow_change,
        )
        changing.changed, changing.warn = loader.changed, partial(self._warn_of_data, provenance)
        if not config.parallel.sharded:
            self._holding.state = state = placing.whole()
            lines["optimizer"] = describe_optimizer(state.optimizer)
            check_comes_back(state)
        stepper = Stepper(self._run, code, loader, self._link, changing)
        lines["loader"] = [f"passes of {'one microbatch' if stepper.one_each else 'any number of microbatches'}"]
        saving = Saving(
            storage,
            self._link,
            self._device,
            seed=seed,
            config_digest=self._run.digest,
            when_busy=config.checkpoint.when_busy,
            on_wait=self._report_waiting,
            made=provenance.header,
            hang_timeout_s=self._hang_timeout_s(),
        )
        saving.saver.reserve(with_moments // config.scaling.max_workers)
        worker = Worker(
            self._run,
            self._device,
            self._link,
            code,
            storage,
            placing,
            loader,
            held_out,
            stepper,
            saving,
            snapshots,
            Rehearsal(job, config, code, loader, held_out, eval_size=plan.eval_size, phases=plan.cycle.order()),
            provenance,
            watch,
            self._holding,
        )
        timings = {"data_s": round(data_s, 3), "model_s": round(time.monotonic() - began - data_s, 3)}
        worker.warm_parts = timings | self._rehearse(worker)
        lines |= worker.rehearsal.metrics if self._holding.state is not None else {}
        description = describe_worker({"train_data()": trained, **of_data}, **lines)
        device = json.dumps(describe(self._device), sort_keys=True)
        self._link.member = replace(self._link.member, says=description, device=device)
        return worker

    def _rehearse(self, worker: Worker) -> dict[str, Any]:
        """Try the job on a whole model; returns what to record. A sharded one is tried in its first world."""
        notes: dict[str, Any] = {}
        if (state := self._holding.state) is not None:
            began = time.monotonic()
            try:
                worker.rehearse(None)
            except UserCodeError as error:
                if not worker.placing.build_whole(error.__cause__):
                    raise
                self._holding.state = worker.with_memory(state)
                worker.rehearse(None)
            notes["rehearsal_s"] = round(time.monotonic() - began, 3)
        if worker.rehearsal.flops_per_sample:
            notes["flops_per_sample"] = worker.rehearsal.flops_per_sample
        if worker.rehearsal.separate:
            notes["passes"] = f"of one microbatch each: {SEPARATE[worker.rehearsal.separate]}"
        elif worker.stepper.one_each and not self._bitwise:
            notes["passes"] = "of one microbatch each: random numbers are drawn for whole batches of samples"
        return {**notes, "built_whole": worker.placing.eager} if worker.placing.eager else notes

    def _remembered(self, loader: Loader, data: Any) -> Remembered:
        """Whether samples depend on which others this worker has fetched before."""
        here = loader.here()
        held = {"train_data()": here.data} | {
            f"a {type(p).__qualname__} in train_data()": p for p in nested_datasets(here.data)[1:]
        }
        return look(here, loader.order.span(0, 0, 1), lambda: movable(held))

    def _hang_timeout_s(self) -> float:
        """How long a helper process may hang: as long as a worker, if that is configured."""
        given = self._config.recovery.hang_timeout
        return HANG_TIMEOUT_S if given == "auto" else parse_amount("--recovery.hang-timeout", given, clock=True).seconds

    def _check_length(self, samples: int) -> None:
        if samples != self._plan.dataset_size:
            raise RunFailed(
                f"train_data() has {samples} samples on node {self._link.member.node}, but {self._plan.dataset_size} "
                "where the run was started; give every node the same data"
            )

    def _say_waiting(self, sentence: str) -> None:
        self._link.event("notice", self._holding.applied, f"worker {self._identity.id} {sentence}")

    def _warn_of_unsaved(self, sentence: str) -> None:
        self._link.event("unsaved_numbers", self._holding.applied, sentence)

    def _warn_of_data(self, provenance: Provenance, sentence: str) -> None:
        provenance.lose(sentence)
        self._warn_of_unsaved(sentence)

    def _report_restart(self, what: str) -> None:
        self._link.event("loader_restarted", self._holding.applied + 1, what)

    def _report_waiting(self, seconds: int) -> None:
        self._link.progress(Position(self._holding.applied - 1, Stage.CHECKPOINT, seconds))
