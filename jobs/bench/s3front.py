"""A proxy in front of an object store, in a process of its own: makes faults, keeps a record, simulates a slower store.

    with S3Front(upstream=port) as front:                 # in front of a real store
        front.fault(method="PUT", status=503, count=3)    # the next three PUTs are told to slow down
    with S3Front(simulated=SIMULATED) as front:           # objects in memory, 30 ms and 90 MB/s a connection

`python -m jobs.bench.s3front` measures what the proxy itself can carry.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from jobs.bench.report import table
from jobs.bench.s3relay import LOOPBACK, Record


@dataclass(frozen=True)
class Link:
    """How slow a store is: seconds to the first byte of an answer, bytes a second of one connection (0: no limit)."""

    first_byte_s: float = 0.0
    rate: float = 0.0


SIMULATED = Link(0.030, 90e6)


class S3Front:
    """The proxy. Use as a context manager.

    Args:
        upstream: port of a store on this machine; 0 keeps objects in the proxy's memory, unsigned.
        link: how slow to be.
    """

    def __init__(self, upstream: int = 0, link: Link | None = None):
        self._settings = {"upstream": upstream, **(link or Link()).__dict__}

    def __enter__(self) -> S3Front:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.bench.s3relay", json.dumps(self._settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port: int = self._answer()
        self.url = f"http://{LOOPBACK}:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # which ends it
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with exit code {self.process.wait(5)}")
        return json.loads(line)

    def _ask(self, do: str, **values: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def fault(self, **values: Any) -> None:
        """Add a `jobs.bench.s3relay.Fault` for the next requests that match."""
        self._ask("fault", **values)

    def release(self) -> None:
        """Let answers that are being delayed come now."""
        self._ask("release")

    def clear(self) -> None:
        """Forget faults that did not happen yet."""
        self._ask("clear")

    def unused(self) -> int:
        """How many faults did not happen yet."""
        return int(self._ask("unused"))

    def move(self, upstream: int) -> None:
        """Forward to another port from the next request on."""
        self._ask("upstream", port=upstream)

    def records(self) -> list[Record]:
        """The requests that ended since the last call."""
        return [Record(**values) for values in self._ask("records")]

    def cpu_s(self) -> float:
        """Processor seconds that the proxy has used so far."""
        return float(self._ask("cpu_s"))


def most_in_flight(records: Iterable[Record]) -> int:
    """The largest number of requests that were in progress at one moment."""
    moments = sorted([(r.began, 1) for r in records] + [(r.ended, -1) for r in records])
    most = now = 0
    for _, change in moments:
        now += change
        most = max(most, now)
    return most


def data_bytes(records: Iterable[Record], method: str = "GET") -> int:
    """Bytes of object bodies that went through: received for GET, sent for PUT; listings do not count."""
    objects = [r for r in records if r.method == method and r.key.count("/") > 1 and r.status < 300]
    return sum(r.received_bytes if method == "GET" else r.sent_bytes for r in objects)


def measure(link: Link, connections: int, *, size: int = 16 << 20, total: int = 1 << 30) -> dict[str, float]:
    """What the proxy carries over `connections` connections: MB/s down and up, and its own share of a core."""
    body = bytes(size)
    with S3Front(link=link) as front, ThreadPoolExecutor(connections) as pool:
        ready = HTTPConnection(LOOPBACK, front.port)
        ready.request("PUT", "/box")
        ready.getresponse().read()
        ready.request("PUT", "/box/object", body)
        ready.getresponse().read()
        ready.close()
        figures: dict[str, float] = {}
        for way in ("down", "up"):
            each = max(1, total // size // connections)

            def work(number: int, way: str = way, each: int = each) -> None:
                buffer = bytearray(1 << 20)
                connection = HTTPConnection(LOOPBACK, front.port)
                for _ in range(each):
                    if way == "up":
                        connection.request("PUT", f"/box/{number}", body)
                        connection.getresponse().read()
                    else:
                        connection.request("GET", "/box/object")
                        answer = connection.getresponse()
                        while answer.readinto(buffer):
                            pass
                connection.close()

            began, cpu = time.monotonic(), front.cpu_s()
            list(pool.map(work, range(connections)))
            took = time.monotonic() - began
            figures[f"{way}_mb_s"] = connections * each * size / took / 1e6
            figures[f"{way}_cores"] = (front.cpu_s() - cpu) / took
        return figures


def main() -> None:
    """Print what the proxy can carry on this machine, without and with the simulated link."""
    rows = []
    for name, link in (("no limit", Link()), ("30 ms, 90 MB/s a connection", SIMULATED)):
        for connections in (1, 4, 16, 32):
            total = min(1 << 30, connections << 28)
            found = measure(link, connections, total=total)
            rows.append([name, connections, *(found[k] for k in ("down_mb_s", "down_cores", "up_mb_s", "up_cores"))])
    print(table(["link", "connections", "down MB/s", "proxy's cores", "up MB/s", "proxy's cores"], rows))


if __name__ == "__main__":
    main()
