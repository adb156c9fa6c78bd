"""`elastic watch RUN`: a live run on a terminal; without a terminal, lines as the run's own command prints them."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from elastic.observe.console import Console, seconds_text
from elastic.observe.history import PARTS
from elastic.redact import printable
from elastic.run.folder import LIVE_STATES
from elastic.tools.text import FORMAT, age_text

EVERY_S = 1.0
LINES_S = 2.0  # seconds between two lines of progress without a terminal
# bits of the dots of a braille character: rows from the top, columns from the left
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BARS = " ▁▂▃▄▅▆▇█"
_STYLES = {"bad": "red", "warn": "yellow", "good": "green", "save": "magenta", "plain": "dim"}


def watch_run(arguments: argparse.Namespace) -> int:
    """Carry out the verb, and return the exit code: 1 for a run that failed or was lost."""
    from elastic.tools.looking import Onlooker, foreign_is_named
    from elastic.tools.target import open_run

    onlooker = Onlooker(open_run(arguments.url, read_only=True))
    how = _lines_of_json if arguments.json else _screen if sys.stdout.isatty() else _lines
    with foreign_is_named(arguments.url):
        run = how(onlooker)
    return 1 if run["status"] in ("failed", "lost") else 0


def _lines_of_json(onlooker: Any) -> dict[str, Any]:
    from elastic.observe.ledger import finite

    while True:
        run: dict[str, Any] = onlooker.look()
        print(json.dumps({"format": FORMAT, **finite(run)}, allow_nan=False), flush=True)
        if run["status"] not in LIVE_STATES:
            return run
        time.sleep(EVERY_S)


def _lines(onlooker: Any) -> dict[str, Any]:
    shown, console = -1, None
    try:
        while True:
            run: dict[str, Any] = onlooker.look()
            console = console or Console(run["total_steps"] or 0, LINES_S, live=False)
            events = onlooker.history.events
            for event in events[max(0, len(events) - 10) if shown < 0 else shown :]:
                console.record(event)
            shown = len(events)
            if onlooker.history.row:
                console.record(onlooker.history.row)
            if run["status"] not in LIVE_STATES:
                console.print(f"{run['run']}: {run['status']}, step {run['step']} of {run['total_steps'] or 0}")
                return run
            time.sleep(EVERY_S)
    finally:
        if console is not None:
            console.close()


def _screen(onlooker: Any) -> dict[str, Any]:
    from rich.console import Console as Terminal
    from rich.live import Live

    terminal = Terminal()
    run: dict[str, Any] = onlooker.look()
    with Live(console=terminal, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(picture(run, terminal.width, terminal.height), refresh=True)
                if run["status"] not in LIVE_STATES:
                    break
                time.sleep(EVERY_S)
                run = onlooker.look()
        except KeyboardInterrupt:
            pass  # Ctrl-C is how one leaves
    terminal.print(picture(run, terminal.width, terminal.height))
    return run


# ---- drawing -------------------------------------------------------------------------------------------------------


def braille(values: Sequence[float | None], width: int, height: int) -> list[str]:
    """Return a curve as lines of text, the highest first: each character has 2 by 4 dots. Pure."""
    cells = [[0] * width for _ in range(height)]
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return [" " * width for _ in range(height)]
    low, high = min(known), sorted(known)[int(0.995 * (len(known) - 1))]
    columns, rows, before = 2 * width, 4 * height, -1
    for x in range(columns):
        found = [
            v
            for v in values[
                x * len(values) // columns : max(x * len(values) // columns + 1, (x + 1) * len(values) // columns)
            ]
            if v is not None and math.isfinite(v)
        ]
        if not found:
            before = -1
            continue
        share = (high - sum(found) / len(found)) / (high - low) if high > low else 0.5
        y = min(rows - 1, max(0, round(share * (rows - 1))))
        for dot in range(min(y, before if before >= 0 else y), max(y, before) + 1):
            cells[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        before = y
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in line) for line in cells]


def over_time(times: Sequence[float], values: Sequence[float | None], end: float, count: int) -> list[float | None]:
    """Return values at `count` times from 0 to `end`, interpolated between those that are known. Pure."""
    known = [(t, v) for t, v in zip(times, values, strict=True) if v is not None]
    found: list[float | None] = []
    after = 0
    for n in range(count):
        at = (n + 0.5) * end / count
        while after < len(known) and known[after][0] < at:
            after += 1
        if after in (0, len(known)):
            found.append(None)
            continue
        (t0, v0), (t1, v1) = known[after - 1], known[after]
        found.append(v1 if t1 <= t0 else v0 + (v1 - v0) * (at - t0) / (t1 - t0))
    return found


def bars(worlds: Sequence[Sequence[Any]], end: float, width: int) -> str:
    """Return the sizes of worlds over time as one line of bars. Pure."""
    most = max((size for _, size, _ in worlds), default=0)
    found, at = "", 0
    for x in range(width):
        while at < len(worlds) and worlds[at][0] <= (x + 1) * end / width:
            at += 1
        size = worlds[at - 1][1] if at else 0
        found += _BARS[round(8 * size / most)] if most else " "
    return found


def picture(run: dict[str, Any], width: int, height: int) -> Any:
    """Return the whole screen. What matters more is above; what does not fit is left out."""
    from rich.console import Group
    from rich.text import Text

    parts = [_head(run, width), _bar(run, width), Text()]
    course = run["history"]
    room = height - 4
    curve = min(10, max(3, room // 3))
    parts += _curves(run, width, curve)
    room -= curve + 4
    split = _split(course, width)
    account = _account(run, width)
    for part in (split, account, _health(run, width)):
        if part is not None and room > 3:
            parts.append(part)
            room -= 1
    members = run["workers"][: max(0, min(8, room // 2))]
    if members:
        parts += [Text(), *[_member(w, width) for w in members]]
        room -= len(members) + 1
    events = course["events"][-max(0, room - 2) :] if room > 2 else []
    if events:
        parts += [Text(), *[_event(e, width) for e in events]]
    return Group(*parts)


def _head(run: dict[str, Any], width: int) -> Any:
    from rich.text import Text

    styles = {"running": "bold green", "parked": "bold yellow", "finished": "bold blue"}
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(printable(run["name"]), "bold")
    text.append(f"  {run['status']}", styles.get(run["status"], "bold red"))
    more = run["message"] or run["not_asked"] or " ".join(filter(None, (run["job"], run["strategy"], run["owner"])))
    text.append(f"  {printable(str(more))}", "dim")
    text.truncate(width)
    return text


def _bar(run: dict[str, Any], width: int) -> Any:
    from rich.text import Text

    total, course = run["total_steps"] or 0, run["history"]
    words = [f"step {run['step']:,}" + (f" of {total:,}" if total else "")]
    words += [f"{course['amount_rate']:,.0f} {course['amount']}/s"] if course["amount_rate"] else []
    words += (
        [f"ETA {seconds_text(run['eta_s'])}"] if run["eta_s"] else [f"driven for {seconds_text(course['elapsed_s'])}"]
    )
    saved = run["checkpoints"][0] if run["checkpoints"] else None
    words += [f"saved at {saved['step']:,} ({age_text(saved['age_s'])} ago)"] if saved else ["nothing saved"]
    line = "  ".join(words)
    room = width - len(line) - 2
    text = Text(no_wrap=True, overflow="crop")
    if total and room >= 10:
        done = min(room, round(room * run["step"] / total))
        text.append("━" * done, "blue").append("━" * (room - done), "bright_black").append("  ")
    text.append(line)
    return text


def _curves(run: dict[str, Any], width: int, height: int) -> list[Any]:
    from rich.text import Text

    course = run["history"]
    bands = course["curves"]["loss"]["mean"]
    known = [v for v in bands if v is not None]
    labels = 9
    room = max(10, width - labels - 1)
    lines = braille(over_time(course["elapsed"], bands, course["elapsed_s"], 2 * room), room, height)
    found = []
    for n, line in enumerate(lines):
        label = f"{max(known):.4g}" if known and n == 0 else f"{min(known):.4g}" if known and n == height - 1 else ""
        found.append(Text.assemble((label.rjust(labels), "dim"), " ", (line, "blue"), no_wrap=True))
    now = f"loss {known[-1]:.4f}" if known else "no step yet"
    evaluated = [f"{name} {values[-1][2]:.4f}" for name, values in list(course["evaluations"].items())[:3]]
    found.append(Text("  ".join([" " * labels + f" {now}", *evaluated]), style="bold", no_wrap=True, overflow="crop"))
    sizes = bars(course["worlds"], course["elapsed_s"], room)
    inside = sum(w["rank"] is not None for w in run["workers"])
    label = f"workers {inside}" if run["status"] in LIVE_STATES else "workers"
    found.append(Text.assemble((label.rjust(labels), "dim"), " ", (sizes, "cyan"), no_wrap=True))
    return found


def _split(course: dict[str, Any], width: int) -> Any:
    from rich.text import Text

    whole = sum(course["totals"][name] for name in PARTS)
    if not whole:
        return None
    parts = [
        f"{name} {course['totals'][name] / whole:.0%}" for name in PARTS if course["totals"][name] / whole >= 0.005
    ]
    return Text(f"{'steps':>9} {'  '.join(parts)}"[:width], style="dim", no_wrap=True)


def _account(run: dict[str, Any], width: int) -> Any:
    from rich.text import Text

    account = run["account"]
    if not account or not account["causes"]:
        return None
    cost = "" if account["cost"] is None else f"cost {account['cost']:.4g}  "
    parts = [f"{c['cause']} {c['share']:.0%}" for c in account["causes"] if c["share"] >= 0.005]
    return Text(f"{'account':>9} {cost}{'  '.join(parts)}"[:width], style="dim", no_wrap=True)


def _health(run: dict[str, Any], width: int) -> Any:
    """Return the figures that miss their goals, and what to try."""
    from rich.text import Text

    poor = [f"{h['name']} {h['value']} (goal {h['goal']}): {h['advice']}" for h in run["health"] if h["tone"] == "bad"]
    if not poor:
        return None
    text = Text.assemble((f"{'health':>9} ", "dim"), ("  ".join(poor), _STYLES["warn"]), no_wrap=True)
    text.truncate(width)
    return text


def _member(worker: dict[str, Any], width: int) -> Any:
    from rich.text import Text

    rank = "-" if worker["rank"] is None else str(worker["rank"])
    line = f"{rank:>9} {worker['id'][:14]:<14}  {worker['node'][:16]:<16}  {worker['state']}  {worker['phase']}"
    return Text(printable(line)[:width], no_wrap=True)


def _event(event: dict[str, Any], width: int) -> Any:
    from rich.text import Text

    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{clock:>9} ", "dim").append("● ", _STYLES[event["tone"]]).append(printable(event["text"]))
    text.truncate(width)
    return text
