"""What the exchange of gradients in bitwise costs with ddp on many GPUs: computed, not measured.

    python -m jobs.bench.exchange [--parameters 1e9] [--gpus 8 16 64 512] [--per-node 8] [--rounds 4]
        [--inside 350] [--between 40] [--json FILE]

Who sends how much to whom is counted on the plan that workers follow (elastic/parallel/levels.py), in one level and in
the levels that it has; bandwidths, in GB/s for each GPU, inside nodes and between them, are assumptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from elastic.data.deal import deal
from elastic.parallel.levels import Level, levels, one_level
from jobs.bench.report import table, write_json


@dataclass(frozen=True)
class Cost:
    """Of the worker that sends most: bytes inside its node and to other nodes, and how many it exchanges with."""

    inside: float
    between: float
    partners: int

    def seconds(self, inside: float, between: float) -> float:
        """At these bandwidths in bytes/s. The links of a node and its network cards work one after the other."""
        return self.inside / inside + self.between / between


def cost(nodes: Sequence[str], microbatches: int, size: float, *, one: bool) -> Cost:
    """What the exchange of `size` bytes of gradients costs in a world on these nodes, in one level or as planned.

    In the first collective of a level everyone sends each owner its slice of each block; the second one is a ring, in
    which only one worker of a node sends to another node, and torch has a ring for each network card.
    """
    runs, found = deal(microbatches, len(nodes)), []
    for rank in range(len(nodes)):
        steps: Sequence[Level] = (one_level(len(nodes), rank),) if one else levels(nodes, rank)
        near = far = 0.0
        partners, length = set(), size
        for level in steps:
            width = length / level.owners
            held = len(level.blocks(runs)[level.mine])
            others = [r for i, r in enumerate(level.members) if i != level.mine]
            owners = [r for i, r in enumerate(level.members) if i != level.mine and i < level.owners]
            mixed = len({nodes[r] for r in level.members}) > 1
            near += held * width * sum(nodes[r] == nodes[rank] for r in owners)
            far += held * width * sum(nodes[r] != nodes[rank] for r in owners)
            here = sum(nodes[r] == nodes[rank] for r in level.members)
            near += width * len(others) if here > 1 else 0
            far += width * len(others) / here if mixed else 0
            partners.update(others)
            length = width
        found.append(Cost(near, far, len(partners)))
    return max(found, key=lambda c: (c.between, c.inside))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9, help="of the model, in float32")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 512])
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4, help="microbatches of each worker")
    parser.add_argument("--inside", type=float, default=350.0)
    parser.add_argument("--between", type=float, default=40.0)
    parser.add_argument("--json")
    given = parser.parse_args()
    rows = []
    for gpus in given.gpus:
        nodes = [f"node {rank // given.per_node}" for rank in range(gpus)]
        both = [cost(nodes, gpus * given.rounds, 4 * given.parameters, one=one) for one in (True, False)]
        times = [1e3 * c.seconds(given.inside * 1e9, given.between * 1e9) for c in both]
        sent = [c.between / 1e9 for c in both]
        rows.append([gpus, times[0], sent[0], both[0].partners, times[1], sent[1], both[1].partners])
    head = ["GPUs", "one level, ms", "GB to other nodes", "partners", "as planned, ms", "GB to other nodes", "partners"]
    print(table(head, rows))
    write_json(given.json, {"head": head, "rows": rows})


if __name__ == "__main__":
    main()
