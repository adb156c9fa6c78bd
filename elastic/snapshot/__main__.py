"""`python -m elastic.snapshot`: a vault in a process of its own, for runs in plain processes.

Reads one line of JSON from standard input (token, host, port), writes its URL to standard output, and serves until its
input is closed: it ends with whoever started it. Once a second it writes an empty line: it does not stand still.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time

from elastic.child import ignore_terminal
from elastic.snapshot.vault import VaultServer

BEAT_S = 1.0


def main() -> int:
    ignore_terminal()
    specification = json.loads(sys.stdin.readline())
    server = VaultServer(specification["token"], specification["host"], specification["port"])
    print(server.start(), flush=True)
    threading.Thread(target=_beat, name="beat", daemon=True).start()
    sys.stdin.read()
    return 0


def _beat() -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        while True:
            time.sleep(BEAT_S)
            print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
