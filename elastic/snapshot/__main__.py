"""`python -m elastic.snapshot`: a vault in a process of its own, for runs in plain processes.

Reads one line of JSON from standard input (token, host, port), and serves until its standard input is closed, that is,
until the process that started it ends.
"""

from __future__ import annotations

import json
import sys

from elastic.child import ignore_terminal, show_stack_at_death, yield_to_training
from elastic.snapshot.vault import VaultServer


def main() -> int:
    ignore_terminal()
    show_stack_at_death()
    yield_to_training()
    VaultServer(**json.loads(sys.stdin.readline())).start()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
