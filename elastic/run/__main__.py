"""`python -m elastic.run`: the host of a run in a process of its own, for runs in plain processes.

Reads one line of JSON from standard input (the arguments of `RunHost`), and serves until its standard input is closed,
that is, until the process that started it ends.
"""

from __future__ import annotations

import json
import sys
import threading

from elastic.checkpoint.retention import Policy
from elastic.child import ignore_terminal, show_stack_at_death
from elastic.membership.state import Limits
from elastic.run.host import HostSettings, RunHost, import_store
from elastic.run.keeper_options import KeeperOptions


def main() -> int:
    ignore_terminal()
    show_stack_at_death()
    specification = json.loads(sys.stdin.readline())
    threading.Thread(target=import_store, name="import-torch", daemon=True).start()
    limits = Limits(**specification["settings"].pop("limits"))
    settings = HostSettings(limits=limits, **specification["settings"])
    retention = Policy(**specification["options"].pop("retention"))
    options = KeeperOptions(retention=retention, **specification["options"])
    host = RunHost(specification["folder_url"], options, settings)
    host.start(specification["detail"])
    try:
        sys.stdin.read()
    finally:
        host.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
