"""Access to the page: everyone who has the link that the command printed may use it. Pure."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

#: Nothing from other origins and nothing inline, so that text from a run cannot load or run anything.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def refusal(method: str, path: str, headers: Mapping[str, str], port: int, token: str) -> tuple[int, str] | None:
    """Return the HTTP status and the sentence with which a request is refused, or None if it may be answered.

    The check of the host refuses foreign names that were made to resolve to this machine (DNS rebinding); the check of
    the origin refuses other pages.
    """
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
    if headers.get("Host", "").lower() not in hosts:
        return 403, "the page answers on this machine's loopback address alone; tunnel its port to the same number"
    origin = headers.get("Origin")
    if origin is not None and origin.lower() not in {f"http://{host}" for host in hosts}:
        return 403, "another page may ask nothing of this one"
    if not path.startswith("/api/"):
        return None if method in ("GET", "HEAD") else (405, "there is nothing to change here")
    given = headers.get("Authorization", "").encode(errors="replace")
    if not hmac.compare_digest(given, f"Bearer {token}".encode()):
        return 401, "wrong or missing token; open the whole link that elastic page printed"
    if method == "POST" and headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "send application/json"
    return None
