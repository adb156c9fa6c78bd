"""A driver's or controller's requests to the membership server, and its stream of rows and events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from http.client import HTTPException
from typing import Any

from elastic.errors import one_line
from elastic.membership.protocol import MAX_MESSAGE_BYTES, VERSION, VERSION_HEADER, Request
from elastic.membership.wire import plain

AGAIN_S = 0.1
MAX_ANSWER_BYTES = 64 << 20
_PIECE = 1 << 16


def _opener() -> urllib.request.OpenerDirector:
    """Opens http only: no file, no proxy, and no redirect, which could carry the token to another server."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


_DIRECT = _opener()


def _parsed(data: bytes) -> dict[str, Any]:
    """
    Raises:
        OSError: `data` is no JSON object: the server went away while it sent, or it is another server.
    """
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise OSError(f"the server's answer cannot be read: {one_line(error)}") from error


def _read(answer: Any, timeout_s: float) -> bytes:
    """The whole body of an answer. The server may be any program, so its size and time are bounded.

    Raises:
        OSError: the answer takes longer than `timeout_s`, or is larger than MAX_ANSWER_BYTES.
    """
    deadline, pieces, size = time.monotonic() + timeout_s, [], 0
    while piece := answer.read1(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise OSError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer was not whole within {timeout_s:g} s")
    return b"".join(pieces)


@contextlib.asynccontextmanager
async def _as_os_error(kind: type[Exception]) -> AsyncIterator[None]:
    try:
        yield
    except kind as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def outlived(on_record: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A listener that survives errors: the first error of `on_record` is printed and ends the listening, not the run or
    the stream."""
    failed = False

    def call(record: dict[str, Any]) -> None:
        nonlocal failed
        if not failed:
            try:
                on_record(record)
            except Exception:
                failed = True
                traceback.print_exc()

    return call


class DriverLink:
    """Talks to the server at `url` with the run's bearer token."""

    def __init__(self, url: str, token: str):
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}", VERSION_HEADER: str(VERSION)}

    def request(  # never through a proxy: the server is near, and no proxy may see the token
        self, what: str | Request, timeout_s: float = 10.0, *, patience_s: float = 0.0
    ) -> dict[str, Any]:
        """GET a path, or POST a request. A server that cannot be reached (it restarts, say) is tried for `patience_s`.

        Raises:
            OSError: the server cannot be reached, or refuses the request.
        """
        path, data = (what, None) if isinstance(what, str) else (what.path, json.dumps(plain(what)).encode())
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data=data, headers=headers)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                with _DIRECT.open(request, timeout=timeout_s) as answer:
                    return _parsed(_read(answer, timeout_s))
            except urllib.error.HTTPError:
                raise  # the server answered, and would answer the same again
            except (OSError, HTTPException) as error:
                if time.monotonic() > deadline:
                    raise error if isinstance(error, OSError) else OSError(one_line(error)) from error
                time.sleep(AGAIN_S)

    async def follow(self, on_record: Callable[[dict[str, Any]], None]) -> None:
        """Call `on_record` with every row and event, until one of kind `end` comes or the server is gone.

        Raises:
            OSError: the server cannot be reached, or refuses.
        """
        import aiohttp  # takes a third of a second to import; commands that only send a request do without it

        async with (  # some of aiohttp's own errors are no OSError
            _as_os_error(aiohttp.ClientError),
            aiohttp.ClientSession(headers=self._headers) as session,
            session.ws_connect(f"{self._url}/follow", max_msg_size=MAX_MESSAGE_BYTES) as socket,
        ):
            async for raw in socket:
                if raw.type == aiohttp.WSMsgType.TEXT:
                    record = json.loads(raw.data)
                    on_record(record)
                    if record.get("kind") == "end":
                        return

    def follow_to_the_end(
        self, on_record: Callable[[dict[str, Any]], None], ended: threading.Event, patience_s: float
    ) -> bool:
        """Follow the run until `ended` is set, connecting again if the server restarts on the same address.

        Returns:
            False if the server was gone for `patience_s`.
        """
        lost_at: float | None = None

        def received(record: dict[str, Any]) -> None:
            nonlocal lost_at
            lost_at = None
            on_record(record)

        while not ended.is_set():
            with contextlib.suppress(OSError):  # it is being restarted; a longer absence ends the loop below
                asyncio.run(self.follow(received))
            if ended.is_set():
                return True
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > patience_s:
                return False
            ended.wait(AGAIN_S)
        return True
