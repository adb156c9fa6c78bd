"""What the answer of a cloud's notice end-point means: pure functions of the answer and of the time.

Sources: Amazon EC2 User Guide, "Spot Instance interruption notices" and "EC2 instance rebalance recommendations";
Google Compute Engine, "Preemptible VM instances" and "Query metadata server for maintenance event notices"; Azure,
"Azure Metadata Service: Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

#: Seconds that Google gives a preempted machine; its notice has no time.
GCP_PREEMPTION_S = 30.0
#: Seconds that Google gives before it ends a machine for maintenance. Some machine types get an hour, but leaving too
#: early does no harm, and leaving too late does.
GCP_MAINTENANCE_S = 60.0
#: A new notice counts if it leaves less time than the last one by more than this, which covers clocks and polling.
SOONER_S = 5.0
#: Azure's kinds of events after which a machine or its memory is gone. A freeze is a pause of seconds.
_AZURE_GOING = ("Preempt", "Terminate", "Reboot", "Redeploy")


@dataclass(frozen=True)
class Answer:
    """What a server answered: HTTP status and body."""

    status: int
    body: str


@dataclass(frozen=True)
class Notice:
    """A machine goes away. `deadline` is in unix seconds; `what` is a text for people."""

    what: str
    deadline: float


class UnclearAnswer(Exception):
    """An answer that is neither a notice nor says that there is none."""


def spot_action(answer: Answer) -> Notice | None:
    """EC2 `spot/instance-action`: 404 until the interruption notice, two minutes before.

    Raises:
        UnclearAnswer: the answer has neither form.
    """
    if answer.status == 404:
        return None
    values = _json_object(answer)
    return Notice(f"EC2 spot interruption: {values.get('action')}", _iso_time(values.get("time")))


def rebalance(answer: Answer, allowance_s: float) -> Notice | None:
    """EC2 `events/recommendations/rebalance`: an interruption is likely. The deadline is `allowance_s` after it.

    Raises:
        UnclearAnswer: the answer is neither a recommendation nor a 404.
    """
    if answer.status == 404:
        return None
    return Notice("EC2 rebalance recommendation", _iso_time(_json_object(answer).get("noticeTime")) + allowance_s)


def gcp_preempted(answer: Answer, now: float) -> Notice | None:
    """Google `instance/preempted`: TRUE or FALSE.

    Raises:
        UnclearAnswer: the answer is neither.
    """
    text = answer.body.strip()
    if answer.status != 200 or text not in ("TRUE", "FALSE"):
        raise UnclearAnswer(_shown(answer))
    return Notice("GCP preemption", now + GCP_PREEMPTION_S) if text == "TRUE" else None


def gcp_maintenance(answer: Answer, now: float) -> Notice | None:
    """Google `instance/maintenance-event`. A machine that is migrated while it runs is no loss.

    Raises:
        UnclearAnswer: the answer is no event that Google documents.
    """
    text = answer.body.strip()
    if answer.status == 200 and text == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice("GCP host maintenance", now + GCP_MAINTENANCE_S)
    if answer.status != 200 or text not in ("NONE", "MIGRATE_ON_HOST_MAINTENANCE"):
        raise UnclearAnswer(_shown(answer))
    return None


def azure_events(answer: Answer, machine: str, now: float) -> Notice | None:
    """Azure `scheduledevents`: the soonest event that ends this machine. An event that has started leaves no time.

    Raises:
        UnclearAnswer: the answer is no list of events.
    """
    notices = []
    events = _json_object(answer).get("Events")
    for event in events if isinstance(events, list) else [None]:
        if not isinstance(event, dict) or not isinstance(event.get("Resources"), list):
            raise UnclearAnswer(_shown(answer))
        if event.get("EventType") in _AZURE_GOING and machine in event["Resources"]:
            deadline = _http_time(event.get("NotBefore")) if event.get("NotBefore") else now
            notices.append(Notice(f"Azure {event['EventType']}", deadline))
    return min(notices, key=lambda n: n.deadline, default=None)


def to_act_on(acted_on: Notice | None, seen: Iterable[Notice]) -> Notice | None:
    """The notice to act on now: the soonest, if it leaves clearly less time than the last one acted on."""
    soonest = min(seen, key=lambda n: n.deadline, default=None)
    if soonest is None or (acted_on is not None and soonest.deadline > acted_on.deadline - SOONER_S):
        return None
    return soonest


def _json_object(answer: Answer) -> dict[str, Any]:
    try:
        values = json.loads(answer.body) if answer.status == 200 else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UnclearAnswer(_shown(answer))
    return values


def _iso_time(text: Any) -> float:
    try:
        when = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise UnclearAnswer(f"no time: {text!r}") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _http_time(text: Any) -> float:
    try:
        when = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        raise UnclearAnswer(f"no time: {text!r}") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _shown(answer: Answer) -> str:
    body = " ".join(answer.body.split())
    return f"status {answer.status}, {body[:80]!r}"
