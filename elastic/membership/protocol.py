"""What worker, membership server and keeper agree on: times, sizes, and what the server relays to."""

from __future__ import annotations

from typing import Any, Protocol

from elastic.membership.world import Generation, Member, World

BEAT_S = 1.0
SILENT_S = 5.0
STACKS_S = 1.0
MAX_MESSAGE_BYTES = 256 << 20


class Keeper(Protocol):
    """What the server relays to. Called on the server's thread: must not block."""

    def event(self, kind: str, **fields: Any) -> None: ...

    def world_formed(self, world: World) -> None: ...

    def world_broken(self, world: World, lost: Member | None, reason: str) -> None: ...

    def receive(self, member: Member, generation: Generation, message: dict[str, Any]) -> None: ...

    def restore_point(self) -> dict[str, Any]: ...

    def last_step(self) -> int: ...

    def claim_step(self) -> int: ...

    def save_stacks(self, member: Member, text: str) -> None: ...

    def close_run(self, status: str, message: str) -> None: ...

    def set_status(self, status: str) -> None: ...

    def giving_up(self, message: str) -> None: ...

    def status(self) -> dict[str, Any]: ...
