"""`elastic doctor`: checks whether a run would work here, and prints a table of findings with remedies."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from elastic.tools.text import show

if TYPE_CHECKING:
    from elastic.tools.machine import Finding


def add_doctor(verbs: Any, examine_cluster: Callable[[str, Sequence[str]], list[Finding]]) -> None:
    """Add the verb. `examine_cluster` takes a cluster's address and URLs of storage; it is passed in because this
    module may not import the package that has it."""
    text = "say whether a run would work on this machine or on a cluster, and what to do if not"
    parser = verbs.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--storage", action="append", default=[], metavar="URL", help="try out this place for runs too")
    parser.add_argument("--address", metavar="ADDRESS", help="examine this Ray cluster (auto: one that runs here)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=partial(run_doctor, examine_cluster), url="the storage that was named")


def run_doctor(examine_cluster: Callable[[str, Sequence[str]], list[Finding]], arguments: argparse.Namespace) -> int:
    """Examine and print; returns 1 if a run would fail."""
    from elastic.tools.machine import examine_machine
    from elastic.tools.storing import examine_storage

    if arguments.address is not None:
        found = examine_cluster(arguments.address, arguments.storage)
    else:
        found = examine_machine()
        for url in arguments.storage:
            found += examine_storage(url)
    show(arguments, {"findings": [asdict(f) for f in found]}, lambda: text_of(found))
    return int(any(f.state == "fail" for f in found))


def text_of(found: Sequence[Finding]) -> str:
    """Return the table, with a remedy below each finding that has one."""
    from elastic.tools.text import table

    words = {"ok": "ok", "warn": "look", "fail": "FAIL"}
    rows = [(words[f.state], f.check, f.where, f.found) for f in found]
    lines = table(("state", "check", "where", "found"), rows).splitlines()
    shown = [lines[0]]
    for line, finding in zip(lines[1:], found, strict=True):
        shown += [line, *([f"      -> {finding.do}"] if finding.do else [])]
    failed, odd = sum(f.state == "fail" for f in found), sum(f.state == "warn" for f in found)
    last = f"{failed} would make a run fail" if failed else "a run would work"
    return "\n".join([*shown, "", f"{len(found)} checks: {last}" + (f"; look at {odd}" if odd else "")])
