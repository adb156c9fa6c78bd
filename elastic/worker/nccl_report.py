"""NCCL's own report of a hang: how many operations each rank has begun. NCCL offers it on a port from version 2.24 on.

Every process with NCCL has a thread that knows its peers, and one process of each machine listens, at NCCL_RAS_ADDR or
on port 28028 of the loopback interface. Its protocol is lines of text (NCCL, src/ras/client.cc).
"""

from __future__ import annotations

import os
import socket

ADDRESS = "NCCL_RAS_ADDR"
USUAL = "localhost:28028"
ANSWER_S = 10.0  # the process asks all others, and waits 5 s for those that do not answer
MOST_BYTES = 4 << 20


def ask_nccl() -> str:
    """NCCL's report as a text for people, or why there is none."""
    address = os.environ.get(ADDRESS, USUAL)
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]") or "localhost", int(port)), ANSWER_S) as line:
            line.settimeout(ANSWER_S)
            answers = line.makefile("rb")
            line.sendall(b"CLIENT PROTOCOL 2\n")
            version = answers.readline(1024)
            if not version.upper().startswith(b"SERVER PROTOCOL "):
                return f"NCCL's report: at {address} answers something else: {version[:100]!r}"
            line.sendall(b"VERBOSE STATUS\n")
            return f"NCCL's report (of {address}):\n{answers.read(MOST_BYTES).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        return f"NCCL's report: none from {address}: {error}"
