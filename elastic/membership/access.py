"""Who may call the membership server: the run's processes with its token, control commands with a granted secret.

Only the run's own processes know the token; it is written nowhere. A control command proves instead that it may write
into the run's folder: it leaves the hash of a secret there, and calls with the secret. Whoever can only read the folder
learns the server's address and hashes, and these give no access.
"""

from __future__ import annotations

import hashlib
import hmac
import time

GRANT_S = 3600.0
#: The routes that a granted secret opens, besides the one that grants it.
CONTROL = frozenset({"/run", "/wish", "/scale", "/drain", "/prune", "/damaged", "/stacks"})


def digest(secret: str) -> str:
    """The hash of a secret, which anyone may read: secrets are long and random, so it cannot be reversed by
    guessing."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


class Access:
    """Knows the run's token and, for an hour after each use, the secrets that were granted."""

    def __init__(self, token: str):
        self._token = f"Bearer {token}".encode()
        self._granted: dict[str, float] = {}

    def grant(self, secret: str) -> None:
        """Let this secret open the control routes from now on."""
        self._granted[digest(secret)] = time.monotonic() + GRANT_S

    def allows(self, authorization: str, path: str) -> bool:
        """Whether a request with this Authorization header may use this route."""
        if hmac.compare_digest(authorization.encode(errors="replace"), self._token):
            return True
        now = time.monotonic()
        self._granted = {key: until for key, until in self._granted.items() if until > now}
        key = digest(authorization.removeprefix("Bearer "))
        if path not in CONTROL or key not in self._granted:
            return False
        self._granted[key] = now + GRANT_S
        return True
