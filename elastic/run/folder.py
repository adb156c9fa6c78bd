"""The folder of a run in storage: configuration, status, claims, grants and result."""

from __future__ import annotations

import contextlib
import getpass
import hmac
import json
import os
import re
import socket
import time
from collections.abc import Iterable
from typing import Any

from elastic.errors import ConfigError
from elastic.membership.access import digest
from elastic.observe.ledger import finite
from elastic.redact import clean
from elastic.run.process import has_ended, identity
from elastic.storage import Storage

FORMAT = 1
CONFIG, STATUS, RESULT, CLAIMS = "config.json", "status.json", "result.json", "claims"
GRANTS = "control"
ALIVE_S = 60.0
GRANT_S = 600.0
LIVE_STATES = ("running", "parked")
_STATUS: dict[str, tuple[type, ...]] = {
    "status": (str,),
    "heartbeat": (int, float),
    "owner_process": (dict, type(None)),
    "owner": (str, type(None)),
    "message": (str, type(None)),
    "step": (int, type(None)),
    "world": (dict, type(None)),
    "members": (list, type(None)),
}
_CLAIM = re.compile(r"(\d{6,12})\.json\Z")


class DamagedError(ConfigError):
    """A file in a run's folder is not as this program writes it."""


def newest_claim(names: Iterable[str]) -> int:
    """The highest epoch of the claims in a listing, 0 if there is none. Other files are ignored: editors, desktops, NFS
    and copying tools leave some there."""
    return max((int(match[1]) for match in map(_CLAIM.match, names) if match), default=0)


def claim_name(folder: str, epoch: int) -> str:
    """The name of a claim's file."""
    return f"{folder}/{epoch:06d}.json"


def claim_values() -> dict[str, Any]:
    """The contents of a claim: who made it, and when."""
    return {"owner": owner(), "process": identity(), "time": time.time()}


def may_live(process: Any, age_s: float) -> bool:
    """Whether a driver may live whose last sign is `age_s` seconds old; on this machine its process is looked up."""
    return age_s < ALIVE_S and not has_ended(process)


def storage_age_s(storage: Storage, name: str) -> float:
    """Seconds since an object was written, by the clock of its storage, since clocks of machines may differ by minutes.
    It writes a file to read that clock."""
    try:
        return max(0.0, storage.now() - storage.modified(name))
    except FileNotFoundError:
        return float("inf")


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
        except (ValueError, RecursionError) as error:
            raise self._damaged(name, f"{type(error).__name__}: {error}") from error
        if not isinstance(found, dict):
            raise self._damaged(name, f"a {type(found).__name__}")
        if found.get("format") != FORMAT:
            raise ConfigError(
                f"{self.storage.path(name)} has format {found.get('format')!r}, this version reads {FORMAT}; "
                "use the version of elastic-train that wrote it, or a newer one"
            )
        return found

    def _damaged(self, name: str, why: str) -> DamagedError:
        way = "remove it" if name == STATUS else "put back a copy of it, or give another --run.name"
        return DamagedError(f"{self.storage.path(name)} is damaged ({why}); {way}")

    def config(self) -> dict[str, Any] | None:
        return self._read(CONFIG)

    def write_config(self, values: dict[str, Any]) -> None:
        self.storage.replace(CONFIG, _json(values))

    def status(self) -> dict[str, Any] | None:
        """The status of the run.

        Raises:
            DamagedError: the file is damaged.
        """
        found = self._read(STATUS)
        wrong = (
            [] if found is None else [key for key, types in _STATUS.items() if not isinstance(found.get(key), types)]
        )
        if wrong:
            assert found is not None
            raise self._damaged(STATUS, f"{wrong[0]} is {found.get(wrong[0])!r}"[:100])
        return found

    def status_if_whole(self) -> dict[str, Any] | None:
        """The status, None if it is damaged: a driver does not depend on it, and writes the next one soon."""
        with contextlib.suppress(DamagedError):
            return self.status()
        return None

    def write_status(self, values: dict[str, Any]) -> None:
        self.storage.replace(STATUS, _json(values))

    def result(self) -> dict[str, Any] | None:
        return self._read(RESULT)

    def write_result(self, values: dict[str, Any]) -> None:
        self.storage.replace(RESULT, _json(values))

    def newest_epoch(self) -> int:
        """The epoch of the highest claim; 0 if the run was never claimed."""
        return newest_claim(self.storage.names(CLAIMS))

    def live_driver(self, *, by_storage: bool = False) -> str | None:
        """The driver that seems to be alive, and when it last gave a sign; None if there is none.

        A driver that was killed on this machine is known to be dead at once; elsewhere its heartbeat becomes too old.

        Args:
            by_storage: compute the age of a heartbeat by the storage's clock (see `storage_age_s`), not this machine's.
        """
        return self._driver(self.newest_epoch(), by_storage=by_storage)

    def _driver(self, epoch: int, *, by_storage: bool) -> str | None:
        status, claim = self.status_if_whole(), self._claim(epoch)
        if claim.get("ended"):
            return None

        def age_s(name: str, written: Any) -> float:
            if by_storage:
                return storage_age_s(self.storage, name)
            return max(0.0, time.time() - written) if isinstance(written, (int, float)) else float("inf")

        if status is not None and status["status"] in LIVE_STATES:
            age = age_s(STATUS, status["heartbeat"])
            if may_live(status.get("owner_process"), age):
                return f"{status.get('owner')} (heartbeat {age:.0f} s ago)"
        if epoch and (status is None or status.get("epoch") != epoch):  # that driver is starting, and has no status yet
            age = age_s(claim_name(CLAIMS, epoch), claim.get("time"))
            if may_live(claim.get("process"), age):
                return f"{claim.get('owner')} (which claimed it {age:.0f} s ago)"
        return None

    def _claim(self, epoch: int) -> dict[str, Any]:
        """The contents of a claim; empty if it is damaged or missing."""
        with contextlib.suppress(ConfigError):
            return self._read(claim_name(CLAIMS, epoch)) or {}
        return {}

    def leave_grant(self, grant: str, secret: str) -> None:
        """Leave the hash of a secret, which proves to the run's server that this process may write here."""
        values = {"sha256": digest(secret), "time": time.time(), "by": owner()}
        self.storage.create(f"{GRANTS}/{grant}.json", _json(values))

    def withdraw_grant(self, grant: str) -> None:
        self.storage.remove(f"{GRANTS}/{grant}.json")

    def redeem(self, grant: str, secret: str) -> bool:
        """Whether `grant` was left for this secret a short time ago. It is removed, so it counts once."""
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
        epoch = self.newest_epoch()  # read first: if two drivers see no other one, the create below refuses one of them
        driver = None if take_over else self._driver(epoch, by_storage=True)
        if driver is not None:
            raise ConfigError(
                f"run {self.storage.path('')} is being driven by {driver}; "
                "stop that one, choose another --run.name, or give --run.take-over"
            )
        try:
            self.storage.create(claim_name(CLAIMS, epoch + 1), _json(claim_values()))
        except FileExistsError:
            raise ConfigError(
                f"run {self.storage.path('')} was claimed by another driver at this moment; stop one of the two"
            ) from None
        return epoch + 1

    def claimed_at(self, epoch: int) -> float | None:
        """The time in this claim, which differs between two claims of one epoch; None if there is none."""
        at = self._claim(epoch).get("time")
        return at if isinstance(at, float) else None

    def write_anew(self, epoch: int, config: dict[str, Any] | None, claim: dict[str, Any]) -> None:
        """Write claim and configuration again: the folder of a live run was removed.

        Raises:
            FileExistsError: another command claimed the run meanwhile.
        """
        self.storage.create(claim_name(CLAIMS, epoch), _json(claim))
        if config is not None:
            self.write_config(config)

    def release(self, epoch: int) -> None:
        """Mark the claim as ended, so that the next driver need not wait until it is old."""
        name = claim_name(CLAIMS, epoch)
        with contextlib.suppress(Exception):  # any error of storage: the claim soon becomes too old to block anyone
            if self.storage.exists(name):  # otherwise the folder was removed
                self.storage.replace(name, _json({**self._claim(epoch), "ended": time.time()}))


def owner() -> str:
    """User, host and process id of this process, as a text for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()} (process {os.getpid()})"
