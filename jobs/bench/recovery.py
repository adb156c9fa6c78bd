"""Stalls and lost steps when one of three workers is killed: this trainer, torchft, torchrun and stock Ray Train.

    python -m jobs.bench.recovery [--torchft-python PYTHON] [--parts kills sizes overhead]
                                  [--trainers here torchft torchrun stock] [--json FILE]

All train the same model with steps of the same length. A stall is the time between two applied steps minus a normal
step. Where it goes: until the loss is noticed (detect), until it is decided who goes on (form), new processes and
their imports (start), connecting, restoring, and the rest of the first step.

torchft is no dependency of this project; its row is left out unless `--torchft-python` names an interpreter that has
it:

    python -m venv torchft-env
    torchft-env/bin/pip install torchft-nightly==2026.10.26 torch==2.13.0 numpy

All parts together take about half an hour; any of them may be run alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from elastic.membership.watch import p95
from jobs.bench import here, overhead, sizes
from jobs.bench.peers import stock_ray, torchft, torchrun
from jobs.bench.peers.notes import PAUSE_S, PHASES, SAVE_EVERY
from jobs.bench.report import median, table, write_json

PARTS = ("kills", "sizes", "overhead")
TRAINERS = ("here", "torchft", "torchrun", "stock")
JOIN_PHASES = ("form", "connect", "restore", "first step")
Recoveries = list[dict[str, float]]
HEAD = ["who, what was killed", "kills", "p50 s", "p95", "worst", "steps lost", "left out", *PHASES]


def kills_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kill workers under each trainer in turn; prints two tables, and returns all figures."""
    found: dict[str, Recoveries] = {}
    joins: dict[str, Recoveries] = {}
    normal: dict[str, float] = {}

    def note(who: str, recoveries: Recoveries) -> None:
        if recoveries:
            found[who] = recoveries
            stalls = [one["stall_s"] for one in recoveries]
            print(f"{who}: {len(stalls)} kills, p50 {median(stalls):.3f} s, worst {max(stalls):.3f} s", file=sys.stderr)

    defaults = arguments.default_kills
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder = Path(name)
        if "here" in arguments.trainers:
            on_ray = here.on_ray(folder, arguments.kills, arguments.node_kills)
            note("here on Ray, process", on_ray.process)
            note("here on Ray, node", on_ray.node)
            plain = here.in_processes(folder, arguments.kills)
            note("here in plain processes", plain.process)
            joins = {"on Ray": on_ray.join, "plain processes": plain.join}
            normal = {"on Ray": on_ray.normal_s, "in plain processes": plain.normal_s}
        if "torchft" in arguments.trainers and (python := arguments.torchft_python):
            note("torchft, tuned", torchft.measure(folder / "tuned", python, arguments.torchft_kills, torchft.TUNED))
            note("torchft", torchft.measure(folder / "torchft", python, defaults, torchft.AS_ITS_README))
        if "torchrun" in arguments.trainers:
            note("torchrun, process", torchrun.measure(folder / "torchrun", arguments.torchrun_kills, nodes=False))
            for who, settings in (("torchrun, node, tuned", torchrun.TUNED), ("torchrun, node", "")):
                note(who, torchrun.measure(folder / who, defaults, nodes=True, settings=settings))
        if "stock" in arguments.trainers:
            stock = stock_ray.measure(folder / "stock", arguments.stock_kills, arguments.stock_node_kills)
            note("stock Ray Train, process", stock["process"])
            note("stock Ray Train, node", stock["node"])
    print(f"\nthree workers, steps of {PAUSE_S} s and a little; torchrun and Ray Train save every {SAVE_EVERY} steps")
    print("here a step takes " + ", ".join(f"{s:.3f} s {where}" for where, s in normal.items()) if normal else "")
    print(table(HEAD, [_row(who, recoveries) for who, recoveries in found.items()]))
    if joins:
        print("\na warm worker is taken in: stall of those that were there")
        head = ["here", "joins", "p50 s", "p95", "worst", *JOIN_PHASES]
        print(table(head, [_row(who, j, JOIN_PHASES, lost=False) for who, j in joins.items() if j]))
    return {"kills": found, "joins": joins, "step_s": normal}


def _row(who: str, found: Recoveries, phases: tuple[str, ...] = PHASES, *, lost: bool = True) -> list[Any]:
    stalls = [one["stall_s"] for one in found]
    row = [who, len(found), median(stalls), p95(stalls), max(stalls)]
    if lost:
        row += [f"{median(one['lost'] for one in found):g}", int(sum(one["left_out"] for one in found))]
    return [*row, *(median(one[phase] for one in found) for phase in phases)]


def _check_torchft(parser: argparse.ArgumentParser, python: str | None) -> None:
    if python is None:
        print("torchft is left out: give --torchft-python (--help says how to install it)", file=sys.stderr)
        return
    try:
        subprocess.run([python, "-c", "import torchft"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(f"--torchft-python is {python}, which cannot import torchft ({error}); --help says how to install")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="whose workers to kill")
    parser.add_argument("--torchft-python", metavar="PYTHON", help="interpreter that has torchft")
    parser.add_argument("--kills", type=int, default=10, help="of processes here, on Ray and without")
    parser.add_argument("--node-kills", type=int, default=10, help="of nodes here")
    parser.add_argument("--torchft-kills", type=int, default=10)
    parser.add_argument("--torchrun-kills", type=int, default=10)
    parser.add_argument("--stock-kills", type=int, default=10)
    parser.add_argument("--stock-node-kills", type=int, default=2)
    parser.add_argument("--default-kills", type=int, default=3, help="of torchrun's nodes, and of untuned torchft")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if "kills" in arguments.parts and "torchft" in arguments.trainers:
        _check_torchft(parser, arguments.torchft_python)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    load = os.getloadavg()[0]
    print(f"load average at the start: {load:.2f} on {os.cpu_count()} processors")
    figures: dict[str, Any] = {"load_average": load}
    if "kills" in arguments.parts:
        figures["kills"] = kills_part(arguments)
    if "sizes" in arguments.parts:
        figures["sizes"] = sizes.run([50, 200, 1000], 3)
    if "overhead" in arguments.parts:
        figures["overhead"] = overhead.run(overhead.Enough())
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
