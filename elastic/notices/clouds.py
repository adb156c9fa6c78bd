"""Clients of the notice end-points that clouds offer to their machines at one link-local address.

They use the standard library only, since a watcher runs on every node and must be small. They never use a proxy.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from elastic.errors import ConfigError
from elastic.notices.meaning import (
    Answer,
    Notice,
    UnclearAnswer,
    azure_events,
    gcp_maintenance,
    gcp_preempted,
    rebalance,
    spot_action,
)

ENDPOINT = "http://169.254.169.254"
REQUEST_TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 1 << 20
_TOKEN_LIFE_S = 21600  # the most that EC2 allows


class NoAnswer(Exception):
    """The end-point did not answer in time, or ended the connection."""


def ask(url: str, headers: dict[str, str], *, method: str = "GET") -> tuple[Answer, dict[str, str]]:
    """Send one request; returns the answer, whatever its status, and its headers by lower-case name.

    Raises:
        NoAnswer: no complete answer came within `REQUEST_TIMEOUT_S`.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _AnyStatus)
    request = urllib.request.Request(url, headers=headers, method=method)
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    try:
        with opener.open(request, timeout=REQUEST_TIMEOUT_S) as reply:
            body = bytearray()
            while len(body) < MAX_ANSWER_BYTES and (part := reply.read1(MAX_ANSWER_BYTES)):
                body += part
                if time.monotonic() > deadline:  # the socket's own time-out starts again with every byte
                    raise TimeoutError(f"not whole within {REQUEST_TIMEOUT_S:g} s")
            named = {k.lower(): v for k, v in reply.headers.items()}
            return Answer(reply.status, body.decode(errors="replace")), named
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{url}: {error}") from error


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Makes a 404 an answer like others; redirects are not followed."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        return response


class Cloud(Protocol):
    """The notices of one cloud."""

    name: ClassVar[str]

    def is_here(self) -> bool:
        """Whether this machine belongs to this cloud, as far as the end-point answers."""
        ...

    def look(self, now: float) -> tuple[list[Notice], list[str]]:
        """(present notices, errors of requests that failed). Takes at most a few `REQUEST_TIMEOUT_S`."""
        ...


class Aws:
    """EC2's instance metadata service, version 2: every request carries a token that is fetched first."""

    name: ClassVar[str] = "aws"

    def __init__(self, endpoint: str = ENDPOINT, rebalance_s: float | None = 600.0):
        self._endpoint, self._rebalance_s = endpoint, rebalance_s
        self._token = ""

    def is_here(self) -> bool:
        return _answers(lambda: self._ask("instance-id"))

    def look(self, now: float) -> tuple[list[Notice], list[str]]:
        allowance_s = self._rebalance_s
        questions = [lambda: spot_action(self._ask("spot/instance-action"))]
        if allowance_s is not None:
            questions.append(lambda: rebalance(self._ask("events/recommendations/rebalance"), allowance_s))
        return _collect(questions)

    def _ask(self, path: str) -> Answer:
        for _ in range(2):
            if not self._token:
                life = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE_S)}
                answer, _ = ask(f"{self._endpoint}/latest/api/token", life, method="PUT")
                token = answer.body.strip()
                if answer.status != 200 or not (token and token.isascii() and token.isprintable()):
                    raise UnclearAnswer(f"no token for the metadata service: status {answer.status}")
                self._token = token
            answer, _ = ask(f"{self._endpoint}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            if answer.status != 401:
                return answer
            self._token = ""  # it has expired
        raise UnclearAnswer("the metadata service refuses the token that it gave")


class Gcp:
    """Google's metadata server. Its answers carry the same header as requests must."""

    name: ClassVar[str] = "gcp"

    def __init__(self, endpoint: str = ENDPOINT):
        self._endpoint = endpoint

    def is_here(self) -> bool:
        return _answers(lambda: self._ask("id"))

    def look(self, now: float) -> tuple[list[Notice], list[str]]:
        return _collect(
            [
                lambda: gcp_preempted(self._ask("preempted"), now),
                lambda: gcp_maintenance(self._ask("maintenance-event"), now),
            ]
        )

    def _ask(self, path: str) -> Answer:
        flavor = {"Metadata-Flavor": "Google"}
        answer, headers = ask(f"{self._endpoint}/computeMetadata/v1/instance/{path}", flavor)
        if headers.get("metadata-flavor") != "Google":
            raise UnclearAnswer(f"not from Google's metadata server: status {answer.status}")
        return answer


class Azure:
    """Azure's scheduled events. The first answer may take two minutes; there are no notices until then."""

    name: ClassVar[str] = "azure"

    def __init__(self, endpoint: str = ENDPOINT):
        self._endpoint = endpoint
        self._machine = ""

    def is_here(self) -> bool:
        return _answers(lambda: self._ask("instance/compute/name?api-version=2021-02-01&format=text"))

    def look(self, now: float) -> tuple[list[Notice], list[str]]:
        return _collect([lambda: self._events(now)])

    def _events(self, now: float) -> Notice | None:
        if not self._machine:
            answer = self._ask("instance/compute/name?api-version=2021-02-01&format=text")
            if answer.status != 200 or not answer.body.strip():
                raise UnclearAnswer(f"no name of this machine: status {answer.status}")
            self._machine = answer.body.strip()
        return azure_events(self._ask("scheduledevents?api-version=2020-07-01"), self._machine, now)

    def _ask(self, path: str) -> Answer:
        return ask(f"{self._endpoint}/metadata/{path}", {"Metadata": "true"})[0]


def _answers(question: Callable[[], Answer]) -> bool:
    try:
        return question().status == 200
    except (NoAnswer, UnclearAnswer):
        return False


def _collect(questions: list[Callable[[], Notice | None]]) -> tuple[list[Notice], list[str]]:
    """Ask all questions: an end-point that fails must not hide the notice of another."""
    notices, unclear = [], []
    for question in questions:
        try:
            notice = question()
        except (NoAnswer, UnclearAnswer) as error:
            unclear.append(str(error))
        else:
            notices += [notice] if notice is not None else []
    return notices, unclear


def find_cloud(clouds: list[Cloud], timeout_s: float = 30.0) -> Cloud:
    """The cloud that this machine belongs to.

    Raises:
        ConfigError: none of them answers within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        for cloud in clouds:
            if cloud.is_here():
                return cloud
        if time.monotonic() >= deadline:
            names = ", ".join(c.name for c in clouds)
            raise ConfigError(
                f"--cloud is 'auto', but no notice end-point of {names} answers here within {timeout_s:g} s; "
                "give --cloud none to act on SIGTERM only"
            )
        time.sleep(1.0)
