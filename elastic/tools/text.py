"""Figures and tables for a terminal or a pipe."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic.errors import ConfigError
from elastic.redact import printable

FORMAT = 1  # version of the JSON that --json prints

_SIZES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_AGES = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def workers_table(workers: Sequence[Mapping[str, Any]]) -> str:
    """A run's workers, a line each, as `membership.state.people` describes them."""
    heads = ("worker", "node", "process", "rank", "state", "phase", "memory")
    rows = [
        (w["id"], w["node"][:16], w["pid"], "" if w["rank"] is None else w["rank"], w["state"], w["phase"], _memory(w))
        for w in workers
    ]
    return table(heads, rows, "process,rank,memory")


def _memory(worker: Mapping[str, Any]) -> str:
    resident, device = worker.get("memory_bytes"), worker.get("device_memory")
    words = [size_text(resident) if resident else "", f"{device:.0%} of the device" if device is not None else ""]
    return ", ".join(word for word in words if word)


def size_text(size: float) -> str:
    """Format a size in bytes: 512 B, 1.5 KiB, 20.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def age_text(seconds: float) -> str:
    """Format a duration: 5s, 12min, 3.0h, 30d."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}min"
    return f"{seconds / 3600:.1f}h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f}d"


def parse_size(option: str, text: str) -> int:
    """Return the bytes of a size such as "5GB" or "500MiB".

    Raises:
        ConfigError: the text has no number above 0, or no unit of bytes.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    size = int(float(match[1]) * _SIZES.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{option} is {text!r}; give a number and a unit of bytes, for example 5GB or 500MiB")
    return size


def parse_age(option: str, text: str) -> float:
    """Return the seconds of a duration such as "30d" or "12h".

    Raises:
        ConfigError: the text has no number, or none of the units s, min, h, d and w.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", text)
    if not match or match[2] not in _AGES:
        raise ConfigError(f"{option} is {text!r}; give a number and a unit of {', '.join(_AGES)}, for example 30d")
    return float(match[1]) * _AGES[match[2]]


def table(header: Sequence[str], rows: Sequence[Sequence[object]], right: str = "") -> str:
    """Format rows under a header. The columns whose names are in `right` (comma-separated) are aligned to the right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    to_right = [name in right.split(",") for name in header]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, to_right)).rstrip() for row in cells
    ]
    return "\n".join(lines)


def show(arguments: argparse.Namespace, values: Mapping[str, Any], text: Callable[[], str]) -> None:
    """Print the result of a verb: as JSON with the version of its format if `--json` was given, otherwise as text."""
    from elastic.observe.ledger import finite

    print(json.dumps({"format": FORMAT, **finite(values)}, indent=1) if arguments.json else printable(text()))
