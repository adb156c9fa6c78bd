"""How soon a server hears that a process with much memory was killed, with a witness beside the process and without.

    python -m jobs.bench.death [--megabytes 10 500 2000] [--kills 5] [--json FILE]

The process fills the memory and connects. The seconds are those from SIGKILL until its connection has ended. Kills with
a witness and without alternate.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from jobs.bench.report import median, table, write_json

PAGE = 4096


def be_killed(port: int, megabytes: int, witnessed: bool) -> None:
    """Fill the memory, connect, and wait."""
    from elastic.membership.witness import Witness

    memory = bytearray(megabytes * 1_000_000)
    memory[::PAGE] = bytes(1) * len(range(0, len(memory), PAGE))

    def link() -> None:
        connection = socket.create_connection(("127.0.0.1", port))
        if witnessed:
            assert Witness().has(connection)
        connection.send(b"x")
        threading.Event().wait()

    threading.Thread(target=link, daemon=True).start()
    threading.Event().wait()


def one_kill(megabytes: int, witnessed: bool) -> float:
    """Seconds until the connection of a killed process has ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "jobs.bench.death", "--be-killed", str(port), str(megabytes), str(+witnessed)]
        process = subprocess.Popen(command)
        connection, _ = server.accept()
    with connection:
        connection.recv(1)
        time.sleep(0.2)  # the witness has begun to wait
        began = time.perf_counter()
        os.kill(process.pid, signal.SIGKILL)
        while connection.recv(1):
            pass
        seconds = time.perf_counter() - began
    process.wait()
    return seconds


def measure(megabytes: int, kills: int) -> list[Any]:
    """One row of the table."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(kills):
        for witnessed, seconds in found.items():
            seconds.append(one_kill(megabytes, witnessed))
    return [megabytes, *(figure for one in found.values() for figure in (median(one), max(one)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 500, 2000])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--be-killed", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_killed:
        port, megabytes, witnessed = arguments.be_killed
        return be_killed(port, megabytes, bool(witnessed))
    head = ["MB", "without s", "worst s", "with a witness s", "worst s"]
    rows = [measure(megabytes, arguments.kills) for megabytes in arguments.megabytes]
    print(table(head, rows))
    write_json(arguments.json, {"head": head, "rows": rows})


if __name__ == "__main__":
    main()
