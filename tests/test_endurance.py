"""A long run with many losses needs no more memory, descriptors, threads and files at its end than near its beginning.

`ENDURANCE=20000:200 python -m pytest -s tests/test_endurance.py` takes so many, and prints what it saw.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from elastic.run.prepare import prepare
from tests.forked import WAIT_S, Ran, Watch, configure, local_run
from tests.tiny_jobs import Plain

STEPS, LOSSES = map(int, os.environ.get("ENDURANCE", "1500:12").split(":"))
pytestmark = [
    pytest.mark.processes,
    pytest.mark.long,
    pytest.mark.usefixtures("fork_server"),
    pytest.mark.timeout(120 + STEPS // 5),
]
MORE_BYTES = 24 << 20


def needs(pid: int) -> dict[str, int]:
    """Bytes of memory, descriptors and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    count = {name: len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task")}
    return {"bytes": pages * os.sysconf("SC_PAGE_SIZE"), **count}


def test_nothing_grows_with_steps_and_losses(tmp_path: Path) -> None:
    config = configure(
        tmp_path,
        "run",
        run__duration=f"{STEPS}st",
        run__exactness="fast",
        scaling__max_workers=3,
        checkpoint__every=f"{STEPS // 10}st",
        checkpoint__keep_last=2,
        eval__every=f"{STEPS // 3}st",
    )
    run, watch = prepare(Plain(), config), Watch()
    seen: list[dict[str, dict[str, int]]] = []
    with local_run(run, 3, on_record=watch, own_host={}) as local:
        for loss in range(1, LOSSES + 1):
            watch.wait_for_step(loss * STEPS // (LOSSES + 1))
            living = [p for p in local.processes if p.poll() is None]
            if loss in (1 + LOSSES // 5, LOSSES):
                files = {"files": sum(1 for _ in (tmp_path / "run").rglob("*"))}
                seen.append({"host": needs(local.hosting.process.pid), "worker": needs(living[0].pid), "run": files})  # type: ignore[union-attr]
            os.kill(living[1 + loss % 2].pid, signal.SIGKILL)  # the first stays from the first step to the last
            local.add_worker(environment={})
            came = f"w1-{2 + loss}"
            watch.wait_for(lambda r, n=came: r.get("kind") == "world_formed" and n in r["detail"]["ids"])
        local.wait(WAIT_S + STEPS / 20)

    ran = Ran(run, None)
    assert (ran.result["status"], len(ran.history)) == ("finished", STEPS)
    assert len(ran.events("member_lost")) == LOSSES
    early, late = seen
    print(f"\n{STEPS} steps, {LOSSES} losses: {early} -> {late}")
    for who in ("host", "worker"):
        assert late[who]["bytes"] - early[who]["bytes"] < MORE_BYTES, seen
        assert late[who]["fd"] <= early[who]["fd"] + 4, seen
        assert late[who]["task"] <= early[who]["task"] + 2, seen
    assert late["run"]["files"] <= early["run"]["files"] + 16, seen
