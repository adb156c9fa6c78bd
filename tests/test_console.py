"""What a terminal shows while a run goes on: one line of progress under the events."""

from __future__ import annotations

import gc
import os
import pty
import re
import struct
import threading
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest

import elastic.observe.console as console_module
from elastic.observe.console import Console, row_text

ROWS = [
    {
        "step": s,
        "loss": 2.0 / s,
        "accuracy": 0.125 * s,
        "lr": 0.1,
        "grad_norm": 0.5,
        "world_size": 3,
        "time": 100.0 + s,
        "samples": 64 * s,
        "sample_hash": "x",
    }
    for s in range(1, 5)
]
EVENT = {"kind": "world_formed", "time": 0.0, "step": 2, "generation": "1-1", "detail": {"size": 3}}


def shown(columns: int, monkeypatch: pytest.MonkeyPatch, term: str = "xterm-256color") -> list[str]:
    """The lines that a terminal of this width was sent, without its control sequences."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    read: list[bytes] = []

    def take() -> None:
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end was closed
                return
            read.append(piece)

    reader = threading.Thread(target=take)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        console = Console(10, 0.0, terminal)
        for row in ROWS[:3]:
            console.record(row)
        console.record(EVENT)
        console.record(ROWS[3])
        console.close()
        del console
    gc.collect()  # it held the terminal open
    reader.join(10)
    assert not reader.is_alive()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(read).decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize(
    ("columns", "there"),
    [
        (60, "step 4/10  loss 0.5000  workers 3  64 samples/s  ETA 6.0s"),
        (80, "step 4/10  loss 0.5000  accuracy 0.5000  workers 3  64 samples/s  ETA 6.0s"),
        (200, "step 4/10  loss 0.5000  accuracy 0.5000  lr 0.1  norm 0.5  workers 3  64 samples/s  ETA 6.0s"),
    ],
)
def test_a_terminal_shows_the_run_on_one_line_and_events_above_it(columns, there, monkeypatch):
    lines = shown(columns, monkeypatch)

    assert any(line.startswith(there) for line in lines), lines
    assert all(len(line) <= columns for line in lines)
    assert any("world formed world 1-1 step 2 size=3" in line for line in lines), "events stay"
    assert ("━" in "".join(lines)) == (columns == 200), "a bar where there is room"


def test_the_line_that_is_redrawn_leaves_a_history_and_the_newest_one_stays(monkeypatch):
    kept: list[str] = []
    monkeypatch.setattr(Console, "print", lambda self, text: kept.append(text))
    monkeypatch.setattr(console_module, "HISTORY_S", 0.0)
    shown(60, monkeypatch)
    assert [line.split("  ")[0] for line in kept if line.startswith("step")] == [f"step {n}/10" for n in (1, 2, 3, 4)]

    kept.clear()
    monkeypatch.setattr(console_module, "HISTORY_S", 1000.0)
    shown(60, monkeypatch)
    assert [line.split("  ")[0] for line in kept if line.startswith("step")] == ["step 4/10"]


def test_a_quiet_console_tells_only_what_goes_wrong_and_the_end(capsys):
    console = Console(10, 0.0, quiet=True)
    for record in (*ROWS, {"step": 4, "time": 104.0, "eval/loss": 1.0}, EVENT):
        console.record(record)
    for kind in ("member_lost", "worker_warm", "checkpoint_failed", "run_finished"):
        console.record({**EVENT, "kind": kind, "detail": "finished", "node": "n", "pid": 1})

    assert [line.split("] ")[1][:14] for line in capsys.readouterr().out.splitlines()] == [
        "member lost wo",
        "checkpoint fai",
        "run finished w",
    ]


def test_a_terminal_that_can_do_nothing_gets_plain_lines(monkeypatch):
    lines = shown(80, monkeypatch, term="dumb")
    assert any(line.startswith("step 4/10  loss 0.5000") for line in lines), lines


def test_what_matters_least_is_left_out_first():
    full = row_text(ROWS[3], 10, 1.0, 64.0)
    assert full.split("  ")[2] == "accuracy 0.5000"
    assert row_text(ROWS[3], 10, 1.0, 64.0, len(full) - 1) == full.replace("  norm 0.5", "")
    assert row_text(ROWS[3], 10, 1.0, 64.0, 25) == "step 4/10  loss 0.5000"
    assert row_text(ROWS[3], 10, 1.0, 64.0, 3) == "step 4/10"
