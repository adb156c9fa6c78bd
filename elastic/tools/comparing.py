"""`elastic compare RUN RUN`: whether two runs trained on the same samples with the same bits, and where they differ."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from elastic.observe.columns import columns
from elastic.observe.history import number
from elastic.observe.ledger import METRICS, kept_history, read_records
from elastic.run.folder import RunFolder
from elastic.tools.text import show, table

_SAMPLES = ("first_position", "count", "sample_hash")
_BITS = ("loss", "grad_norm")
Rows = Sequence[dict[str, Any]]
_MOST = 12  # the most options in a table


def compare_runs(arguments: argparse.Namespace) -> int:
    """Carry out the verb; returns 0 if samples and bits of all common steps are the same, otherwise 1."""
    from elastic.redact import redact
    from elastic.tools.target import open_run

    folders = [open_run(url, read_only=True) for url in (arguments.url, arguments.other)]
    first, second = (_read(folder) for folder in folders)
    found = compare(first, second)
    found["runs"] = [redact(folder.storage.url) for folder in folders]
    show(arguments, found, lambda: text_of(found))
    return 0 if found["same_samples"] and found["same_bits"] else 1


def _read(folder: RunFolder) -> dict[str, Any]:
    history = kept_history(r for r in read_records(folder.storage, METRICS) if _is_row(r))
    return {"rows": history, "config": folder.config() or {}, "result": folder.result() or {}}


def _is_row(row: dict[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and _is_generation(str(row.get("generation")))


@cache  # a hundred thousand rows are of few generations
def _is_generation(text: str) -> bool:
    epoch, _, n = text.partition("-")
    return epoch.isdecimal() and n.isdecimal()


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Compare two runs. Pure.

    Args:
        first, second: for each run its `rows` (those that count, by step), `config` and `result` (contents of the
            files).

    Returns:
        the numbers of steps of each run and of common steps; the first step with different samples; the first step with
        another loss or norm, with both values; the options that differ, and whether they are result options.
        `same_bits` is None without a common step.
    """
    rows = [{row["step"]: row for row in run["rows"]} for run in (first, second)]
    common = sorted(rows[0].keys() & rows[1].keys())
    ours, theirs = ([found[step] for step in common] for found in rows)
    samples, parted = _first_difference(ours, theirs, _SAMPLES), _first_difference(ours, theirs, _BITS)
    hashes = [run["result"].get("weights_sha256") for run in (first, second)]
    ends = [run["result"].get("steps") for run in (first, second)]
    comparable = None not in hashes and ends[0] == ends[1]
    return {
        "steps": [len(r) for r in rows],
        "common_steps": len(common),
        "same_samples": samples is None if common else None,
        "samples_part_at": None if samples is None else common[samples],
        "same_bits": (parted is None and (not comparable or hashes[0] == hashes[1])) if common else None,
        "parts_at": None if parted is None else common[parted],
        "values": None if parted is None else {k: [ours[parted].get(k), theirs[parted].get(k)] for k in _BITS},
        "largest_difference": _largest(ours, theirs, parted) if common else None,
        "weights_sha256": hashes,
        "same_weights": hashes[0] == hashes[1] if comparable else None,
        "options": [
            {"option": name, "result_option": result, "values": values}
            for name, result, values in _options(first["config"], second["config"])
        ],
        "figures": [_figures(run) for run in (first, second)],
    }


def _first_difference(ours: Rows, theirs: Rows, names: Iterable[str]) -> int | None:
    """Return the place of the first pair of rows that differ in one of these columns. Whole columns are compared first:
    most are the same."""
    found = []
    for name in names:
        mine, other = [row.get(name) for row in ours], [row.get(name) for row in theirs]
        if mine != other:
            found += [next(i for i, (a, b) in enumerate(zip(mine, other)) if a != b)]
    return min(found, default=None)


def _largest(ours: Rows, theirs: Rows, first: int | None) -> float:
    """Return the largest difference of two losses, from the rows of place `first` on, as a share of the larger one."""
    found = 0.0
    for a, b in zip(
        *(
            columns((rows[first:] if first is not None else []), {"loss": math.nan}, number)[0]
            for rows in (ours, theirs)
        )
    ):
        if (most := max(abs(a), abs(b))) > 0:
            found = max(found, abs(a - b) / most)
    return found


def _options(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, bool, list[Any]]]:
    both = [_flat(config) for config in (first, second)]
    result = {*_names(first.get("result")), *_names(second.get("result"))}
    for name in sorted(both[0].keys() | both[1].keys()):
        values = [options.get(name) for options in both]
        if values[0] != values[1] and name not in ("run.name", "run.storage"):
            yield name, name in result, values


def _names(found: Any) -> list[str]:
    return [n for n in found if isinstance(n, str)] if isinstance(found, list) else []


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config by the dotted names under which they are typed."""
    job = config.get("job") if isinstance(config.get("job"), dict) else {}
    sections = {**(config.get("config") or {}), "job": (job or {}).get("options") or {}}
    return {
        f"{section}.{name.replace('_', '-')}": value
        for section, options in sections.items()
        if isinstance(options, dict)
        for name, value in options.items()
    }


def _figures(run: Mapping[str, Any]) -> dict[str, Any]:
    rows, result = run["rows"], run["result"]
    seconds = sum(s for s in columns(rows, {"step_s": 0.0}, number)[0] if s > 0)
    stalls = result.get("stalls") or []
    return {
        "loss": rows[-1].get("loss") if rows else None,
        "metrics": result.get("metrics") or {},
        "step_s": seconds / len(rows) if rows else None,
        "stalls": len(stalls),
        "worker_hours": result.get("worker_hours"),
        "cost": result.get("cost"),
    }


def text_of(found: Mapping[str, Any]) -> str:
    """Format a comparison for people."""
    names = found["runs"]
    common = found["common_steps"]
    if not common:
        return f"{names[0]} and {names[1]} have no step in common ({found['steps'][0]} and {found['steps'][1]})"
    lines = [f"{names[0]} ({found['steps'][0]} steps) and {names[1]} ({found['steps'][1]} steps)", ""]
    at = found["samples_part_at"]
    lines.append(
        f"samples  the same in all {common} common steps" if at is None else f"samples  other ones from step {at} on"
    )
    if found["parts_at"] is None:
        lines.append(f"bits     loss and gradient norm are the same in all {common} common steps")
    else:
        values = ", ".join(f"{k} {a!r} and {b!r}" for k, (a, b) in found["values"].items())
        lines.append(f"bits     they part at step {found['parts_at']}: {values}")
        lines.append(f"         losses are at most {found['largest_difference']:.2g} of their size apart")
    if found["same_weights"] is not None:
        lines.append(
            f"weights  {'the same, sha256 ' + found['weights_sha256'][0] if found['same_weights'] else 'others'}"
        )
    elif found["parts_at"] is None:
        lines.append("weights  not compared: the runs did not both end after the same step")
    lines += ["", _figures_table(found["figures"])]
    if found["options"]:
        rows = [
            (f"--{o['option']}", str(o["values"][0]), str(o["values"][1]), "result" if o["result_option"] else "")
            for o in sorted(found["options"], key=lambda o: not o["result_option"])[:_MOST]
        ]
        lines += ["", table(("option that differs", "first", "second", ""), rows)]
        if len(found["options"]) > _MOST:
            lines.append(f"and {len(found['options']) - _MOST} more")
    return "\n".join(lines)


def _figures_table(figures: Sequence[Mapping[str, Any]]) -> str:
    def both(name: str, spell: str = ".4g") -> tuple[str, ...]:
        return tuple("" if f[name] is None else format(f[name], spell) for f in figures)

    rows = [("loss", *both("loss", ".6g"))]
    for metric in sorted({m for f in figures for m in f["metrics"]}):
        rows.append((metric, *(f"{number(f['metrics'].get(metric)):.6g}" for f in figures)))
    rows += [("seconds a step", *both("step_s")), ("stalls", *both("stalls", "d"))]
    rows += [("worker hours", *both("worker_hours")), ("cost", *both("cost"))]
    return table(("", "first", "second"), [row for row in rows if any(row[1:])], "first,second")
