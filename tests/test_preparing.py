"""`Job.prepare` is called once a node for each command; others of the node wait, and fail with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from elastic.data.preparing import SAY_S, prepare_node
from elastic.errors import ConfigError, RunFailed
from elastic.job import Job
from elastic.run.prepare import prepare
from tests.forked import configure, train
from tests.surface_jobs import Prepared

PATIENCE_S = 30.0


class Noted(Job):
    def __init__(self, folder: Path, what: str = ""):
        self.folder, self.what = folder, what

    def prepare(self):
        (self.folder / f"call-{os.getpid()}").touch()
        _until(lambda: not (self.folder / "hold").exists())
        if self.what:
            raise OSError(self.what)


def _until(holds) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def _one(folder: Path, what: str, timeout_s: float) -> None:
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        (folder / f"waits-{os.getpid()}").write_text(sentence)

    try:
        prepare_node(Noted(folder, what), "key", timeout_s=timeout_s, say=say, folder=folder / "locks")
        (folder / f"ended-{os.getpid()}").write_text("done")
    except RunFailed as error:
        (folder / f"ended-{os.getpid()}").write_text(str(error))


def _several(folder: Path, count: int, what: str = "", timeout_s: float = PATIENCE_S) -> list:
    """Processes of one node, of which one prepares while the others wait for it."""
    (folder / "hold").touch()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_one, args=(folder, what, timeout_s)) for _ in range(count)]
    for process in processes:
        process.start()
    _until(lambda: len(list(folder.glob("call-*"))) == 1 and len(list(folder.glob("waits-*"))) == count - 1)
    return processes


def _ended(folder: Path, processes: list) -> list[str]:
    for process in processes:
        process.join(PATIENCE_S)
    return sorted(path.read_text() for path in folder.glob("ended-*"))


def test_one_of_a_node_prepares_and_the_others_wait(tmp_path):
    processes = _several(tmp_path, 3)
    assert not list(tmp_path.glob("ended-*"))

    (tmp_path / "hold").unlink()

    assert _ended(tmp_path, processes) == ["done"] * 3
    assert len(list(tmp_path.glob("call-*"))) == 1
    [one, _] = tmp_path.glob("waits-*")
    assert one.read_text() == "waits for the job's prepare(), which another process of this node runs, 0 s so far"
    assert SAY_S < 60


def test_a_failure_is_one_sentence_for_all_that_waited_and_a_later_one_tries_again(tmp_path):
    processes = _several(tmp_path, 3, "no route to the data")
    (tmp_path / "hold").unlink()

    ended = [text.splitlines()[0] for text in _ended(tmp_path, processes)]

    assert len(list(tmp_path.glob("call-*"))) == 1
    assert all(
        text.startswith("prepare() failed, OSError: no route to the data (tests/test_preparing.py") for text in ended
    )
    assert [text.endswith("(in another process of this node)") for text in sorted(ended, key=len)] == [
        False,
        True,
        True,
    ]
    prepare_node(Noted(tmp_path), "key", timeout_s=1, say=print, folder=tmp_path / "locks")


def test_the_next_one_prepares_where_one_died_in_it(tmp_path):
    processes = _several(tmp_path, 2)
    [dead] = [p for p in processes if (tmp_path / f"call-{p.pid}").exists()]

    os.kill(dead.pid, signal.SIGKILL)
    _until(lambda: len(list(tmp_path.glob("call-*"))) == 2)
    (tmp_path / "hold").unlink()

    assert _ended(tmp_path, processes) == ["done"]


def test_who_waits_too_long_says_for_what(tmp_path):
    processes = _several(tmp_path, 2, timeout_s=0.5)
    _until(lambda: len(list(tmp_path.glob("ended-*"))) == 1)

    [ended] = (path.read_text() for path in tmp_path.glob("ended-*"))
    (tmp_path / "hold").unlink()
    _ended(tmp_path, processes)

    assert ended == (
        "another process of this node has not ended the job's prepare() in 0.5 s; give --data.prepare-timeout if it "
        "takes longer"
    )


def test_a_failure_in_the_command_is_bad_input(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^prepare\(\) failed, OSError: the disk is full \(tests/surface_jobs.py, line"
    ):
        prepare(Prepared(fails=True), configure(tmp_path, "run"))


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_prepares_its_machine_once_before_any_data_are_opened(tmp_path):
    ran = train(Prepared(folder=str(tmp_path)), configure(tmp_path, "run", run__duration="3st"), 3)

    assert ran.failure is None
    assert (tmp_path / "calls").read_text() == f"{os.getpid()}\n"  # the command itself has done it
