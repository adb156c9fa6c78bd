"""Commands that start in a tenth of a second: forks of the server of `tests.forked`, which has imported their needs."""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs.bench.nodes import Command
from tests import forked_actor
from tests.forked import _context, _take_environment


class ForkedCommand(Command):
    """`python -m MODULE ARGUMENTS`, `python SCRIPT ARGUMENTS` or `python -c PROGRAM`. What must not have been imported
    before, or needs a folder of its own on the path, is for a fresh Python: a `Command`.
    """

    def start(self, command: list[str], cwd: Path, environment: dict[str, str]) -> Any:
        python, *arguments = command
        assert python == sys.executable
        return _Process(arguments, cwd, environment)


class _Process:
    """Looks like the `subprocess.Popen` of a command whose output is read."""

    def __init__(self, arguments: list[str], cwd: Path, environment: dict[str, str]):
        reading, writing = _context.Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(reading.fileno()))
        self._process = _context.Process(target=_run, args=(arguments, cwd, environment, writing))
        self._process.start()
        reading.close()
        writing.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(arguments: list[str], cwd: Path, environment: dict[str, str], output: Connection) -> None:
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    _take_environment(environment)
    if "ray._raylet" in sys.modules:
        forked_actor.seed_again()
    warnings.filterwarnings("ignore", message=".*found in sys.modules.*", module="runpy")
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing does not
