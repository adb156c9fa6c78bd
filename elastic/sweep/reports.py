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

from elastic.storage import Storage
from elastic.sweep.space import Space
from elastic.tools.sweeps import TrialRecord, better

TABLE = "trials.csv"
_MOST_CURVES = 30


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


def write_plots(storage: Storage, trials: Sequence[TrialRecord], space: Space, metric: str, mode: str) -> str | None:
    """`objective.png`, `curves.png` and `slices.png`; returns why there are none, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no plots: matplotlib is not installed (pip install 'elastic-train[sweep]')"

    def save(name: str, figure: Any) -> None:
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out)
        storage.replace(name, out.getvalue())

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _objective(figure.subplots(), trials, metric, mode)
    save("objective.png", figure)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _curves(figure.subplots(), trials, metric)
    save("curves.png", figure)
    names = list(space)
    figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        _slice(axes, trials, name, metric, log=space[name].kind == "loguniform")
    save("slices.png", figure)
    return None


def _objective(axes: Any, trials: Sequence[TrialRecord], metric: str, mode: str) -> None:
    """Every report over time, and the best so far."""
    told = sorted((r["time"], r["metrics"].get(metric)) for t in trials for r in t.reports if _is(r, metric))
    if not told:
        return
    began, best = told[0][0], None
    line = []
    for at, value in told:
        best = better(best, value, mode)
        line.append((at - began, best))
    axes.scatter([at - began for at, _ in told], [v for _, v in told], s=10, alpha=0.5, label="reports")
    axes.step(*zip(*line), where="post", label="best so far")
    axes.set(xlabel="seconds", ylabel=metric, title="objective over time")
    axes.legend()


def _curves(axes: Any, trials: Sequence[TrialRecord], metric: str) -> None:
    """The metric of each trial over its steps; the best trials are drawn last."""
    for trial in reversed(trials[:_MOST_CURVES]):
        points = [(r["step"], r["metrics"][metric]) for r in trial.reports if _is(r, metric)]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, label=trial.run, alpha=0.8)
    axes.set(xlabel="step", ylabel=metric, title="learning curves")


def _slice(axes: Any, trials: Sequence[TrialRecord], name: str, metric: str, *, log: bool) -> None:
    """The metric over the values of one option; darker trials went further."""
    points = [(t.options[name], t.value, t.step) for t in trials if t.value is not None and not math.isnan(t.value)]
    if points:
        values, scores, steps = zip(*points)
        words = any(not isinstance(v, (int, float)) or isinstance(v, bool) for v in values)
        axes.scatter([str(v) for v in values] if words else values, scores, c=steps, cmap="viridis_r", s=24)
    if log:
        axes.set_xscale("log")
    axes.set(xlabel=name, ylabel=metric)


def _is(report: dict[str, Any], metric: str) -> bool:
    value = report["metrics"].get(metric)
    return value is not None and not math.isnan(value)
