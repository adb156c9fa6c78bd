"""Pictures of a sweep, also while it runs: the objective over time, the trials' curves, the metric over each option,
and how much each option matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic.tools.pictures import (
    GRID,
    INK,
    LOSS,
    MUTED,
    PAPER,
    TONES,
    figure_of,
    matplotlib_figure,
    png_of,
    short,
    titled,
)
from elastic.tools.sweeps import TrialRecord, better

_NAMED = ("#2457d6", "#e39b17", "#16a37f", "#8b62e0", "#0aa2c0")  # colours of the best trials, which have a legend
_OTHERS = "#b9c0cb"
_MOST_GROUPS = 4  # groups of an option's values whose ranks are compared
_LEAST_TRIALS = 4
_OUT = 1.5  # in spans of the middle half of all values: what is farther away does not set the scale


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curve_of(trial: TrialRecord, metric: str) -> list[tuple[int, float]]:
    """Return the step and value of each report that has the metric."""
    found = [(r["step"], r["metrics"].get(metric)) for r in trial.reports]
    return [(step, value) for step, value in found if is_number(value)]


def scale(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the range that an axis should show: all values but outliers; None without values. Pure."""
    ordered = sorted(v for v in values if is_number(v))
    if not ordered:
        return None
    quarter, three = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    reach = _OUT * (three - quarter) or abs(ordered[-1]) * 0.05 or 1.0
    low, high = max(ordered[0], quarter - reach), min(ordered[-1], three + reach)
    margin = 0.06 * (high - low) or reach
    return low - margin, high + margin


def importance(trials: Sequence[TrialRecord], names: Sequence[str]) -> dict[str, float] | None:
    """Return how much of the trials' order each option explains, from 0 (nothing) to 1 (all of it). Pure.

    The trials are ranked by their values. For each option they are put into at most four groups of similar values, and
    the variance of ranks between the groups is compared with the whole variance, less what chance would put there
    (epsilon squared, as in the Kruskal-Wallis test). So a best value in the middle counts as much as one at an end.
    None with fewer than four trials.
    """
    known = sorted(
        (t for t in trials if is_number(t.value) and t.status != "failed"), key=lambda t: float(t.value or 0)
    )
    if len(known) < _LEAST_TRIALS:
        return None
    ranks = {t.number: float(place) for place, t in enumerate(known)}
    mean = (len(known) - 1) / 2
    whole = math.fsum((r - mean) ** 2 for r in ranks.values())
    found = {}
    for name in names:
        groups = [[ranks[t.number] for t in group] for group in _groups(known, name)]
        if len(groups) < 2:
            found[name] = 0.0
            continue
        between = math.fsum(len(g) * (math.fsum(g) / len(g) - mean) ** 2 for g in groups)
        free = len(known) - len(groups)
        chance = (len(groups) - 1) * (whole - between) / free if free else whole
        found[name] = max(0.0, (between - chance) / whole)
    return found


def _groups(trials: Sequence[TrialRecord], name: str) -> list[list[TrialRecord]]:
    """Group trials with similar values of an option: numbers by their order, other values by equality."""
    values = [t.options.get(name) for t in trials]
    kinds = {str(v) for v in values}
    if not all(map(is_number, values)) or len(kinds) <= _MOST_GROUPS:
        by_value: dict[str, list[TrialRecord]] = {}
        for trial, value in zip(trials, values, strict=True):
            by_value.setdefault(str(value), []).append(trial)
        return [by_value[kind] for kind in sorted(by_value)]
    ordered = sorted(trials, key=lambda t: t.options[name])
    count = min(_MOST_GROUPS, len(ordered) // 2)
    return [ordered[i * len(ordered) // count : (i + 1) * len(ordered) // count] for i in range(count)]


def sweep_pictures(
    name: str, ranked: Sequence[TrialRecord], search: Mapping[str, str], metric: str, mode: str
) -> dict[str, Callable[[], bytes]]:
    """Return functions that draw the pictures as PNG, by file name.

    Args:
        ranked: the trials, the best first; some may still run.
        search: the searched options, as `sweep.json` writes them, for example `loguniform(...)`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib_figure()
    found: dict[str, Callable[[], bytes]] = {
        "objective.png": lambda: _objective(name, ranked, metric, mode),
        "curves.png": lambda: _curves(name, ranked, metric),
        "slices.png": lambda: _slices(name, ranked, search, metric),
    }
    weights = importance(ranked, list(search))
    if weights is not None:
        found["importance.png"] = lambda: _importance(name, weights, metric, len(ranked))
    return found


def _best(ranked: Sequence[TrialRecord]) -> TrialRecord | None:
    return next((t for t in ranked if is_number(t.value) and t.status != "failed"), None)


def _limit(axes: Any, values: Sequence[float]) -> None:
    limits = scale(values)
    if limits is not None:
        axes.set_ylim(*limits)


def _objective(name: str, ranked: Sequence[TrialRecord], metric: str, mode: str) -> bytes:
    """Draw every report over time, the best value so far, and when trials failed."""
    figure = figure_of(9, 4.4)
    axes = figure.subplots()
    reports = sorted(
        (r["time"], r["metrics"][metric], t.status)
        for t in ranked
        for r in t.reports
        if is_number(r["metrics"].get(metric))
    )
    titled(axes, f"{name}: {metric} over time")
    axes.set(xlabel="minutes", ylabel=metric)
    if reports:
        began, best, line = reports[0][0], None, []
        for at, value, _ in reports:
            best = better(best, value, mode)
            line.append(((at - began) / 60, best))
        good = [((at - began) / 60, value) for at, value, status in reports if status != "failed"]
        failed = [((at - began) / 60, value) for at, value, status in reports if status == "failed"]
        if good:
            axes.scatter(*zip(*good), s=18, color=_OTHERS, label="a trial's evaluation")
        if failed:
            axes.scatter(*zip(*failed), s=26, marker="x", color=TONES["bad"], label="of a trial that failed")
        axes.step(*zip(*line), where="post", color=LOSS, linewidth=1.8, label="best so far")
        _limit(axes, [value for _, value, _ in reports])
        axes.legend(frameon=False, loc="upper right")
    return png_of(figure)


def _curves(name: str, ranked: Sequence[TrialRecord], metric: str) -> bytes:
    """Draw the metric of each trial over its steps: the best few with names, the others grey, failed ones up to a
    cross."""
    figure = figure_of(9, 4.6)
    axes = figure.subplots()
    best = _best(ranked)
    named = [t for t in ranked if is_number(t.value) and t.status != "failed"][: len(_NAMED)]
    colours = {t.number: colour for t, colour in zip(named, _NAMED)}
    drawn = [(t, curve_of(t, metric)) for t in reversed(ranked)]
    said: set[str] = set()
    for trial, points in drawn:
        if not points:
            continue
        kind = "failed" if trial.status == "failed" else "others" if trial.number not in colours else ""
        label = (kind if kind not in said else None) if kind else _told(trial, trial is best)
        said.add(kind)
        style: dict[str, Any] = {"color": colours.get(trial.number, _OTHERS), "linewidth": 1.2, "zorder": 2}
        if kind == "failed":
            style |= {"color": TONES["bad"], "linestyle": (0, (2, 2)), "zorder": 1}
        elif not kind:
            style |= {"linewidth": 2.6 if trial is best else 1.6, "zorder": 4}
        axes.plot(*zip(*points), marker="o", markersize=2.5, label=label, **style)
        if kind == "failed" or trial is best:
            marker, size = ("x", 46) if kind == "failed" else ("*", 150)
            axes.scatter(*points[-1], marker=marker, s=size, color=style["color"], zorder=5)
    _limit(axes, [v for _, points in drawn for _, v in points])
    axes.set(xlabel="step", ylabel=metric)
    titled(axes, f"{name}: learning curves")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        order = sorted(range(len(labels)), key=lambda i: (labels[i] in ("others", "failed"), -i))
        axes.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
    return png_of(figure)


def _told(trial: TrialRecord, is_best: bool) -> str:
    value = f"{trial.value:.4g}" if is_number(trial.value) else ""
    return f"{trial.run.rsplit('-', 1)[-1]}  {value}" + ("  best" if is_best else "")


def _slices(name: str, ranked: Sequence[TrialRecord], search: Mapping[str, str], metric: str) -> bytes:
    """Draw the metric over the values of each option, on one scale; failed trials are apart, below."""
    figure = figure_of(max(7.0, 3.6 * len(search) + 1.0), 4.0)
    panels = figure.subplots(1, len(search), squeeze=False, sharey=True)[0]
    good = [t for t in ranked if is_number(t.value) and t.status != "failed"]
    failed, best = [t for t in ranked if t.status == "failed"], _best(ranked)
    limits = scale([float(t.value or 0.0) for t in good]) or (0.0, 1.0)
    below = limits[0] - 0.09 * (limits[1] - limits[0])
    shown = None
    for axes, option in zip(panels, search, strict=True):
        words = any(not is_number(t.options.get(option)) for t in ranked)
        order = sorted({str(t.options.get(option)) for t in ranked})

        def place(trial: TrialRecord, option: str = option, words: bool = words, order: list[str] = order) -> float:
            value = trial.options.get(option)
            return float(order.index(str(value))) if words or value is None else float(value)

        if good:
            shown = axes.scatter(
                [place(t) for t in good],
                [min(max(float(t.value or 0.0), limits[0]), limits[1]) for t in good],
                c=[t.step for t in good],
                cmap="viridis_r",
                s=34,
                edgecolors=PAPER,
                linewidths=0.6,
                zorder=3,
            )
        if failed:
            axes.axhline(limits[0], color=GRID, linewidth=1)
            axes.scatter([place(t) for t in failed], [below] * len(failed), marker="x", s=30, color=TONES["bad"])
        if best is not None:
            axes.scatter(
                place(best), float(best.value or 0.0), marker="*", s=190, facecolor="none", edgecolor=INK, zorder=5
            )
        if words:
            axes.set_xticks(range(len(order)), [short(word, 14) for word in order])
        elif search[option].startswith("loguniform"):
            axes.set_xscale("log")
        axes.set_xlabel(option)
    panels[0].set_ylabel(metric)
    panels[0].set_ylim(2 * below - limits[0] if failed else limits[0], limits[1])
    legend = ["star: the best", *(["cross below: failed"] if failed else [])]
    titled(panels[0], f"{name}: {metric} by option  ({', '.join(legend)})")
    if shown is not None:
        bar = figure.colorbar(shown, ax=list(panels), pad=0.01)
        bar.set_label("steps", color=MUTED)
        bar.outline.set_visible(False)
    return png_of(figure)


def _importance(name: str, weights: Mapping[str, float], metric: str, trials: int) -> bytes:
    """Draw how much of the trials' order each option explains."""
    ordered = sorted(weights.items(), key=lambda item: item[1])
    figure = figure_of(8, 1.4 + 0.36 * len(ordered))
    axes = figure.subplots()
    axes.barh([option for option, _ in ordered], [weight for _, weight in ordered], color=LOSS, alpha=0.85, height=0.6)
    for place, (_, weight) in enumerate(ordered):
        axes.annotate(
            f"{weight:.0%}", (weight, place), xytext=(5, 0), textcoords="offset points", va="center", color=MUTED
        )
    axes.set_xlim(0, 1.08)
    axes.set_xlabel(f"share of the order of {trials} trials by {metric} that the option explains")
    titled(axes, f"{name}: which options matter")
    return png_of(figure)
