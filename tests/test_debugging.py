"""`--debug`: the run is in one process, which stops at breakpoints for as long as one likes, and has the same bits."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time

import pytest

from elastic.command import run
from elastic.run.folder import RunFolder
from elastic.run.line import prepare_line
from elastic.storage import Storage
from tests.forked import LONG, WAIT_S, fork_driver
from tests.tiny_jobs import CONFIG, Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]
CALL = 5  # of the loss: one of a step


class Stops(Everything):
    """Everything, with a breakpoint in it."""

    calls = 0

    def loss(self, model, batch):
        Stops.calls += 1
        if Stops.calls == CALL:
            breakpoint()
        return super().loss(model, batch)


def _debug(terminal: str, arguments: list[str]) -> None:
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    os._exit(run(Stops, CONFIG, arguments))


def test_a_breakpoint_stops_the_run_and_nothing_else(undisturbed_epoch, tmp_path):
    ours, theirs = pty.openpty()
    line = [
        "--run.storage",
        str(tmp_path),
        "--run.name",
        "run",
        "--job.samples",
        str(LONG),
        "--run.exactness",
        "bitwise",
        "--parallel.strategy",
        "fsdp",
        "--recovery.snapshot-every",
        "1st",
        "--data.workers",
        "2",
    ]

    command = fork_driver(_debug, os.ttyname(theirs), [*line, "--debug"])
    shown = _until(ours, "(Pdb) ")
    os.write(ours, b"p 'pid', __import__('os').getpid()\n")
    shown += _until(ours, "(Pdb) ")
    os.write(ours, b"c\n")
    shown += _until(ours, "results in")
    command.join(WAIT_S)
    os.close(theirs)
    os.close(ours)

    assert command.exitcode == 0, shown
    assert f"('pid', {command.pid})" in shown
    assert "\x1b[" not in re.sub(r"\x1b\[\?2004[hl]", "", shown), "nothing is drawn over the debugger's prompt"
    result = RunFolder(Storage(str(tmp_path / "run"))).result() or {}
    assert (result["status"], result["weights_sha256"]) == ("finished", undisturbed_epoch.sha)
    # who resumes the run takes what it computes from it, not how it was debugged
    again = prepare_line(Stops, CONFIG, line[:4])
    assert (again.config.run.exactness, again.config.parallel.strategy) == ("bitwise", CONFIG.parallel.strategy)


def _until(terminal: int, text: str) -> str:
    """What a terminal shows until this text comes."""
    shown, deadline = "", time.monotonic() + WAIT_S
    while text not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
