"""What a sweep leaves for people beside its records: a table, plots, and TensorBoard's table of hyperparameters."""

from __future__ import annotations

import csv
import io
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.errors import ConfigError
from elastic.storage import Storage
from elastic.sweep.space import Space
from elastic.tools.sweep_pictures import sweep_pictures
from elastic.tools.sweeps import TrialRecord

TABLE = "trials.csv"


def write_table(storage: Storage, trials: Sequence[TrialRecord], names: Sequence[str], metric: str) -> None:
    """`trials.csv`: a line a trial, the best first."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(
        [
            "rank",
            "trial",
            "status",
            "step",
            "evaluations",
            metric,
            f"best {metric}",
            *names,
            "seconds",
            "cost",
            "weights_sha256",
        ]
    )
    for rank, t in enumerate(trials, start=1):
        options = [t.options.get(name) for name in names]
        writer.writerow(
            [
                rank,
                t.run,
                t.status,
                t.step,
                t.evaluations,
                t.value,
                t.best,
                *options,
                t.seconds,
                t.cost,
                t.weights_sha256,
            ]
        )
    storage.replace(TABLE, out.getvalue().encode())


def write_tensorboard(storage: Storage, trials: Sequence[TrialRecord], names: Sequence[str], metric: str) -> None:
    """`tensorboard/`: each trial's hyperparameters and its curve of the metric."""
    from tensorboardX import SummaryWriter

    folder = Path(tempfile.mkdtemp(prefix="elastic-tensorboard-"))
    try:
        with SummaryWriter(str(folder)) as writer:
            for trial in trials:
                hparams = {name: _plain(trial.options.get(name)) for name in names}
                value = trial.value if trial.value is not None else math.nan
                writer.add_hparams(hparams, {metric: value}, name=trial.run, global_step=trial.step)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                storage.upload(f"tensorboard/{file.relative_to(folder).as_posix()}", str(file))
    finally:
        shutil.rmtree(folder)


def _plain(value: Any) -> Any:
    return str(value) if value is None else value


def write_plots(
    storage: Storage, name: str, trials: Sequence[TrialRecord], space: Space, metric: str, mode: str
) -> str | None:
    """`objective.png`, `curves.png`, `slices.png` and `importance.png`; returns why there are none, where matplotlib is
    not installed. `trials`: the best first."""
    try:
        pictures = sweep_pictures(name, trials, {n: str(domain) for n, domain in space.items()}, metric, mode)
    except ConfigError as error:
        return f"no plots: {error}"
    for file, draw in pictures.items():
        storage.replace(file, draw())
    return None
