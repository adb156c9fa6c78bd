"""What the keeper needs of the run's membership server."""

from __future__ import annotations

from typing import Any, Protocol

from elastic.membership.protocol import HostMessage


class Server(Protocol):
    """Implemented by `membership.server.MembershipServer`. All methods may be called from any thread."""

    @property
    def url(self) -> str: ...

    def gone(self) -> frozenset[str]: ...

    def publish(self, record: dict[str, Any], *, keep: bool) -> None: ...

    def send_all(self, message: HostMessage) -> None: ...

    def ask_to_stop(self, why: str) -> None: ...

    def saved_alone(self, step: int) -> None: ...


class NoServer:
    """Stands in before the server is started: it drops all messages and reports no lost worker."""

    url = ""

    def gone(self) -> frozenset[str]:
        return frozenset()

    def publish(self, record: dict[str, Any], *, keep: bool) -> None:
        pass

    def send_all(self, message: HostMessage) -> None:
        pass

    def ask_to_stop(self, why: str) -> None:
        pass

    def saved_alone(self, step: int) -> None:
        pass
