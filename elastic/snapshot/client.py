"""The client of a vault."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from elastic.errors import SnapshotError
from elastic.placement import Part
from elastic.snapshot.adopted import WorkerMemory
from elastic.snapshot.holdings import Holding, SnapshotId

CONNECT_S = 2.0


#: How a request fails if the vault has ended the connection since the last one, as it does with idle ones.
_ENDED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class VaultClient:
    """One connection to a vault, which is made by the first request and stays for the next ones. For one thread at a
    time.

    Args:
        timeout_s: longest wait in seconds for the vault to take or send anything.
    """

    def __init__(self, url: str, token: str, timeout_s: float):
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.url, self._token = url, token
        self._timeout_s, self.is_cut = timeout_s, False
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=CONNECT_S)

    def close(self) -> None:
        self._connection.close()

    def cut(self) -> None:
        """Make a pending request to the vault fail at once, and all others. From any thread."""
        self.is_cut = True
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):  # the connection broke by itself
                sock.shutdown(socket.SHUT_RDWR)

    def put(
        self,
        id: SnapshotId,
        part: Part,
        head: bytes,
        body: memoryview,
        xxh3: str,
        keep: SnapshotId | None,
    ) -> None:
        """Store a part of a snapshot. Returns when the vault has all of it.

        Args:
            head, body: the part's JSON, and the bytes of its tensors. `xxh3` is the hash of both (64 bits,
                hexadecimal).
            keep: the newest complete snapshot; the vault may reuse the memory of all others.

        Raises:
            SnapshotError: the vault failed, or has no memory for it.
        """
        path = f"/parts/{id}/{part.key}?head={len(head)}&xxh3={xxh3}"
        self._request("PUT", path if keep is None else f"{path}&keep={keep}", head, body).read()

    def adopt(self, id: SnapshotId, part: Part, head: bytes, memory: WorkerMemory, keep: SnapshotId | None) -> None:
        """Store a part whose bytes are in this machine's memory, without a copy. The vault maps that memory, so nothing
        may be written to it before `release`.

        Raises:
            SnapshotError: the vault cannot map it, or does not answer.
        """
        path = f"/adopt/{id}/{part.key}?memory={memory}"
        self._request("POST", path if keep is None else f"{path}&keep={keep}", head).read()

    def release(self, memory: WorkerMemory) -> None:
        """Drop the parts in that memory. After this returns, the memory may be written to.

        Raises:
            SnapshotError: a reader may still use it.
        """
        self._request("POST", "/release", json.dumps({"memory": str(memory)}).encode()).read()

    def holdings(self) -> list[Holding]:
        """The parts that the vault has completely.

        Raises:
            SnapshotError: the vault does not answer. All further methods raise it too.
        """
        rows = json.loads(self._request("GET", "/parts").read())
        return [Holding(SnapshotId.parse(id), Part.parse(part), self.url) for id, part in rows]

    def head(self, id: SnapshotId, part: Part) -> dict[str, Any]:
        """The head of a part, as it was stored."""
        return json.loads(self._request("GET", f"/parts/{id}/{part.key}/head").read())

    def read_into(self, id: SnapshotId, part: Part, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Read bytes of a part's tensors: `wanted` has, for each piece, its first byte and the memory to fill."""
        ranges = [[start, start + len(into)] for start, into in wanted]
        answer = self._request("POST", f"/parts/{id}/{part.key}", json.dumps({"ranges": ranges}).encode())
        try:
            for _, into in wanted:
                at = 0
                while at < len(into):
                    count = answer.readinto(into[at:])
                    if not count:
                        raise self._error(f"it sent {at} of {len(into)} bytes")
                    at += count
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._error(error) from error

    def forget(self, after: int, before: SnapshotId) -> None:
        """Drop snapshots that are older than `before` and of later steps than `after`: those steps were undone."""
        self._request("POST", "/forget", json.dumps({"after": after, "before": str(before)}).encode()).read()

    def memory(self, memory: WorkerMemory | None = None) -> dict[str, int]:
        """`held`: bytes that the vault uses; `available`: bytes that are still available on its node; `maps`: whether
        the vault can map `memory`, 0 or 1."""
        return json.loads(self._request("GET", "/memory" if memory is None else f"/memory?memory={memory}").read())

    def _request(self, method: str, path: str, *body: bytes | memoryview) -> http.client.HTTPResponse:
        connection = self._connection
        try:
            was_open = connection.sock is not None
            try:
                answer = self._ask(method, path, *body)
            except _ENDED:
                if not was_open or self.is_cut:
                    raise
                connection.close()
                answer = self._ask(method, path, *body)  # to repeat any of the requests changes nothing
            if answer.status >= 300:
                raise self._error(json.loads(answer.read())["error"])
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()  # the next request connects again
            raise self._error(error) from error

    def _ask(self, method: str, path: str, *body: bytes | memoryview) -> http.client.HTTPResponse:
        connection = self._connection
        if connection.sock is None:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(self._timeout_s)
        connection.putrequest(method, path)
        connection.putheader("Authorization", f"Bearer {self._token}")
        if body:
            connection.putheader("Content-Length", str(sum(map(len, body))))
        connection.endheaders()
        for piece in body:
            connection.send(piece)
        return connection.getresponse()

    def _error(self, why: object) -> SnapshotError:
        text = str(why) or type(why).__name__
        return SnapshotError(f"the vault at {self.url} failed: {text}")
