"""`Job.prepare`, once a node for each command: under a lock in the node's temporary folder, which a process that dies
lets go of. A node is what shares that folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError, RunFailed
from elastic.job import Job
from elastic.job_code import failure_text
from elastic.units import parse_amount

LOOK_S = 0.1  # between two looks at the lock
SAY_S = 30.0  # between two messages of who waits
OLD_S = 7 * 24 * 3600.0  # after which what a command left is removed


def has_preparation(job: Job) -> bool:
    """Whether a job has a `prepare` of its own."""
    return type(job).prepare is not Job.prepare


def prepare_here(job: Job, config: TrainConfig) -> str:
    """Prepare the node of a command; returns the key under which its workers on this node find that done.

    Raises:
        ConfigError: `prepare` raised.
    """
    key = secrets.token_hex(8)
    try:
        prepare_node(job, key, timeout_s=timeout_s(config), say=print)
    except RunFailed as error:
        raise ConfigError(str(error)) from error
    return key


def timeout_s(config: TrainConfig) -> float:
    """Seconds for which a process waits for another one."""
    return parse_amount("--data.prepare-timeout", config.data.prepare_timeout, clock=True).seconds


def prepare_node(
    job: Job, key: str, *, timeout_s: float, say: Callable[[str], None], folder: str | os.PathLike[str] | None = None
) -> None:
    """Call the job's `prepare`, unless another process of this node has done so under the same key; wait for one that
    is doing it. Nothing if the job has none.

    Args:
        key: of the command; letters and digits.
        timeout_s: how long to wait for another process.
        say: called with a sentence at once and every SAY_S seconds while it waits.
        folder: that all processes of the node see; by default one in the temporary folder.

    Raises:
        RunFailed: it raised, here or in the process that was waited for, or that process took too long.
    """
    if not has_preparation(job):
        return
    place = Path(folder or os.path.join(tempfile.gettempdir(), f"elastic-prepared-{getpass.getuser()}"))
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_old(place)
    with (place / key).open("a+") as file:
        before = _read(file)
        with _locked(file, timeout_s, say):
            now = _read(file)
            if now.get("done"):
                return
            if now.get("failures", 0) > before.get("failures", 0):  # while this process waited
                raise RunFailed(f"{now['sentence']} (in another process of this node)")
            try:
                job.prepare()
            except (Exception, SystemExit) as error:
                text = failure_text("prepare()", error)
                sentence = text.splitlines()[0]
                _write(file, {"failures": now.get("failures", 0) + 1, "sentence": sentence})
                raise RunFailed(text) from error
            _write(file, {"done": True})


@contextlib.contextmanager
def _locked(file: IO[str], timeout_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """
    Raises:
        RunFailed: another process has the lock for too long.
    """
    began = time.monotonic()
    said = -SAY_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            waited = time.monotonic() - began
        if waited >= timeout_s:
            raise RunFailed(
                f"another process of this node has not ended the job's prepare() in {timeout_s:g} s; give "
                "--data.prepare-timeout if it takes longer"
            )
        if waited - said >= SAY_S:
            said = waited
            say(f"waits for the job's prepare(), which another process of this node runs, {waited:.0f} s so far")
        time.sleep(min(LOOK_S, timeout_s - waited))
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # for children too, which prepare() may have left with the file


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read() or "{}")
    except ValueError:  # its writer died within it
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: IO[str], values: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(values))
    file.flush()


def _remove_old(place: Path) -> None:
    for one in place.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - one.stat().st_mtime > OLD_S:
                one.unlink()
