"""Asks a live run: finds its membership server by the run's folder, and proves by a grant left there that it may
ask."""

from __future__ import annotations

import platform
import secrets
import time
import urllib.error
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from elastic.errors import ConfigError, ElasticError
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Drain, Grant, Request, Scale, Wish
from elastic.run.folder import LIVE_STATES, RunFolder, owner

Say = Callable[[str], None]
POLL_S = 0.1
AGAIN_S = 5.0
GONE_S = 30.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class NotLive(ElasticError):
    """Nobody drives the run, or its server cannot be reached from here."""


class LiveRun:
    """A connection to the server of a live run; made by `connect`. A server that was restarted gets a new grant."""

    def __init__(self, folder: RunFolder, address: str):
        self.folder = folder
        self._secret = secrets.token_urlsafe(32)
        self._link = DriverLink(address, self._secret)
        # how many servers took a grant; a restarted one does not know what was asked of the one before
        self.servers = 0

    def convince(self, timeout_s: float = 10.0) -> None:
        """Prove to the server that this process may write into the run's folder.

        Raises:
            OSError: the server cannot be reached, or did not accept the proof.
        """
        grant = secrets.token_hex(16)
        self.folder.leave_grant(grant, self._secret)
        try:
            self._link.request(Grant(grant, self._secret), timeout_s)
        finally:
            self.folder.withdraw_grant(grant)
        self.servers += 1

    def _request(self, what: str | Request, timeout_s: float = 10.0) -> dict[str, Any]:
        try:
            return self._link.request(what, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
        self.convince()
        return self._link.request(what, timeout_s)

    def look(self) -> dict[str, Any]:
        """Return status, group and workers, as the server sees them now.

        Raises:
            OSError: the server cannot be reached.
        """
        return self._request("/run")

    def stacks(self) -> dict[str, str]:
        """Return the stacks of all threads of each worker, by its id.

        Raises:
            OSError: the server cannot be reached.
        """
        found = self._request("/stacks")["stacks"]
        return {str(worker): str(text) for worker, text in found.items()}

    def ask(self, request: Request, timeout_s: float = 10.0) -> dict[str, Any]:
        """Send a request, and return the server's answer.

        Raises:
            ConfigError: the server refuses it.
            NotLive: the server cannot be reached any more.
        """
        try:
            return self._request(request, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 400:
                raise ConfigError(_reason(error)) from None
            raise ElasticError(
                f"the server of run {self.folder.storage.url} answered {error.code}: {_reason(error)}"
            ) from None
        except OSError as error:
            raise NotLive(f"the server of run {self.folder.storage.url} went away: {_reason(error)}") from error


def connect(folder: RunFolder, doing: str, timeout_s: float = 10.0) -> LiveRun:
    """Connect to the server of a live run, within `timeout_s`.

    Args:
        doing: what for, for messages.

    Raises:
        NotLive: nobody drives the run, or its server cannot be reached.
    """
    url = folder.storage.url
    status, driver = folder.status(), folder.live_driver()
    if driver is None:
        how = "was never started" if status is None else _ended(status)
        raise NotLive(f"run {url} {how}: there is nothing to {doing}")
    address = None if status is None else status.get("server")
    if status is None or address is None:
        raise NotLive(
            f"run {url} is driven by {driver}, which gives no address of its server; wait for its next status"
        )
    host = _host(address)
    if host is None:
        raise NotLive(
            f"run {url} gives {address!r} as the address of its server, which is not an address; see its status.json"
        )
    if host in _LOOPBACK and status["host"] != platform.node():
        raise NotLive(f"run {url} is served on {status['host']} for that machine alone; give the command there")
    live = LiveRun(folder, address)
    try:
        live.convince(timeout_s)
    except urllib.error.URLError as error:
        where = "give the command on a machine of its cluster, or on the one that drives it"
        raise NotLive(
            f"run {url} is driven by {driver}, but its server {address} cannot be reached: {_reason(error)}; {where}"
        ) from error
    except Exception as error:  # storage may raise anything; the user sees one sentence
        raise NotLive(
            f"only those who may write into the folder of run {url} can steer it: {_reason(error)}"
        ) from error
    return live


def _host(address: Any) -> str | None:
    """Return the host of a server's address, or None for an invalid one: anybody who may write into the folder may have
    written it."""
    try:
        parts = urlsplit(address)
        if parts.scheme != "http" or not parts.port or parts.hostname is None:
            return None
        if parts.hostname not in _LOOPBACK:
            ip_address(parts.hostname)
        return parts.hostname
    except (ValueError, TypeError, AttributeError):
        return None


def _ended(status: dict[str, Any]) -> str:
    state = "lost" if status["status"] in LIVE_STATES else status["status"]
    return f"is not live ({state} after step {status.get('step', 0)})"


def _reason(error: Exception) -> str:
    detail = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
    return " ".join(f"{detail or error}".split()) or type(error).__name__


# ---- commands ------------------------------------------------------------------------------------------------------


class _Watch:
    """Watches a run until a condition holds, and prints what changes.

    Args:
        doing: what the run has to do, for messages.
        ask: asks the run again, if its server was restarted.
    """

    def __init__(self, live: LiveRun, say: Say, timeout_s: float, doing: str, ask: Callable[[], object]):
        self._live, self._say, self._doing, self._ask = live, say, doing, ask
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._said, self._servers = "", live.servers
        self._unreached_since: float | None = None

    def look(self) -> dict[str, Any] | None:
        """Return what the server sees, after POLL_S; None if the run has ended.

        Raises:
            NotLive: the server is gone, but the run has not ended.
            ElasticError: it took too long.
        """
        time.sleep(POLL_S)
        now = time.monotonic()
        if now > self._deadline:
            raise ElasticError(
                f"run {self._live.folder.storage.url} has been asked, but after {self._timeout_s:g} s it had still to "
                f"{self._doing} ({self._said}); it does so when it can, and elastic status tells"
            )
        try:
            seen = self._live.look()
        except OSError as error:
            return self._gone(error, now)
        if seen["status"]["status"] not in LIVE_STATES:
            return self._gone(TimeoutError("it has ended, but has not written so"), now)
        self._unreached_since = None
        if self._live.servers > self._servers:
            self._servers = self._live.servers
            self._ask()
        self._print_progress(seen)
        return seen

    def _gone(self, error: OSError, now: float) -> dict[str, Any] | None:
        status = self._live.folder.status()
        if status is not None and status["status"] not in LIVE_STATES:
            return None
        self._unreached_since = self._unreached_since or now
        if now - self._unreached_since > GONE_S:
            raise NotLive(
                f"the server of run {self._live.folder.storage.url} went away and did not come back: {_reason(error)}"
            ) from error
        return {"status": status or {}, "group": {"members": [], "gone": [], "phase": "away"}, "workers": []}

    def _print_progress(self, seen: dict[str, Any]) -> None:
        group, status = seen["group"], seen["status"]
        text = f"{status['status']}, {len(group['members'])} in the world, {len(group['waiting'])} outside of it"
        phases = {w["phase"] for w in seen["workers"]} & {"eval", "checkpoint", "first step", "load", "connect"}
        text += f", {', '.join(sorted(phases))}" if phases else ""
        if text != self._said:
            self._said = text
            self._say(f"step {status['step']}: {text}")


def stop(live: LiveRun, say: Say, timeout_s: float) -> dict[str, Any]:
    """Have the run save and end at its next step boundary, wait for that, and return its last status."""

    def ask() -> None:
        live.ask(Wish("stop", f"stopped by {owner()}"))

    ask()
    say("asked to save and end at the next step boundary")
    return _outcome(live, _Watch(live, say, timeout_s, "end", ask))


def _outcome(live: LiveRun, watch: _Watch) -> dict[str, Any]:
    while watch.look() is not None:
        pass
    status = live.folder.status()
    assert status is not None
    return {name: status.get(name) for name in ("status", "step", "total_steps", "checkpoint", "message")}


def checkpoint(live: LiveRun, say: Say, timeout_s: float) -> dict[str, Any]:
    """Have the run save at its next step boundary, wait until that is committed, and return the step.

    Raises:
        ElasticError: it could not be saved.
    """
    first = live.look()["status"]

    def ask() -> None:
        live.ask(Wish("save", f"asked for by {owner()}"))

    watch, asked_at = _Watch(live, say, timeout_s, "commit a checkpoint", ask), -AGAIN_S
    while True:
        if time.monotonic() - asked_at > AGAIN_S:  # a save that was under way may have made the run skip this one
            ask()
            asked_at = time.monotonic()
        seen = watch.look()
        now = seen["status"] if seen is not None else live.folder.status() or {}
        saved, failed = now.get("checkpoint"), now.get("checkpoint_failed")
        if saved is not None and saved >= first["step"] and saved != first["checkpoint"]:
            return {"step": saved}
        if failed is not None and failed != first["checkpoint_failed"]:
            raise ElasticError(f"the checkpoint of step {failed['step']} failed: {failed['error']}")
        if seen is None:
            raise ElasticError(f"run {live.folder.storage.url} ended without another checkpoint: {_ended(now)}")


def scale(live: LiveRun, max_workers: int, say: Say, timeout_s: float) -> dict[str, Any]:
    """Give the run another max_workers, and wait until its world has the size that follows from it."""
    from elastic.membership.forming import helpful_size

    config = (live.folder.config() or {}).get("config", {})
    was = live.ask(Scale(max_workers, owner()))["was"]
    least = config.get("scaling", {}).get("min_workers", 1)
    parallel = config.get("parallel", {})
    cell_size, stages = parallel.get("tensor", 1), parallel.get("pipeline", 1)
    wanted = helpful_size(config.get("batch", {}).get("microbatches"), max_workers, least, cell_size, stages)
    say(f"--scaling.max-workers is {max_workers}, was {was}; waiting for a world of {wanted}")
    # nothing to ask again: the new number is in the ledger
    watch = _Watch(live, say, timeout_s, f"have a world of {wanted}", lambda: None)
    while True:
        seen = watch.look()
        if seen is None:
            return {"max_workers": max_workers, "was": was, **_outcome(live, watch)}
        size = len(seen["group"]["members"])
        if seen["group"]["phase"] == "running" and wanted <= size <= max_workers:
            return {"max_workers": max_workers, "was": was, "world_size": size, "step": seen["status"]["step"]}


def drain(live: LiveRun, worker: str, seconds: float, say: Say, timeout_s: float) -> dict[str, Any]:
    """Have a worker hand over and end, and wait for that.

    Args:
        worker: its id, or the beginning of it.
        seconds: for so long it stays if no other worker can take its place.
    """

    def ask(whom: str) -> dict[str, Any]:
        return live.ask(Drain(whom, seconds, owner()))

    drained = ask(worker)
    name = drained["id"]
    say(f"worker {name} on node {drained['node']} hands over")
    watch = _Watch(live, say, timeout_s, f"let worker {name} go", lambda: ask(name))
    while True:
        seen = watch.look()
        if seen is None or name in seen["group"]["gone"]:
            status = live.folder.status() if seen is None else seen["status"]
            return {"worker": name, "node": drained["node"], "step": (status or {}).get("step")}
