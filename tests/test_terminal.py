"""A terminal is not the run: output that breaks turns the console off and nothing else, a hangup saves and ends, and
what a killed driver started ends by itself."""

from __future__ import annotations

import io
import os
import pty
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from elastic import cli
from elastic.checkpoint.reader import newest_first
from elastic.observe.console import Console
from elastic.observe.ledger import METRICS, read_records
from elastic.observe.streams import Sturdy
from elastic.run.folder import RunFolder
from elastic.run.prepare import prepare
from elastic.run.signals import handled_by
from elastic.storage import Storage
from elastic.worker.__main__ import main
from elastic.worker.local import LocalRun
from tests import leaks
from tests.forked import LONG, STDOUT, WAIT_S, configure, fault, fork, fork_driver, plan, wait_until
from tests.tiny_jobs import Everything

AT_ONCE_S = 5.0


def filled_pipe() -> tuple[int, int]:
    """A pipe that nobody reads, and that takes nothing more."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    return reading, writing


def row(step: int) -> dict:
    return {"step": step, "loss": 1.0, "world_size": 1, "time": float(step), "samples": 4}


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def closed_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def closed_terminal() -> io.TextIOWrapper:
    ours, theirs = pty.openpty()
    stream = os.fdopen(theirs, "w")
    os.close(ours)
    return stream


def closed() -> io.TextIOWrapper:
    stream = full()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [full, closed_pipe, closed_terminal, closed])
def test_output_that_breaks_turns_the_console_off(make, capsys):
    stream = make()
    seen: list[OSError] = []
    console = Console(10, 0.0, Sturdy(stream, on_break=seen.append))
    for step in range(1, 4):
        console.record(row(step))
        console.record({"kind": "parked", "time": 1.0, "generation": "1-1"})
    console.print("the end")
    console.close()
    assert len(seen) == 1, "it is found once, and not tried again"
    assert capsys.readouterr() == ("", "")
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno()) if not stream.closed else None
    stream.close()


def test_a_reader_that_takes_nothing_is_waited_for_once_and_goes_on_when_it_does():
    reading, writing = filled_pipe()
    with os.fdopen(writing, "w") as stream, os.fdopen(reading, "rb", buffering=0) as reader:
        out = Sturdy(stream, patience_s=0.2)
        began = time.monotonic()
        for _ in range(100):
            print("lost", file=out)
        assert time.monotonic() - began < 2.0
        assert out.broken is None
        assert os.get_blocking(writing), "others who write there expect it to wait"
        while len(reader.read(1 << 20)) == 1 << 20:
            pass
        print("heard", file=out)
        assert reader.read(100).endswith(b"heard\n")


def test_a_reader_that_is_slow_gets_everything():
    reading, writing = os.pipe()
    got = bytearray()

    def read() -> None:
        while piece := os.read(reading, 8192):
            got.extend(piece)
            time.sleep(0.001)

    reader = threading.Thread(target=read)
    reader.start()
    text = "".join(f"line {i}\n" for i in range(50_000))
    with os.fdopen(writing, "w") as stream:
        out = Sturdy(stream, patience_s=None)
        print(text, end="", file=out)
        del out
    reader.join(WAIT_S)
    os.close(reading)
    assert got.decode() == text


def test_what_a_terminal_cannot_show_is_spelled_out():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print("größer →", file=Sturdy(stream))
    assert stream.detach().getvalue() == b"gr\\xf6\\xdfer \\u2192\n"


def test_a_command_that_looks_says_that_its_output_failed_but_not_that_a_pipe_was_closed(tmp_path, monkeypatch, capsys):
    for make, code, said in ((full, 1, "standard output cannot be written"), (closed_pipe, 0, "")):
        with make() as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert cli.main(["runs", str(tmp_path)]) == code
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == (1 if said else 0)


def test_a_hangup_is_heard_unless_it_was_to_be_ignored():
    heard: list[str] = []
    with handled_by(heard.append):
        for _ in range(2):  # the second is no impatience: a shell sends it after its terminal did
            os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handled_by(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == ["SIGHUP", "SIGTERM"]


# ---- processes -----------------------------------------------------------------------------------------------------


def _command(output: str, arguments: list[str], environment: dict[str, str]) -> None:
    """`python -m elastic.worker`, with such an output."""
    os.environ.update(environment)
    os.setsid()
    if output == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    elif output == "stuck":
        descriptor = filled_pipe()[1]
    elif output == "closed":
        reading, descriptor = os.pipe()
        os.close(reading)
    else:
        descriptor = os.open(output, os.O_RDWR)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["elastic.worker", *arguments]
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arguments(storage: Path, name: str, **options: object) -> list[str]:
    given = {"run.storage": storage, "run.name": name, "job.samples": LONG, "run.exactness": "bitwise", **options}
    plain = [str(word) for key, value in given.items() for word in (f"--{key.replace('__', '.')}", value)]
    return [
        "--module",
        "tests.tiny_jobs",
        "--class",
        "Talking",
        "--workers",
        "1",
        "--observe.no-tensorboard",
        *plain,
    ]


@pytest.fixture
def processes(fork_server):
    """Looks at the processes that a test started; none may be left."""
    before = leaks.take()
    with leaks.adopting_orphans():
        yield lambda: leaks.descendants(os.getpid()).keys() - before.processes.keys()
        assert leaks.wait_until_clean(before) == []


@pytest.mark.processes
@pytest.mark.long
def test_a_run_whose_output_breaks_ends_as_it_would(processes, tmp_path, undisturbed_epoch):
    outputs = ("full", "closed", "stuck")
    options = {"data.workers": 1}
    commands = [
        fork_driver(_command, output, _arguments(tmp_path, output, **options), {STDOUT: "/dev/full"})
        for output in outputs
    ]
    for command in commands:
        command.join(WAIT_S)

    assert [command.exitcode for command in commands] == [0] * len(outputs)
    for output in outputs:
        folder = RunFolder(Storage(str(tmp_path / output)))
        assert (folder.status() or {})["status"] == "finished"
        assert (folder.result() or {})["weights_sha256"] == undisturbed_epoch.sha


@pytest.mark.processes
@pytest.mark.long
def test_a_terminal_that_closes_saves_and_ends_the_run(processes, tmp_path, gate):
    ours, theirs = pty.openpty()
    held = gate("held")
    options = {"checkpoint.every": "2st", "data.workers": 1}
    faults = plan(fault("step.forward", 6, 0, "hold", file=held))
    before = processes()
    command = fork_driver(_command, os.ttyname(theirs), _arguments(tmp_path, "run", **options), faults)
    storage = Storage(str(tmp_path / "run"))
    wait_until(lambda: any(c.step == 4 for c in newest_first(storage)), "the checkpoint of step 4")
    assert os.read(ours, 4096), "it was shown there"

    os.close(theirs)
    os.close(ours)
    for process in processes() - before:  # who is in the foreground of a terminal
        os.kill(process, signal.SIGHUP)
    held.unlink()
    command.join(WAIT_S)

    assert command.exitcode == 130
    status = RunFolder(storage).status() or {}
    assert (status["status"], status["message"]) == ("stopped", "interrupted by SIGHUP")
    rows = read_records(storage, METRICS)
    assert next(newest_first(storage)).step == status["step"] == rows[-1]["step"] >= 4, "not a step is lost"


def _own_host(storage: str, environment: dict[str, str]) -> None:
    config = configure(
        storage,
        "run",
        checkpoint__every="2st",
        data__workers=1,
        parallel__strategy="fsdp",
        recovery__snapshot_every="2st",
        scaling__max_workers=1,
    )
    run = prepare(Everything(samples=LONG), config)
    with LocalRun(run, 1, own_host={}, environment=environment) as local:
        local.wait(WAIT_S)


@pytest.mark.processes
@pytest.mark.long
def test_what_a_killed_driver_started_ends_at_once(processes, tmp_path, gate):
    faults = plan(fault("step.forward", 6, None, "hold", file=gate("held")))
    driver = fork(_own_host, str(tmp_path), faults)  # its workers are commands, whose loaders have a fork server
    storage = Storage(str(tmp_path / "run"))
    wait_until(lambda: (found := next(newest_first(storage), None)) is not None and found.step >= 4, "step 4")
    there = processes()
    assert len(there) >= 7, "driver, host, worker, vault, uploader, fork server and loader process"

    driver.kill()
    driver.join()
    began = time.monotonic()
    wait_until(lambda: not processes(), "orphans to end")

    assert time.monotonic() - began < AT_ONCE_S
