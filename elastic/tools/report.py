"""`elastic report RUN`: how a run went, as tables, as pictures, and as one page."""

from __future__ import annotations

import argparse
import os
from typing import Any

from elastic.observe.console import seconds_text
from elastic.observe.history import PARTS
from elastic.tools.output import write_file
from elastic.tools.text import age_text, show, size_text, table, workers_table

_MOST = 12  # the most stalls, events and checkpoints in a table


def report_run(arguments: argparse.Namespace) -> int:
    """Carry out the verb for a run, and return the exit code."""
    from elastic.tools.looking import Onlooker
    from elastic.tools.target import open_run

    found = Onlooker(open_run(arguments.url, read_only=True)).look()
    written = []
    if arguments.html:
        from elastic.tools.page.single import single_page

        written.append(write_file(arguments.html, lambda: single_page(found).encode(), "--html"))
    if arguments.plots:
        from elastic.tools.pictures import pictures

        for name, draw in pictures(found).items():
            written.append(write_file(os.path.join(arguments.plots, name), draw, "--plots"))
    show(arguments, {**found, "written": written}, lambda: report_text(found, written))
    return 0


def report_text(run: dict[str, Any], written: list[str]) -> str:
    """Format the report for people.

    Args:
        run: the result of `looking.Onlooker.look`.
        written: the paths of files that were written.
    """
    parts = [
        _head(run),
        _figures(run),
        *(
            text
            for text in (_split(run), _health(run), _account(run), _stalls(run), _saves(run), _members(run))
            if text
        ),
        *([f"written: {', '.join(written)}"] if written else []),
    ]
    return "\n\n".join(parts)


def _head(run: dict[str, Any]) -> str:
    total = run["total_steps"] or 0
    last = f", heartbeat {age_text(run['age_s'])} ago" if run["age_s"] is not None else ""
    lines = [f"{run['run']}: {run['status']}, step {run['step']} of {total}{last}"]
    if run["owner"]:
        lines.append(f"driven by {run['owner']}" + (f"; {run['message']}" if run["message"] else ""))
    if run["not_asked"]:
        lines.append(f"(from its folder alone: {run['not_asked']})")
    return "\n".join(lines)


def _figures(run: dict[str, Any]) -> str:
    course, result = run["history"], run["result"]
    rows: list[tuple[str, str]] = [("driven for", seconds_text(course["elapsed_s"]))]
    for name, bands in course["curves"].items():
        last = next((v for v in reversed(bands["mean"]) if v is not None), None)
        if last is not None:
            rows.append((name, f"{last:.4f}" if name in ("loss",) or abs(last) < 1e4 else f"{last:.4g}"))
    for name, values in course["evaluations"].items():
        rows.append((f"{name}, step {values[-1][0]}", f"{values[-1][2]:.4f}"))
    if course["rate"]:
        rows.append(("steps/s", f"{course['rate']:.3g}"))
    if course["amount_rate"]:
        rows.append((f"{course['amount']}/s", f"{course['amount_rate']:,.0f}"))
    sizes = [size for _, size, _ in course["worlds"] if size]
    if sizes:
        rows.append(
            ("workers", f"{min(sizes)} to {max(sizes)}, {len(sizes)} worlds" if len(sizes) > 1 else f"{sizes[0]}")
        )
    if course["redone"]:
        rows.append(("steps done again", str(course["redone"])))
    if result.get("cost") is not None:
        rows.append(("cost", f"{result['cost']:.4g}"))
    if result.get("weights_sha256"):
        rows.append(("weights sha256", str(result["weights_sha256"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _split(run: dict[str, Any]) -> str:
    totals = run["history"]["totals"]
    whole = sum(totals[name] for name in PARTS)
    if not whole:
        return ""
    rows = [(name, seconds_text(totals[name]), f"{totals[name] / whole:.1%}") for name in PARTS if totals[name] > 0]
    return table(("where steps took their time", "seconds", "share"), rows, "seconds,share")


def _health(run: dict[str, Any]) -> str:
    rows = [(h["name"], h["value"], h["goal"], h["verdict"], h["advice"]) for h in run["health"] if h["value"]]
    return table(("how it is doing", "value", "goal", "", "what to try"), rows, "value") if rows else ""


def _account(run: dict[str, Any]) -> str:
    account = run["account"]
    if not account or not account["causes"]:
        return ""
    priced = account["cost"] is not None
    head = ("what workers' time went into", "time", "share", *(("cost",) if priced else ()))
    rows = [
        (
            f"{c['cause']}: {c['meaning']}",
            seconds_text(c["seconds"]),
            f"{c['share']:.1%}",
            *((f"{c['cost']:.4g}",) if priced else ()),
        )
        for c in account["causes"]
    ]
    cost = (f"{account['cost']:.4g}",) if priced else ()
    rows.append(("all", seconds_text(account["worker_seconds"]), "", *cost))
    more = ""
    if account["on_demand_cost"] is not None:
        more = f"\non demand it would have cost {account['on_demand_cost']:.4g}"
    faults = [
        (
            "" if f["step"] is None else f["step"],
            f["kind"],
            seconds_text(f["worker_seconds"]),
            *(("" if f["cost"] is None else f"{f['cost']:.3g}",) if priced else ()),
            f["reason"][:80],
        )
        for f in sorted(account["interruptions"], key=lambda f: -f["worker_seconds"])[:_MOST]
    ]
    if faults:
        heads = ("step", "interruption", "workers' time", *(("cost",) if priced else ()), "reason")
        more += "\n\n" + table(heads, faults, "step,workers' time,cost")
    return table(head, rows, "time,share,cost") + more


def _stalls(run: dict[str, Any]) -> str:
    stalls = run["history"]["stalls"]
    if not stalls:
        return ""
    worst = sorted(sorted(stalls, key=lambda s: -s["seconds"])[:_MOST], key=lambda s: s["step"])
    rows = [(s["step"], f"{s['seconds']:.2f}s", s["why"][:90]) for s in worst]
    more = f"\n{len(stalls) - len(worst)} shorter ones are left out" if len(stalls) > len(worst) else ""
    return table(("step", "stall", "what happened"), rows, "step,stall") + more


def _saves(run: dict[str, Any]) -> str:
    rows = [
        (
            c["step"],
            size_text(c["bytes"]),
            age_text(c["age_s"]),
            "yes" if c["pinned"] else "",
            c["problem"] or c["state"],
        )
        for c in run["checkpoints"][:_MOST]
    ]
    return table(("checkpoint", "size", "age", "pinned", "state"), rows, "checkpoint,size,age") if rows else ""


def _members(run: dict[str, Any]) -> str:
    return workers_table(run["workers"]) if run["workers"] else ""
