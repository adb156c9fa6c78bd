"""How long the decisions take to form a world, by its size: pure functions, no processes.

Each worker says that it joins, one after another, as at the start and after a loss; the seconds are the decisions'
own, summed over all messages.

    python -m jobs.bench.forming [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import time

from elastic.membership.commands import Form
from elastic.membership.decisions import advance
from elastic.membership.events import Acknowledged, Event, Joined, Lost
from elastic.membership.state import Limits, State
from elastic.membership.world import Member
from jobs.bench.report import table, write_json

SIZES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def seconds(size: int) -> tuple[float, float]:
    """Processor seconds to form the first world of `size` workers, and the next one after one of them was lost."""
    state = State(epoch=1, limits=Limits(min_workers=1, max_workers=size, microbatches=4 * size, exact=True))
    members = [Member(f"w{i}", f"n{i // 8}", i % 8) for i in range(size)]
    state, first = _timed(state, [Joined(m, 0.0) for m in members])
    lost, *survivors = members
    broken: list[Event] = [Lost(lost.id, 1.0)]
    back = [event for m in survivors for event in (Acknowledged(m.id, 1.0), Joined(m, 1.0, 7))]
    state, second = _timed(state, broken + back)
    assert state.world is not None
    assert state.world.size == size - 1
    return first, second


def _timed(state: State, events: list[Event]) -> tuple[State, float]:
    gc.freeze()  # what else this process holds is not to be looked through meanwhile
    began, formed = time.thread_time(), 0
    for event in events:
        state, commands = advance(state, event)
        formed += sum(isinstance(command, Form) for command in commands)
    took = time.thread_time() - began
    gc.unfreeze()
    assert formed == 1, f"{formed} worlds were formed"
    return state, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = [(size, *seconds(size)) for size in SIZES]
    print(table(["workers", "first world, s", "after a loss, s"], rows))
    write_json(arguments.json, {"forming": [dict(zip(("workers", "first_s", "after_loss_s"), row)) for row in rows]})


if __name__ == "__main__":
    main()
