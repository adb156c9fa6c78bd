"""The processes of a run without Ray: each runs a module of this package, gets its specification as one line of JSON on
standard input, and ends when that is closed, which happens however this process ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elastic.errors import ElasticError, RunFailed
from elastic.run.lookout import POLL_S, Lookout
from elastic.worker.deaths import ended_how

START_S = 60.0
AGAIN_S = 1.0  # between two starts
ADDRESSES = 3  # that are tried, since another process may take a port first


def start_module(
    arguments: Sequence[str], specification: Mapping[str, Any], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a module as a child of this process.

    Args:
        arguments: the module's name and its command line. The specification goes through standard input, so that
            process listings show no token.
        environment: further environment variables.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.PIPE,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already, which `poll` shows
        process.stdin.write(json.dumps(specification).encode() + b"\n")
        process.stdin.flush()
    return process


def end_process(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Have a child end; kill it after `timeout_s`."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it did not read everything
        process.stdin.close()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class ChildServer:
    """A child that serves at one address. If it dies or hangs, another one replaces it there.

    Args:
        what: its name, for texts.
        module: the module that runs in it.
        host: address to listen on, at a port that is free.
        look_s: seconds that an answer may take; after `lookout.LOOKS` failed looks it is replaced.
        environment: further environment variables.
        most: largest number of restarts.
    """

    def __init__(
        self, what: str, module: str, host: str, look_s: float, environment: Mapping[str, str], most: int = sys.maxsize
    ):
        self._what, self._module, self._host, self._environment, self._most = what, module, host, environment, most
        self._lookout = Lookout(what, look_s, self._answers, self._replace, self._ended)
        self._serving, self.restarts = False, 0
        self._take_address()

    def specification(self, port: int, why: str) -> dict[str, Any]:
        """What the process reads from standard input; `why` the last one was replaced, empty for the first."""
        raise NotImplementedError

    def ask(self, wait_s: float) -> None:
        """Send it any request.

        Raises:
            OSError, ElasticError: it does not answer within `wait_s`.
        """
        raise NotImplementedError

    def replaced(self, why: str) -> None:
        """Called on a thread of its own when another process has replaced it."""

    def wait(self) -> str:
        """Wait until it serves; returns its URL.

        Raises:
            RunFailed: it ended, or did not answer in time.
        """
        deadline, addresses = time.monotonic() + START_S, 1
        while not self._serving:
            try:
                self.ask(START_S)
                self._serving = True
                self._lookout.__enter__()
            except (OSError, ElasticError) as error:
                code = self.process.poll()
                if (code is not None and addresses == ADDRESSES) or time.monotonic() > deadline:
                    self.stop()
                    raise RunFailed(
                        f"{self._what} did not answer at {self.url} within {START_S:.0f} s (exit code {code})"
                    ) from error
                if code is not None:
                    end_process(self.process, START_S)
                    self._take_address()
                    addresses += 1
                time.sleep(POLL_S)
        return self.url

    def stop(self) -> None:
        """Have it end."""
        self._lookout.__exit__()
        end_process(self.process, START_S)

    def kill(self) -> None:
        """Kill it, as the loss of its node would."""
        self._lookout.__exit__()
        self.process.kill()
        end_process(self.process, START_S)

    def _take_address(self) -> None:
        with socket.socket() as probe:
            probe.bind((self._host, 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://{self._host}:{self.port}"
        self._start("")

    def _start(self, why: str) -> None:
        self._since = time.monotonic()
        self.process = start_module([self._module], self.specification(self.port, why), self._environment)

    # ---- on the lookout's thread -------------------------------------------------------------------------------------

    def _ended(self) -> str | None:
        code = self.process.poll()
        return None if code is None or self.restarts == self._most else f"ended: {ended_how(code)}"

    def _answers(self, wait_s: float) -> bool:
        began = time.monotonic()
        try:
            self.ask(wait_s)
        except (OSError, ElasticError):
            self._lookout.stopping.wait(began + wait_s - time.monotonic())  # a refused connection fails at once
            return False
        return True

    def _replace(self, why: str) -> None:
        self.process.kill()
        end_process(self.process, START_S)
        if self.restarts < self._most and not self._lookout.stopping.wait(self._since + AGAIN_S - time.monotonic()):
            self.restarts += 1
            self._start(why)
            self.replaced(why)
