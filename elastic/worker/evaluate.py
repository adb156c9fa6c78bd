"""Evaluation on held-out data: dealt and summed like a training step, so that its figures are as exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

from elastic.compat.torch import version_of
from elastic.data.deal import deal
from elastic.data.fetching import ItemError
from elastic.data.samples import fetch_each, fetches_together
from elastic.errors import ConfigError
from elastic.job import Job, MapDataset
from elastic.parallel import modes
from elastic.parallel.records import Metrics, Records
from elastic.parallel.wrapping import local
from elastic.seeds import derive, seed_all
from elastic.worker.belongings import digest
from elastic.worker.group import Group
from elastic.worker.trials import listed
from elastic.worker.user_code import UserCode


def evaluate(
    job: Job,
    model: nn.Module,
    name: str,
    data: MapDataset,
    group: Group | None,
    code: UserCode,
    *,
    size: int,
    seed: int,
    device: torch.device,
    each: Callable[[], AbstractContextManager[None]],
    on_pass: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluate one held-out set, together with all members of the world.

    Args:
        name: of the set; "" for a set without a name.
        group: that of the world; None if this process is alone.
        size: the number of samples in one forward pass. How the set is cut does not depend on the world.
        seed: of the run.
        each: entered around each pass.
        on_pass: called after each pass.

    Returns:
        `eval/loss` and `eval/<metric>`, or `eval/<name>/...` for a named set: means over the set.

    Raises:
        ConfigError: on every rank: all weights are 0, or the metrics of two passes have different names.
        UserCodeError: the job's code raised, or returned a wrong value.
    """
    parts = [range(i, min(i + size, len(data))) for i in range(0, len(data), size)]
    cells = 1 if group is None else group.layout.cells
    # Too few passes to give one to every cell: every worker runs all of them, and nothing is gathered.
    if group is None or len(parts) < cells:
        runs, rank = [range(len(parts))], 0
    else:
        assert group.place is not None, "a spare evaluates nothing"
        runs, rank = deal(len(parts), cells), group.mesh.cell
    cut = group is not None and group.layout.shards > 1
    padding = max(map(len, runs)) - len(runs[rank]) if cut else 0
    records = Records(runs, rank, device, metrics=Metrics("evaluate()"))
    if group is not None:
        records.check = group.check
    kept = modes.of(model)
    model.eval()
    try:
        with torch.no_grad():
            for index in [*runs[rank], *([runs[rank][-1]] * padding)]:
                code.samples = ids = list(parts[index])
                batch = code.guard(partial(held_out_batch, job, data, ids, (seed, name, index)), alone=True)
                seed_all(derive("eval", seed, name, index))
                with each():
                    loss, weight, metrics = code.evaluate(model, batch, name)
                on_pass()
                if padding and len(records) == len(runs[rank]):
                    continue  # a padding pass: others of the row still gather parameters
                digest = xxhash.xxh3_64_intdigest(np.asarray(ids, "<i8").tobytes()) >> 1
                records.add(loss, weight, metrics, (digest,))
    finally:
        modes.restore(model, kept)
    if group is None:
        record = records.gather(None).result()
    else:
        with group.collective("gathering the evaluation"):
            record = records.gather(group.mesh.one_of_each_cell).result()
        group.check()
    if record.weight == 0:
        which = f"eval_data()[{name!r}]" if name else "eval_data()"
        raise ConfigError(
            f"all weights that evaluate() returned for {which} are 0, so its means are undefined; return the number of "
            "samples or tokens"
        )
    found = {"loss": record.loss, **record.mean_metrics()}
    found |= code.evaluated(name, record.loss_sum, record.weight, record.metrics)
    return dict(zip(figures(name, found), found.values()))


class Parameters:
    """Parameters as they are before an evaluation, which is to leave them as they are."""

    def __init__(self, model: nn.Module, *, exact: bool):
        self._cut = any(isinstance(p, DTensor) for p in model.parameters())
        self._versions = {name: (p, _versions(p)) for name, p in model.named_parameters()}
        self._digests = {name: digest(p) for name, (p, _) in self._versions.items()} if exact else {}

    def check(self) -> None:
        """
        Raises:
            ConfigError: one is other than it was (bitwise), or was written to where the job's code saw it as it had
                been gathered before (a model that is cut).
        """
        written = [name for name, (p, was) in self._versions.items() if _versions(p) != was]
        if self._cut and written:
            raise ConfigError(
                f"evaluate() changes parameters ({listed(written)}) of a model that is cut over the workers, and "
                "computes with what was gathered before; keep averages in a model of their own, or use "
                "--parallel.strategy ddp"
            )
        changed = [name for name, was in self._digests.items() if digest(self._versions[name][0]) != was]
        if changed:
            raise ConfigError(
                f"evaluate() leaves parameters ({listed(changed)}) other than they were, so the bits of the run depend "
                "on how often it is called; put them back from copies, or use --run.exactness fast"
            )


def _versions(p: torch.Tensor) -> tuple[int, int]:
    """Writes to a DTensor move its own counter, those to what it holds the other."""
    return version_of(p), version_of(local(p))


def figures(name: str, metrics: Iterable[str]) -> list[str]:
    """Return the names of the figures of a held-out set."""
    return [f"eval/{name}/{metric}" if name else f"eval/{metric}" for metric in metrics]


def held_out_batch(job: Job, data: MapDataset, ids: list[int], key: tuple[int | str, ...]) -> Any:
    """Read and collate a batch of held-out samples.

    Args:
        ids: indices of the samples.
        key: (seed of the run, name of the set, index of the batch). Each sample is read under a seed of its own;
            samples that are read together, and collate_fn, get seeds of the batch.

    Raises:
        ItemError: the dataset or collate_fn raised.
    """
    at = ids

    def seed(place: int) -> int:  # called right before a sample is read
        nonlocal at
        at = ids[place : place + 1]
        return derive("eval-item", *key[:2], ids[place])

    try:
        if fetches_together(data):
            seed_all(derive("eval-items", *key))
            return job.collate_fn(data.__getitems__(ids))  # type: ignore[attr-defined]
        samples = fetch_each(data, ids, seed)
        at = ids
        seed_all(derive("eval-collate", *key))
        return job.collate_fn(samples)
    except (Exception, SystemExit) as error:
        raise ItemError.of(error, at) from error
