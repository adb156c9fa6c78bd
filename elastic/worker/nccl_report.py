"""What NCCL itself knows of a hang: of every rank, how many operations it has begun. From 2.24 on it tells on a port.

Every process of NCCL has a thread that knows of those it has a communicator with, and one of each machine listens, at
NCCL_RAS_ADDR or on port 28028 of the loopback interface. It speaks lines of text (NCCL, src/ras/client.cc).
"""

from __future__ import annotations

import os
import socket

ADDRESS = "NCCL_RAS_ADDR"
USUAL = "localhost:28028"
ANSWER_S = 10.0  # it asks all others, and waits 5 s for those that do not answer
MOST_BYTES = 4 << 20


def ask_nccl() -> str:
    """NCCL's report, for people; or why there is none."""
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
