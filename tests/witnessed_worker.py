"""A worker as its witness sees it: a thread of it has the connection, and does what standard input says."""

from __future__ import annotations

import socket
import sys
import threading

from elastic.membership.witness import Witness


def link(connection: socket.socket, keeper: socket.socket) -> None:
    witness = Witness()
    socket.send_fds(keeper, [b"k"], [witness._socket.fileno()])
    print(witness.has(connection), witness._process.pid, flush=True)
    for line in sys.stdin:
        if line == "have\n":
            print(witness.has(connection), flush=True)
        elif line == "anew\n":
            del witness  # and its memory
            witness = Witness()
            print(witness.has(connection), flush=True)
        elif line == "send\n":
            print(connection.send(b"x"), flush=True)
        else:
            witness.end()
            print("ended", flush=True)


if __name__ == "__main__":
    threading.Thread(target=link, args=[socket.socket(fileno=int(n)) for n in sys.argv[1:]], daemon=True).start()
    threading.Event().wait()
