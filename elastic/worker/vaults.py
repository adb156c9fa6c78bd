"""The vaults of a run in plain processes: one process for each node on which workers count as being."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic.run.lookout import LOOKS
from elastic.snapshot.client import VaultClient
from elastic.worker.children import ChildServer

HANG_TIMEOUT_S = 30.0


class VaultProcess(ChildServer):
    """A vault in a process of its own. When it ends its contents are lost, and the next one is empty.

    Args:
        environment: further environment variables of the process.
        hang_timeout_s: a vault that does not answer for so long is replaced.
        on_restart: called with the reason on a thread of its own, after it was replaced.
    """

    def __init__(
        self,
        token: str,
        host: str,
        environment: dict[str, str],
        hang_timeout_s: float = HANG_TIMEOUT_S,
        on_restart: Callable[[str], None] = lambda why: None,
    ):
        self._token, self._on_restart = token, on_restart
        super().__init__("it", "elastic.snapshot", host, hang_timeout_s / LOOKS, environment)

    def specification(self, port: int, why: str) -> dict[str, Any]:
        """The JSON that `elastic.snapshot` reads."""
        return {"token": self._token, "host": self._host, "port": port}

    def ask(self, wait_s: float) -> None:
        """Ask how much memory it uses."""
        client = VaultClient(self.url, self._token, wait_s)
        try:
            client.memory()
        finally:
            client.close()

    def replaced(self, why: str) -> None:
        """Report the reason."""
        self._on_restart(why)
