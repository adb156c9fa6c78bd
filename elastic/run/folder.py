"""The folder of a run in storage: configuration, status, claims and result."""

from __future__ import annotations

import getpass
import hmac
import json
import os
import socket
import time
from typing import Any

from elastic.errors import ConfigError
from elastic.membership.access import digest
from elastic.observe.ledger import finite
from elastic.redact import clean
from elastic.run.process import has_ended
from elastic.storage import Storage

FORMAT = 1
CONFIG, STATUS, RESULT, CLAIMS = "config.json", "status.json", "result.json", "claims"
GRANTS = "control"
ALIVE_S = 60.0
GRANT_S = 600.0
LIVE_STATES = ("running", "parked")


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(clean(finite({"format": FORMAT, **values})), indent=1) + "\n").encode()


class RunFolder:
    """Typed access to `<storage>/<run>`."""

    def __init__(self, storage: Storage):
        self.storage = storage

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self.storage.read(name))
        except FileNotFoundError:
            return None
        if found.get("format") != FORMAT:
            raise ConfigError(
                f"{self.storage.path(name)} has format {found.get('format')!r}, this version reads {FORMAT}; "
                "use the version of elastic-train that wrote it, or a newer one"
            )
        return found

    def config(self) -> dict[str, Any] | None:
        return self._read(CONFIG)

    def write_config(self, values: dict[str, Any]) -> None:
        self.storage.replace(CONFIG, _json(values))

    def status(self) -> dict[str, Any] | None:
        return self._read(STATUS)

    def write_status(self, values: dict[str, Any]) -> None:
        self.storage.replace(STATUS, _json(values))

    def result(self) -> dict[str, Any] | None:
        return self._read(RESULT)

    def write_result(self, values: dict[str, Any]) -> None:
        self.storage.replace(RESULT, _json(values))

    def newest_epoch(self) -> int:
        """The highest claim's epoch; 0 where nobody ever claimed the run."""
        return max((int(n.removesuffix(".json")) for n in self.storage.names(CLAIMS)), default=0)

    def live_driver(self) -> str | None:
        """Who seems to be driving the run now, and the age of the heartbeat; None where nobody is.

        Who was killed on this machine is known to be dead at once, elsewhere by its heartbeat.
        """
        status = self.status()
        if status is None or status["status"] not in LIVE_STATES or has_ended(status.get("owner_process")):
            return None
        age = time.time() - status["heartbeat"]
        return f"{status['owner']} (heartbeat {age:.0f} s ago)" if age < ALIVE_S else None

    def leave_grant(self, grant: str, secret: str) -> None:
        """Prove to the run's server that this process may write here: leave the hash of a secret."""
        values = {"sha256": digest(secret), "time": time.time(), "by": owner()}
        self.storage.create(f"{GRANTS}/{grant}.json", _json(values))

    def withdraw_grant(self, grant: str) -> None:
        self.storage.remove(f"{GRANTS}/{grant}.json")

    def redeem(self, grant: str, secret: str) -> bool:
        """Whether `grant` was left for this secret, a short while ago. It is removed: it counts once."""
        found = self._read(f"{GRANTS}/{grant}.json")
        if found is None or not hmac.compare_digest(found["sha256"], digest(secret)):
            return False
        self.withdraw_grant(grant)
        return abs(time.time() - found["time"]) < GRANT_S

    def claim(self, *, take_over: bool) -> int:
        """Claim the run for this driver.

        Returns:
            the claim's epoch.

        Raises:
            ConfigError: another driver seems alive, or claimed it at the same moment.
        """
        driver = None if take_over else self.live_driver()
        if driver is not None:
            raise ConfigError(
                f"run {self.storage.path('')} is being driven by {driver}; "
                "stop that one, choose another --run.name, or give --run.take-over"
            )
        epoch = self.newest_epoch() + 1
        try:
            self.storage.create(f"{CLAIMS}/{epoch:06d}.json", _json({"owner": owner(), "time": time.time()}))
        except FileExistsError:
            raise ConfigError(
                f"run {self.storage.path('')} was claimed by another driver at this moment; stop one of the two"
            ) from None
        return epoch


def owner() -> str:
    """Who this process is, for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()} (process {os.getpid()})"
