"""`make demo`: the main job on three nodes; one is killed, one is drained, one joins; at the end, the same bits.

    python -m jobs.demo [--steps 240] [--picture FILE] [--keep FOLDER]

The same run is then done again by one process that nothing happens to, and the two hashes are compared.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

from elastic.tools.looking import Onlooker
from elastic.tools.pictures import overview
from elastic.tools.target import open_run
from jobs.bench.nodes import Command, LocalCluster, result

OPTIONS = (
    "--run.name",
    "demo",
    "--run.exactness",
    "bitwise",
    "--batch.microbatches",
    "8",
    "--scaling.max-workers",
    "3",
    "--eval.every",
    "100000st",
    "--checkpoint.every",
    "100st",
    "--job.eval-blocks",
    "64",
    "--recovery.lease",
    "60s",
)


def say(text: str) -> None:
    print(f"\n>>> {text}\n", flush=True)


def world_of(run: Command, size: int, after: int) -> int:
    """Wait for a world of this size with a higher number; returns its number."""

    def number(line: str) -> int:
        match = re.search(rf"world formed world 1-(\d+) size={size} ", line)
        return int(match[1]) if match and int(match[1]) > after else 0

    return number(run.wait_for(lambda line: number(line) > 0, 180))


def draw(run: Path, picture: Path) -> None:
    """The picture of the README's first screen."""
    found = Onlooker(open_run(str(run), read_only=True)).look()
    picture.write_bytes(overview(found, title="one of three nodes is killed, one joins, one is drained"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--picture", metavar="FILE", help="draw the run into this PNG file")
    parser.add_argument("--keep", metavar="FOLDER", help="leave the run in this folder")
    arguments = parser.parse_args()
    steps = arguments.steps
    os.environ["RAY_AUTH_MODE"] = "disabled"
    options = (*OPTIONS, "--run.duration", f"{steps}st")
    with tempfile.TemporaryDirectory(prefix="elastic-demo-") as name:
        folder = Path(arguments.keep or name).resolve()
        say("a cluster of three nodes, one worker on each")
        cluster = LocalCluster(nodes=3, cpus=1)
        try:
            run = Command(
                "-m",
                "jobs.codegpt",
                "--cluster.address",
                cluster.address,
                "--run.storage",
                str(folder),
                *options,
                show=True,
            )
            world = world_of(run, 3, 0)
            run.wait_for_step(10)
            say("a node is killed")
            cluster.kill_node(cluster.nodes[0])
            world = world_of(run, 2, world)
            say("a node joins")
            cluster.add_node()
            world = world_of(run, 3, world)
            say("a node is drained: it goes away in 60 s; another one joins")
            cluster.drain_node(cluster.nodes[0], deadline_s=60)
            cluster.add_node()
            world_of(run, 3, world)
            code = run.wait(600)
        finally:
            cluster.close()
        if code != 0:
            return code
        found = result(folder / "demo")
        if arguments.picture:
            draw(folder / "demo", Path(arguments.picture))
        stalls = ", ".join(f"{s['seconds']:.2f} s before step {s['step']}" for s in found["stalls"])
        say(f"stalls: {stalls or 'none'}\n>>> now the twin: one process, nothing happens to it")
        twin = Command(
            "-m",
            "elastic.worker",
            "--module",
            "jobs.codegpt",
            "--workers",
            "1",
            "--run.storage",
            str(folder / "twin"),
            *options,
            show=True,
        )
        if twin.wait(900) != 0:
            return 1
        hashes = found["weights_sha256"], result(folder / "twin" / "demo")["weights_sha256"]
        verdict = "the same bits" if hashes[0] == hashes[1] else "OTHER BITS"
        print(f"\nwith faults  {hashes[0]}\nundisturbed  {hashes[1]}  {verdict}")
        return 0 if hashes[0] == hashes[1] else 1


if __name__ == "__main__":
    sys.exit(main())
