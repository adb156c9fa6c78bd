"""Who may call the membership server: the run's own parts with its token, control commands with a grant.

The token is known to the run's own processes alone and is written nowhere. A control command proves instead that it
may write into the run's folder, by leaving the hash of a secret there, and calls with the secret. Whoever can only
read the folder learns the server's address and hashes, which open nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import time

GRANT_S = 3600.0
#: What a grant opens, beside what it takes to get one.
CONTROL = frozenset({"/run", "/wish", "/scale", "/drain", "/prune", "/damaged"})


def digest(secret: str) -> str:
    """What of a secret may be read by anyone: it cannot be guessed back, as secrets are long and random."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


class Access:
    """Knows the run's token and, for an hour after each use, the secrets that were granted."""

    def __init__(self, token: str):
        self._token = f"Bearer {token}".encode()
        self._granted: dict[str, float] = {}

    def grant(self, secret: str) -> None:
        """From now on this secret opens the control routes."""
        self._granted[digest(secret)] = time.monotonic() + GRANT_S

    def allows(self, authorization: str, path: str) -> bool:
        """Whether a request with this header may go to this route."""
        if hmac.compare_digest(authorization.encode(errors="replace"), self._token):
            return True
        now = time.monotonic()
        self._granted = {key: until for key, until in self._granted.items() if until > now}
        key = digest(authorization.removeprefix("Bearer "))
        if path not in CONTROL or key not in self._granted:
            return False
        self._granted[key] = now + GRANT_S
        return True
