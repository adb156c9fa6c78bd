"""Why a worker died: what it printed is a file in the run's folder, and its death says how it ended and where."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from elastic.run.logs import FIRST_BYTES, NEWEST_BYTES, Printed, RunLogs, last_words
from elastic.storage import Storage
from elastic.worker.deaths import Memory, ended_how
from elastic.worker.spool import Spool


def test_a_file_keeps_the_first_and_the_newest_of_what_was_printed():
    printed = Printed()
    lines = [f"line {number}" for number in range(60_000)]
    for line in lines:
        printed.add(line)

    kept = printed.text().splitlines()

    assert len(printed.text()) <= FIRST_BYTES + NEWEST_BYTES + 100
    assert kept[:3] == lines[:3]
    assert kept[-3:] == lines[-3:]
    (gap,) = [i for i, line in enumerate(kept) if line.startswith("... ")]
    missing = lines[gap : lines.index(kept[gap + 1])]
    assert kept[gap] == f"... {sum(len(line) + 1 for line in missing)} bytes left out ..."


def test_lines_say_when_they_came_and_of_whom_and_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hidden-value-1234")
    storage = Storage(str(tmp_path))
    with RunLogs(storage) as logs:
        logs.add("w1-0", ["at first"])
        logs.on_record({"kind": "worker_warm", "member": "w1-0", "node": "host-7"})
        logs.on_record({"kind": "world_formed", "detail": {"ids": ["w1-1", "w1-0"]}})
        assert logs.add("w1-0", ["the key is hidden-value-1234"]) == ["the key is ***"]
        logs.add("../../w1-1", ["elsewhere"])

    first, second = storage.read("logs/w1-0.txt").decode().splitlines()
    assert first.split(" ", 2)[2] == "at first"
    assert second.split(" ", 2)[2] == "[rank 1, host-7] the key is ***"
    assert storage.names("logs") == [".._.._w1-1.txt", "w1-0.txt"]


def test_the_last_words_are_the_last_lines_and_the_stack():
    said = [f"step {number}" for number in range(50)]
    stack = ["Fatal Python error: Segmentation fault", "", "Current thread 0x1 (most recent call first):", '  File "a"']

    words = last_words([*said, *stack])

    assert words.startswith("its last lines:\n  | step 30\n")
    assert words.endswith("step 49\nits stack:\n" + "\n".join(f"  | {line}" for line in stack))
    assert last_words(["bye"]) == "its last lines:\n  | bye"
    assert last_words([]) == ""


def test_a_worker_s_output_is_read_as_it_comes_and_cut_off():
    spool = Spool()
    out, err = spool.open("w")
    with open(out, "ab", buffering=0) as printing, open(err, "ab", buffering=0) as failing:
        printing.write(b"one\ntwo\nthr")
        failing.write(b"oh\n")
        assert spool.read("w") == [("out", "one"), ("out", "two"), ("err", "oh")]
        for _ in range(10):
            printing.write(b"x" * (1 << 20) + b"\n")
            spool.read("w")
        printing.write(b"ee\nend")
    assert spool.read("w") == [("out", "ee")]
    assert spool.read("w", ended=True) == [("out", "end")]
    assert spool.read("unknown") == []
    spool.close()


@pytest.mark.parametrize(
    ("code", "memory", "says"),
    [
        (7, None, "exit code 7"),
        (-signal.SIGSEGV, None, "killed by SIGSEGV (a segmentation fault)"),
        (-signal.SIGUSR1, None, "killed by SIGUSR1"),
        (-99, None, "killed by signal 99"),
        (-signal.SIGKILL, None, "killed by SIGKILL, perhaps since memory ran out (see dmesg)"),
        (-signal.SIGKILL, "", "killed by SIGKILL: somebody killed it; nothing says that memory ran out"),
        (-signal.SIGKILL, "it ran out", "killed by SIGKILL: it ran out"),
    ],
)
def test_an_exit_code_in_words(code, memory, says):
    assert ended_how(code, memory) == says


def test_what_the_kernel_says_of_memory(tmp_path):
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 500 kB\n")
    memory = Memory(tmp_path, tmp_path)
    assert memory.ran_out() == ""

    (tmp_path / "vmstat").write_text("oom_kill 4\n")
    assert "out-of-memory killer" in memory.ran_out()
    assert memory.ran_out() == ""

    (tmp_path / "memory.max").write_text("100\n")
    (tmp_path / "memory.current").write_text("98\n")
    memory.look()
    assert "2% of it were left" in memory.ran_out()
    assert Memory(tmp_path / "nowhere", tmp_path / "nowhere").ran_out() == ""


def test_what_a_library_prints_at_exit_does_not_come_after_the_last_line_of_a_command():
    script = (
        "import atexit, sys\n"
        "atexit.register(print, 'OSError: handle is closed', file=sys.stderr)\n"
        "from elastic.observe.streams import sturdy_output\n"
        "with sturdy_output():\n    print('the last line')\n"
        "raise SystemExit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "the last line\n", "")
