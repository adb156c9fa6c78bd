"""Pictures of a run: loss and workers over time with marked events, the time of steps and of workers by cause,
stalls."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from elastic.errors import ConfigError
from elastic.observe.console import seconds_text
from elastic.observe.history import PARTS

INK, MUTED, GRID, PAPER = "#1b1f24", "#68707c", "#e6e8ec", "#ffffff"
LOSS, WORLD = "#2457d6", "#0b8f84"
TONES = {"bad": "#d02f2f", "warn": "#b86e00", "good": "#1a8745", "save": "#7a4fd0", "plain": MUTED}
PART_COLOURS = {
    "compute": "#2457d6",
    "synchronisation": "#e39b17",
    "data": "#16a37f",
    "checkpoint": "#8b62e0",
    "restore": "#d8453e",
    "other": "#a3aab5",
}
_UNITS = ((2 * 86400, 86400, "d"), (2 * 3600, 3600, "h"), (180, 60, "min"), (0, 1, "s"))
_MOST_STALLS = 16
_LEAST_SHARE = 0.001
_NEAR = 0.085  # of the width; labels that are nearer to each other go on different lines
_LABEL_LINES = 3

Draw = Callable[[], bytes]


def matplotlib_figure() -> Any:
    """Return matplotlib's class of figures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise  # matplotlib is installed, but not something that it needs
        raise ConfigError(
            "pictures need matplotlib, which is not installed; install it with: pip install 'elastic-train[report]'"
        ) from error
    return Figure


def pictures(run: dict[str, Any]) -> dict[str, Draw]:
    """Return functions that draw the pictures of a run (the result of `looking.Onlooker.look`) as PNG, by file name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    matplotlib_figure()
    course = run["history"]
    found: dict[str, Draw] = {"overview.png": lambda: overview(run)}
    if any(course["totals"][name] > 0 for name in PARTS):
        found["steps.png"] = lambda: steps(run)
    if run["account"] and run["account"]["causes"]:
        found["account.png"] = lambda: account(run)
    if course["stalls"]:
        found["stalls.png"] = lambda: stalls(run)
    return found


def overview(run: dict[str, Any], *, title: str | None = None) -> bytes:
    """Draw the loss above and the workers below, over the same time; events are marked in both.

    Args:
        title: by default the state of the run.
    """
    course = run["history"]
    size, unit = _unit(course["elapsed_s"])
    figure = figure_of(10, 5.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    x = [at / size for at in course["elapsed"]]
    bands = course["curves"]["loss"]
    rows = [(at, *v) for at, *v in zip(x, bands["mean"], bands["low"], bands["high"]) if v[0] is not None]
    if rows:
        at, mean, low, high = zip(*rows)
        above.fill_between(at, low, high, color=LOSS, alpha=0.14, linewidth=0)
        above.plot(at, mean, color=LOSS, linewidth=1.7, label="loss")
    for (name, values), style in zip(course["evaluations"].items(), ("o", "s", "^")):
        if name == "eval/loss":
            above.plot([v[1] / size for v in values], [v[2] for v in values], style, color=INK, ms=4, label=name)
            above.legend(frameon=False, loc="upper right")
    above.set_ylabel("loss")
    titled(above, title or f"{run['name']}: {run['status']}, step {run['step']:,} of {run['total_steps'] or 0:,}")
    most = _draw_worlds(below, course, size)
    below.set_ylabel("workers")
    below.set_xlabel(f"time driven ({unit})")
    _draw_marks(above, below, course["marks"], size, max(course["elapsed_s"] / size, 1e-9))
    if course["saves"]:
        saved = [at / size for at, _ in course["saves"]]
        below.plot(
            saved,
            [-0.085 * most] * len(saved),
            "|",
            color=TONES["save"],
            ms=7,
            mew=1.4,
            label="checkpoint",
            clip_on=False,
        )
        below.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, -0.42), handletextpad=0.2)
    above.set_xlim(0, max(course["elapsed_s"] / size, 1e-9))
    return png_of(figure)


def _draw_worlds(axes: Any, course: dict[str, Any], size: float) -> int:
    points = [(at / size, count) for at, count, _ in course["worlds"]]
    if not points:
        return 1
    points.append((course["elapsed_s"] / size, points[-1][1]))
    at, count = zip(*points)
    if at[0] > _NEAR * points[-1][0]:
        axes.text(
            at[0] / 2, 0.5, "start-up", transform=axes.get_xaxis_transform(), ha="center", color=MUTED, fontsize=9
        )
    axes.fill_between(at, count, step="post", color=WORLD, alpha=0.2, linewidth=0)
    axes.step(at, count, where="post", color=WORLD, linewidth=1.7)
    most = max(1, *count)
    axes.set_ylim(-0.17 * most, most * 1.12)
    axes.set_yticks(sorted({round(most * i / min(most, 4)) for i in range(min(most, 4) + 1)}))
    return most


def _draw_marks(above: Any, below: Any, marks: list[dict[str, Any]], size: float, width: float) -> None:
    lines = [-1.0] * _LABEL_LINES  # where the newest label of each line ends
    said: set[str] = set()
    for mark in marks:
        at, colour = mark["elapsed"] / size, TONES[mark["tone"]]
        for axes in (above, below):
            axes.axvline(at, color=colour, linewidth=1.1, linestyle=(0, (3, 2)), alpha=0.75, zorder=1)
        free = [n for n, taken in enumerate(lines) if at - taken > _NEAR * width or taken < 0]
        if not free:
            continue  # the event has its line; its word would lie upon other words
        lines[free[0]] = at
        said.add(mark["word"])
        left = at < width * 0.93
        above.annotate(
            mark["word"],
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3 if left else -3, -11 - 12 * free[0]),
            textcoords="offset points",
            ha="left" if left else "right",
            color=colour,
            fontsize=9,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
        )


def steps(run: dict[str, Any]) -> bytes:
    """Draw what the time of steps was spent on, stacked, over the steps."""
    course = run["history"]
    figure = figure_of(10, 3.8)
    axes = figure.subplots()
    named = [name for name in PARTS if course["totals"][name] > 0]
    whole = sum(course["totals"][name] for name in named) or 1.0
    axes.stackplot(
        course["steps"],
        *([1e3 * v for v in course["split"][name]] for name in named),
        colors=[PART_COLOURS[name] for name in named],
        labels=[f"{name}  {course['totals'][name] / whole:.0%}" for name in named],
        linewidth=0,
        step="mid" if len(course["steps"]) < 60 else None,
    )
    heights = sorted(sum(1e3 * course["split"][name][i] for name in named) for i in range(len(course["steps"])))
    usual = heights[int(0.98 * (len(heights) - 1))]
    axes.set_ylim(0, 1.25 * usual or 1.0)
    axes.set_xlim(course["steps"][0], max(course["steps"][-1], course["steps"][0] + 1))
    axes.set(xlabel="step", ylabel="milliseconds a step")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    titled(axes, "where steps took their time")
    return png_of(figure)


def account(run: dict[str, Any]) -> bytes:
    """Draw what the time of all workers was spent on."""
    found = run["account"]
    causes = [c for c in found["causes"] if c["share"] >= _LEAST_SHARE][::-1]
    figure = figure_of(10, 1.3 + 0.34 * len(causes))
    axes = figure.subplots()
    colours = [TONES["good"] if c["cause"] == "productive" else PART_COLOURS["other"] for c in causes]
    axes.barh([c["cause"] for c in causes], [100 * c["share"] for c in causes], color=colours, height=0.62)
    for place, c in enumerate(causes):
        label = f"{c['share']:.1%}  {seconds_text(c['seconds'])}" + ("" if c["cost"] is None else f"  {c['cost']:.3g}")
        inside = c["share"] > 0.7 * found["causes"][0]["share"]
        axes.annotate(
            label,
            (0 if inside else 100 * c["share"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=PAPER if inside else MUTED,
            fontsize=9,
        )
    axes.set_xlabel("% of all workers' time")
    axes.set_xlim(0, 1.05 * 100 * found["causes"][0]["share"])
    cost = "" if found["cost"] is None else f", which cost {found['cost']:.4g}"
    titled(axes, f"what {seconds_text(found['worker_seconds'])} of workers' time went into{cost}")
    return png_of(figure)


def stalls(run: dict[str, Any]) -> bytes:
    """Draw the longest stalls, and what happened meanwhile."""
    worst = sorted(run["history"]["stalls"], key=lambda s: -s["seconds"])[:_MOST_STALLS]
    worst.sort(key=lambda s: -s["step"])
    figure = figure_of(10, 1.3 + 0.34 * len(worst))
    axes = figure.subplots()
    axes.barh(
        [f"step {s['step']:,}" for s in worst], [s["seconds"] for s in worst], color=LOSS, alpha=0.85, height=0.62
    )
    most = max(s["seconds"] for s in worst) or 1.0
    for place, stall in enumerate(worst):
        label = f"{stall['seconds']:.2f} s  {short(stall['why'], 70)}"
        inside = stall["seconds"] > 0.55 * most
        axes.annotate(
            label,
            (0 if inside else stall["seconds"], place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=PAPER if inside else MUTED,
            fontsize=9,
        )
    axes.set_xlim(0, 1.05 * most)
    axes.set_xlabel("seconds without a step")
    titled(axes, "stalls")
    return png_of(figure)


# ---- house style ---------------------------------------------------------------------------------------------------


def short(text: str, most: int) -> str:
    """Shorten a text to at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _unit(seconds: float) -> tuple[float, str]:
    return next((size, unit) for least, size, unit in _UNITS if seconds >= least)


def figure_of(width: float, height: float) -> Any:
    """Make a figure; width and height in inches."""
    return matplotlib_figure()(figsize=(width, height), layout="constrained", facecolor=PAPER)


def titled(axes: Any, text: str) -> None:
    """Set the title of axes."""
    axes.set_title(text.replace("$", r"\$"), loc="left", color=INK, fontsize=12, fontweight="bold", pad=10)


def png_of(figure: Any) -> bytes:
    """Render a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c3c8d0")
        axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=9)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
        axes.set_axisbelow(True)
        if not axes.patches:  # of horizontal bars
            axes.grid(axis="y", color=GRID, linewidth=0.8)
        for text in axes.get_legend().get_texts() if axes.get_legend() else ():
            text.set(color=INK, fontsize=9)
    out = io.BytesIO()
    canvas: Any = FigureCanvasAgg(figure)
    figure.set_dpi(160)
    canvas.print_png(out)
    return out.getvalue()
