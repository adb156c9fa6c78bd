"""Telling somebody of a run: a message to a URL, or to a command. Whatever fails there costs the run nothing."""

from __future__ import annotations

import json
import queue
import shlex
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from elastic.errors import ConfigError, one_line
from elastic.observe.ledger import finite
from elastic.observe.notify import Attention, Message
from elastic.redact import clean, redact

DEADLINE_S = 10.0  # for one message
_CLOSE_S = 15.0  # for the last ones


class Notifier:
    """Sends messages on a thread of its own. `hear` and `tick` from any thread.

    Args:
        to: a URL, which gets JSON, or a command, which gets the text as its last word and the JSON on standard input.
        say: told once in a row that a message could not be sent, and why.
    """

    def __init__(self, run: str, to: str, say: Callable[[str], None]):
        self._run, self._to, self._say = run, to, say
        self._attention, self._lock = Attention(run), threading.Lock()
        self._queue: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="run-notifier", daemon=True)
        self._thread.start()

    def hear(self, record: dict[str, Any]) -> None:
        """A row or event of the run has come."""
        if "kind" in record:
            with self._lock:
                found = self._attention.hear(record, time.monotonic())
            self._put(found)

    def tick(self) -> None:
        """Look whether something has lasted too long."""
        with self._lock:
            found = self._attention.tick(time.monotonic())
        self._put(found)

    def close(self) -> None:
        """Send what is left, for a while."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _put(self, messages: list[Message]) -> None:
        for message in messages:
            self._queue.put(message)

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                send(self._to, clean(finite(message.to_json(self._run))))
                self._failed = False
            except Exception as error:  # whatever a service or a command does: it is told, and training goes on
                if not self._failed:
                    why = redact(one_line(error)).replace(self._to, "***")
                    self._say(f"warning: --observe.notify could not be told of it ({message.kind}): {why}")
                self._failed = True


def send(to: str, values: dict[str, Any], deadline_s: float = DEADLINE_S) -> None:
    """Send one message.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: it was not taken within the deadline.
    """
    data = json.dumps(values, allow_nan=False).encode()
    if is_url(to):
        request = urllib.request.Request(to, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=deadline_s) as answer:
            answer.read(1 << 16)
        return
    command = [*shlex.split(to), values["text"]]
    subprocess.run(command, input=data, timeout=deadline_s, check=True, stdout=subprocess.DEVNULL)


def check_target(to: str | None) -> None:
    """Refuse a command that this machine does not have.

    Raises:
        ConfigError: it is none.
    """
    if to is not None and not is_url(to) and shutil.which(shlex.split(to)[0]) is None:
        raise ConfigError(f"--observe.notify is {to!r}, but there is no program {shlex.split(to)[0]!r}; give its path")


def is_url(to: str) -> bool:
    return to.startswith(("http://", "https://"))
