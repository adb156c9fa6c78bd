"""Loading a trained model into Python: `elastic.load_model(job, "runs/mine")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from elastic.checkpoint.loader import check_objects, load
from elastic.checkpoint.reader import read_manifest
from elastic.config import ParallelOptions, TrainConfig, from_dict
from elastic.errors import ConfigError
from elastic.job import Job, set_plan
from elastic.parallel.wrapping import move
from elastic.run.folder import RunFolder
from elastic.run.plan import resolve
from elastic.run.prepare import stored_config
from elastic.run.resuming import take
from elastic.seeds import derive, seed_all, seed_job, unseeded
from elastic.tools.places import find_run
from elastic.tools.target import choose, open_run
from elastic.worker.belongings import frozen_of
from elastic.worker.placing import Placing
from elastic.worker.state import TrainState

WEIGHTS = "model/"


def load_model(
    job: Job | type[Job], run: str, *, step: int | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The job's model with the weights of a run, in eval mode.

    Weights are the persistent parameters and buffers, the same that `elastic checkpoints export` writes. Random
    generators are left as they were.

    Args:
        job: an instance, or the class, which is then created with the options of the run.
        run: folder or URL of the run, or the name of one in ./runs.
        step: step of the checkpoint; the newest by default.

    Raises:
        ConfigError: there is no such run or checkpoint.
        CheckpointError: the checkpoint is damaged, or the model of this job has other tensors.
    """
    folder = open_run(find_run(run), read_only=True)
    stored = stored_run(folder)
    with unseeded():
        if isinstance(job, type):
            seed_job()
            job = job(**take(stored, TrainConfig(), job).job_values)
        tell_plan(job, stored)
        state = _new_state(job, from_dict(stored["config"]), torch.device(device))
        checkpoint = choose(folder.storage, step)
        manifest = read_manifest(folder.storage, checkpoint)
        weights = {name: entry for name, entry in manifest.tensors.items() if name.startswith(WEIGHTS)}
        alone = replace(manifest, tensors=weights)
        check_objects(folder.storage, checkpoint.folder, alone)
        load(folder.storage, checkpoint.folder, alone, state.destinations(weights, {"weights_only": True}))
    return state.model.eval()


def load_state(
    job: Job, config: TrainConfig, folder: RunFolder, step: int | None, device: torch.device
) -> tuple[TrainState, int]:
    """The whole training state of a run in this process, including the job's own extra state, and its step.

    Raises:
        ConfigError: there is no such checkpoint.
        CheckpointError: the checkpoint is damaged, or the job has another state.
    """
    state = _new_state(job, config, device)
    checkpoint = choose(folder.storage, step)
    manifest = read_manifest(folder.storage, checkpoint)
    check_objects(folder.storage, checkpoint.folder, manifest)
    shards = state.destinations(manifest.tensors, manifest.values)
    load(folder.storage, checkpoint.folder, manifest, shards)
    state.load_values(manifest.values)
    return state, manifest.step


def stored_run(folder: RunFolder) -> dict[str, Any]:
    """The stored configuration of a run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    stored = stored_config(folder)
    if stored is None:
        raise ConfigError(f"RUN is {folder.storage.url!r}, where there is no run; give the folder of one")
    return stored


def tell_plan(job: Job, stored: Mapping[str, Any]) -> None:
    """Let a job know how long its run is, where its configuration says how many samples it has."""
    if "data" in stored:
        config, samples = from_dict(stored["config"]), stored["data"]["samples"]
        set_plan(job, resolve(config, dataset_size=samples, tokens_per_sample=job.tokens_per_sample).for_job)


def _new_state(job: Job, config: TrainConfig, device: torch.device) -> TrainState:
    plain = replace(config, parallel=ParallelOptions(blocks=config.parallel.blocks), recovery=TrainConfig().recovery)
    seed_all(derive("frozen", config.run.seed))
    for model in frozen_of(job).values():
        move(model, device)
    placing = Placing(job, plain, device)
    placing.warm_up()
    return placing.whole()
