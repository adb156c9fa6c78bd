"""One complete look at a run: from its folder and, if it is live, from its server.

All tools that show a run show this: the report, the terminal, the page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from elastic.errors import ConfigError, one_line
from elastic.observe.account import Account
from elastic.observe.console import event_text
from elastic.observe.health import GOOD, NOTED, POOR, Health, Sign
from elastic.observe.history import History
from elastic.observe.ledger import EVENTS, METRICS, Follower
from elastic.redact import redact
from elastic.run.accounts import account_of_run
from elastic.run.folder import LIVE_STATES, RunFolder
from elastic.tools.inspecting import list_checkpoints
from elastic.tools.live import LiveRun, NotLive, connect
from elastic.tools.registry import ASK_S, recorded, state_of

LOGS = "logs"  # in a run's folder: what its workers printed, one file each
ACCOUNT_S = 15.0  # seconds; reading the whole ledger may take at most one part in twenty of the time
AGAIN_S = 10.0  # seconds before a server that could not be reached is asked again
CHECKPOINTS_S = 10.0  # seconds; listing checkpoints takes many round trips to object storage


@contextmanager
def foreign_is_named(url: str) -> Iterator[None]:
    """While this context is open, an error from a folder's contents says that they are to blame.

    Raises:
        ConfigError: the folder's contents were not written by a run.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"URL is {url!r}, which holds what no run wrote ({one_line(error)}); give the folder of a run, or remove "
            "what is damaged in it"
        ) from error


class Onlooker:
    """Looks at one run repeatedly; what was read once is not read again."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.history = History()
        self._rows, self._events = Follower(folder.storage, METRICS), Follower(folder.storage, EVENTS)
        self._live: LiveRun | None = None
        self._not_asked: str | None = None
        self._ask_at = self._list_at = 0.0
        self._checkpoints: list[dict[str, Any]] = []
        self._logs: list[str] = []
        self._config: dict[str, Any] | None = None
        self._account: dict[str, Any] | None = None
        self._account_at = float("-inf")
        self._health = Health()

    def look(self) -> dict[str, Any]:
        """Return everything that people may want to see, as JSON values.

        Raises:
            ConfigError: it is no run, or its folder's contents were not written by a run.
        """
        url = redact(self.folder.storage.url)
        with foreign_is_named(url), ThreadPoolExecutor(4, "look") as pool:  # each takes a round trip or more to storage
            rows, events = pool.submit(self._rows.new), pool.submit(self._events.new)
            saved, result = pool.submit(self._saved), pool.submit(self.folder.result)
            status = self.folder.status()
            self._config = self._config or self.folder.config()
            seen = self._ask(status)
            self.history.add_rows(rows.result())
            self.history.add_events(events.result())
            if any(e.get("kind") == "checkpoint_committed" for e in events.result()):
                self._list_at = 0.0  # the next look lists the checkpoint that was just committed
            self._health.add(rows.result(), events.result())
            self._keep_account(status, rows.result(), events.result())
            if seen is not None:
                self.history.add_recent(seen["rows"])
                status = seen["status"]
            found = self._view(url, status, seen, result.result() or {})
            found["checkpoints"], found["logs"] = saved.result(), self._logs
            found["health"] = [shown_sign(sign) for sign in self._health.signs()]
            return found

    def _keep_account(
        self, status: dict[str, Any] | None, rows: list[dict[str, Any]], events: list[dict[str, Any]]
    ) -> None:
        """Update the account if it is old.

        Args:
            rows, events: the new ones; all of them at the first look.
        """
        live = status is not None and state_of(status, time.time()) in LIVE_STATES
        if not live and not rows and not events and self._account is not None:
            return
        began = time.monotonic()
        if began < self._account_at:
            return
        first = self._account is None
        self._account = as_shown(
            account_of_run(self.folder, rows=rows if first else None, events=events if first else None)
        )
        now = time.monotonic()
        self._account_at = now + max(ACCOUNT_S, 20 * (now - began))

    def _saved(self) -> list[dict[str, Any]]:
        if time.monotonic() >= self._list_at:
            self._checkpoints = [asdict(c) for c in list_checkpoints(self.folder.storage)]
            self._logs = [n.removesuffix(".txt") for n in self.folder.storage.names(LOGS) if n.endswith(".txt")]
            self._list_at = time.monotonic() + CHECKPOINTS_S
        return self._checkpoints

    def _ask(self, status: dict[str, Any] | None) -> dict[str, Any] | None:
        if status is None or state_of(status, time.time()) not in LIVE_STATES:
            self._live, self._not_asked = None, None
            return None
        if self._live is None and time.monotonic() < self._ask_at:
            return None
        try:
            if self._live is None:
                self._live = connect(self.folder, "ask", ASK_S)
            seen = self._live.look()
        except (NotLive, OSError) as error:
            self._live, self._not_asked = None, redact(one_line(error))
            self._ask_at = time.monotonic() + AGAIN_S
            return None
        self._not_asked = None
        return seen

    def _view(
        self, url: str, status: dict[str, Any] | None, seen: dict[str, Any] | None, result: dict[str, Any]
    ) -> dict[str, Any]:
        now = time.time()
        last = status or {}
        state = "new" if status is None else state_of(status, now)
        group = seen["group"] if seen else {}
        options = (self._config or {}).get("config") or {}
        course = self.history.view()
        step = max(int(last.get("step") or 0), self.history.step)
        total = last.get("total_steps")
        rate = course["rate"] if state in LIVE_STATES else None
        for event in course["events"]:
            event["text"] = redact(event_text(event))
        return {
            "run": url,
            "name": str(last.get("run") or url.rstrip("/").rsplit("/", 1)[-1]),
            "job": str(((self._config or {}).get("job") or {}).get("name", "")),
            "status": state,
            "asked": seen is not None,
            "not_asked": self._not_asked,
            "step": step,
            "total_steps": total,
            "eta_s": (total - step) / rate if rate and isinstance(total, int) else None,
            "age_s": None if status is None else round(now - status["heartbeat"], 1),
            "owner": last.get("owner"),
            "host": last.get("host"),
            "message": last.get("message"),
            "git_commit": last.get("git_commit"),
            "world": last.get("world"),
            "phase": group.get("phase"),
            "max_workers": group.get("max_workers") or (options.get("scaling") or {}).get("max_workers"),
            "min_workers": group.get("min_workers") or (options.get("scaling") or {}).get("min_workers"),
            "microbatches": (options.get("batch") or {}).get("microbatches"),
            "exactness": (options.get("run") or {}).get("exactness"),
            "strategy": (options.get("parallel") or {}).get("strategy"),
            "workers": seen["workers"] if seen else recorded(last) if status else [],
            "row": {k: v for k, v in self.history.row.items() if k != "sample_hash"},
            "result": {
                k: result.get(k) for k in ("status", "steps", "metrics", "weights_sha256", "cost", "worker_hours")
            },
            "account": self._account,
            "history": course,
        }


def shown_sign(sign: Sign) -> dict[str, Any]:
    """Return a figure of the run's health, with its value as text and the tone in which to show it."""
    value, number = sign.value, ""
    if value is not None and sign.unit == "share":
        number = f"{value:.1%}"
    elif value is not None:
        size = next((f"{value / size:.3g} {name}" for size, name in _LARGE if value >= size), f"{value:.4g} ")
        number = f"{size}{sign.unit}".strip()
    return {**sign.to_json(), "number": value, "value": number, "tone": _TONES[sign.verdict]}


_LARGE = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
_TONES = {GOOD: "good", POOR: "bad", NOTED: ""}


def as_shown(found: Account) -> dict[str, Any]:
    """Return an account as people read it: without causes of zero seconds, the largest first."""
    values = found.to_json()
    whole = values["worker_seconds"]
    causes = [
        {
            "cause": cause,
            "meaning": values["causes"][cause],
            "seconds": seconds,
            "share": seconds / whole if whole else 0.0,
            "cost": None if values["costs"] is None else values["costs"].get(cause, 0.0),
        }
        for cause, seconds in values["seconds"].items()
        if seconds > 0
    ]
    names = ("worker_seconds", "goodput", "cost", "on_demand_cost", "unpriced_seconds", "interruptions")
    return {**{name: values[name] for name in names}, "causes": sorted(causes, key=lambda c: -c["seconds"])}
