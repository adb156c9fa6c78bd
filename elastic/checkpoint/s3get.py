"""Reading ranges of S3 objects straight into their destination, on the calling threads.

s3fs receives on one thread, through buffers that are copied three times; that thread limits the speed of a load. Here
each thread has its own connection and receives into the destination without holding the interpreter's lock. s3fs does
the rest: it signs the URLs, and any request that is not answered with the bytes is repeated through it.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

SIGNED_S = 3600
_RENEW_S = SIGNED_S / 2
_TIMEOUTS = ("connect_timeout", "read_timeout")  # options of the client, in seconds
_PASSING = (404, 416)  # like 5xx, these concern one request, not the way of asking


class DirectReads:
    """Reads ranges without s3fs if the file system's options allow it. May be called from any thread; must be
    closed."""

    def __init__(self, fs: Any):
        self._fs = fs
        self._plain = _is_plain(fs)  # False too once a server has refused a request
        self._urls: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._own = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def read(self, path: str, start: int, size: int, views: Sequence[memoryview]) -> bool:
        """Fill `views` with `size` bytes from `start`.

        Returns:
            False if nothing was read, so that the caller must read through s3fs.

        Raises:
            OSError: the connection broke, or no bytes arrived for the client's read_timeout.
        """
        if not self._plain or not size:
            return False
        url = urlsplit(self._signed(path))
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        try:
            answer = self._ask(url.scheme, url.netloc, f"{url.path}?{url.query}" if url.query else url.path, headers)
            if answer.status == 206 and answer.length == size:
                for view in views:
                    _receive(answer, view)
                return True
            self._plain = self._plain and (answer.status < 300 or answer.status in _PASSING or answer.status >= 500)
            self._drop()
            return False
        except BaseException as error:
            self._drop()
            if isinstance(error, http.client.HTTPException):
                raise ConnectionResetError(
                    f"{path} was cut off ({type(error).__name__})"
                ) from None  # the cause may show the signed URL
            raise

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _signed(self, path: str) -> str:
        with self._lock:
            known = self._urls.get(path)
            if known is None or time.monotonic() - known[0] > _RENEW_S:
                known = self._urls[path] = time.monotonic(), self._fs.url(path, expires=SIGNED_S)
            return known[1]

    def _ask(self, scheme: str, place: str, target: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = getattr(self._own, "connection", None)
        if connection is not None and (connection.host, connection.port) == _host_port(scheme, place):
            try:
                connection.request("GET", target, headers=headers)
                return connection.getresponse()
            except (ConnectionError, http.client.HTTPException):  # closed by the server since the last request
                self._drop()
        connection = self._connect(scheme, place)
        connection.request("GET", target, headers=headers)
        return connection.getresponse()

    def _connect(self, scheme: str, place: str) -> http.client.HTTPConnection:
        self._drop()
        connect_s, read_s = (self._fs.config_kwargs.get(n, getattr(self._fs, n)) for n in _TIMEOUTS)
        if scheme == "https":
            context = ssl.create_default_context(cafile=_authorities(self._fs))
            made: http.client.HTTPConnection = http.client.HTTPSConnection(place, timeout=connect_s, context=context)
        else:
            made = http.client.HTTPConnection(place, timeout=connect_s)
        self._own.connection = made
        with self._lock:
            self._connections.append(made)
        made.connect()
        made.sock.settimeout(read_s)
        return made

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            with self._lock:
                self._connections.remove(connection)
            self._own.connection = None


def _receive(answer: http.client.HTTPResponse, view: memoryview) -> None:
    while view:
        count = answer.readinto(view)
        if not count:
            raise ConnectionResetError(f"the answer ended {len(view)} bytes early")
        view = view[count:]


def _host_port(scheme: str, place: str) -> tuple[str, int]:
    split = urlsplit(f"{scheme}://{place}")
    return split.hostname or "", split.port or (443 if scheme == "https" else 80)


def _is_plain(fs: Any) -> bool:
    """Whether a request needs nothing but its signed URL: the user set no proxy, certificates or headers."""
    given = {**fs.client_kwargs, **fs.config_kwargs}
    if any(given.get(name) is not None for name in ("verify", "proxies", "proxies_config", "client_cert")):
        return False
    proxies = urllib.request.getproxies().keys() & {"http", "https", "all"}
    return not (fs.s3_additional_kwargs or fs.req_kw or fs.version_aware or proxies)


def _authorities(fs: Any) -> str:
    """Return the file of certificate authorities that botocore would use."""
    from botocore.httpsession import get_cert_path

    fs.s3  # noqa: B018 - connects, and so makes the session
    chosen = fs.session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    return str(chosen or get_cert_path(True))
