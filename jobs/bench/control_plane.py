"""The real server of a run with thousands of real connections: losses, steady state, and a server that stands still.

    python -m jobs.bench.control_plane [--sizes 64,1024,4096] [--losses 20] [--freeze 10] [--json FILE]

The server runs in a process of its own, and the workers in several: each worker has one WebSocket, speaks the
protocol's own messages, beats, and joins again when its world is broken. No worker trains, so that what is measured is
the control plane alone. A loss is a connection that is aborted, as by a process that dies. All processes share this
machine's cores: with 4096 workers their side is several times the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from elastic.child import raise_descriptor_limit
from jobs.bench.report import table, write_json

SIZES = "8,64,512,1024,4096"
CLIENTS = 4  # processes that the workers are divided over
STEADY_S = 8.0
WAIT_S = 180.0  # for the first world: connections are accepted at a limited pace
TOKEN = "token"


class Notes:
    """A keeper that only notes what it hears."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.kinds.append(kind)

    def world_formed(self, world: Any) -> None:
        self.kinds.append(f"world of {world.size}")

    def restore_point(self) -> Any:
        from elastic.membership.protocol import RestorePoint

        return RestorePoint()

    def claim_step(self) -> int:
        return 0

    def ended(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.kinds.append(name)


# ---- the server's process ------------------------------------------------------------------------------------------


def serve(size: int) -> None:
    """Print the url; when standard input ends, print what the keeper heard."""
    from elastic.membership.server import MembershipServer
    from elastic.membership.state import Limits, State

    raise_descriptor_limit()
    keeper = Notes()
    limits = Limits(min_workers=1, max_workers=size, microbatches=4 * size, settle_s=WAIT_S, exact=True)
    store = {"host": "127.0.0.1", "new_store": lambda: (0, lambda: None)}
    server = MembershipServer(keeper, State(1, limits), TOKEN, **store)  # type: ignore[arg-type]
    server.start()
    print(server.url, flush=True)
    sys.stdin.read()
    print(json.dumps(Counter(keeper.kinds)), flush=True)
    os._exit(0)  # closing thousands of connections in turn is not measured


# ---- a process of workers ------------------------------------------------------------------------------------------


class Clients:
    """Some of the workers. Prints `world N SECONDS` when all of them have heard of world N, and `lost` for each
    connection that the server ended."""

    def __init__(self, url: str, first: int, count: int):
        self._url, self._names = url, [f"w{number:05}" for number in range(first, first + count)]
        self._heard: Counter[int] = Counter()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._going: dict[str, asyncio.Event] = {}
        self._beat_s: dict[str, float] = {}

    async def run(self) -> None:
        import aiohttp

        loop, commands = asyncio.get_running_loop(), asyncio.Queue[str]()

        def read() -> None:
            for command in itertools.chain(sys.stdin, ["end"]):  # it ends with the benchmark, however that ends
                loop.call_soon_threadsafe(commands.put_nowait, command)

        threading.Thread(target=read).start()
        headers, connector = {"Authorization": f"Bearer {TOKEN}"}, aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
            for name in self._names:
                self._start(session, name)
            while (command := (await commands.get()).split())[0] != "end":
                name = command[1]
                self._going[name].set()
                self._names.remove(name)
            os._exit(0)

    def _start(self, session: Any, name: str) -> None:
        self._going[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._work(session, name, self._going[name]))

    async def _work(self, session: Any, name: str, going: asyncio.Event) -> None:
        from elastic.membership.protocol import (
            Acknowledge,
            Assignment,
            Beat,
            BeatHeard,
            Broken,
            Join,
            Rows,
            Whereabouts,
            dumps,
            from_host,
        )
        from elastic.membership.stage import Position, Stage
        from elastic.membership.world import Member

        number = int(name[1:])
        join = Join(Member(name, f"n{number // 8}", number % 8), -1, None, "", "", 0.0, {})
        at: Whereabouts | None = None
        async with session.ws_connect(f"{self._url}/worker?id={name}", max_msg_size=1 << 24) as socket:
            ended = asyncio.create_task(going.wait())
            await socket.send_str(dumps(join))
            beats = asyncio.create_task(self._beat(socket, lambda: dumps(Beat(time.monotonic(), at)), name))
            while True:
                receiving = asyncio.create_task(socket.receive())
                await asyncio.wait({receiving, ended}, return_when=asyncio.FIRST_COMPLETED)
                if going.is_set():
                    socket._response.connection.transport.abort()
                    beats.cancel()
                    receiving.cancel()
                    return
                raw = receiving.result()
                if not isinstance(raw.data, str):
                    print(f"lost {name}", flush=True)
                    return
                message = from_host(raw.data)
                if isinstance(message, BeatHeard):
                    self._beat_s[name] = message.next_s
                elif isinstance(message, Assignment):
                    step = message.generation.n  # each world does one step: with none they would be given up
                    join = replace(join, applied=step)
                    at = Whereabouts(message.generation, Position(step + 1, Stage.PASS, 0))
                    row = {"generation": str(message.generation), "step": step}
                    if not self._heard[step]:
                        await socket.send_str(dumps(Rows([row]), message.generation))
                    self._note(message.generation)
                elif isinstance(message, Broken):
                    await socket.send_str(dumps(Acknowledge(message.generation)))
                    await socket.send_str(dumps(join))
                elif message.kind in ("fenced", "out", "over"):
                    print(f"lost {name}", flush=True)
                    return

    def _note(self, generation: Any) -> None:
        self._heard[generation.n] += 1
        self._report(generation.n)

    def _report(self, n: int) -> None:
        if self._heard[n] >= len(self._names):
            print(f"world {n} {time.monotonic()}", flush=True)

    async def _beat(self, socket: Any, text: Any, name: str) -> None:
        from elastic.membership.protocol import BEAT_S

        self._beat_s[name] = BEAT_S
        await asyncio.sleep(int(name[1:]) * 0.618 % 1 * BEAT_S)  # workers started at many moments
        while not socket.closed:
            await socket.send_str(text())
            await asyncio.sleep(self._beat_s[name])


# ---- the benchmark -------------------------------------------------------------------------------------------------


class Process:
    """One of these processes, whose lines are read as they come."""

    def __init__(self, *arguments: str, lines: queue.Queue[tuple[int, list[str]]] | None = None, number: int = 0):
        command = [sys.executable, "-m", "jobs.bench.control_plane", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        if lines is not None:
            threading.Thread(target=self._read, args=(lines, number), daemon=True).start()

    def _read(self, lines: queue.Queue[tuple[int, list[str]]], number: int) -> None:
        for line in self._process.stdout or ():
            lines.put((number, line.split()))

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def say(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    def finish(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def cpu_s(self) -> float:
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Plane:
    """A server and the processes of its workers."""

    def __init__(self, size: int):
        self.size, self.lost = size, 0
        self.server = Process("--serve", str(size))
        url = self.server.line()
        self._lines: queue.Queue[tuple[int, list[str]]] = queue.Queue()
        count = max(1, min(CLIENTS, size // 16))  # each keeps some, whoever is lost
        spans = list(itertools.pairwise(size * i // count for i in range(count + 1)))
        self.clients = [
            Process("--clients", url, str(a), str(b - a), lines=self._lines, number=i) for i, (a, b) in enumerate(spans)
        ]
        self._places = {f"w{number:05}": i for i, (a, b) in enumerate(spans) for number in range(a, b)}

    def world(self, after: int) -> tuple[int, float]:
        """Wait until all workers have heard of one world later than `after`; its number, and when the last one did."""
        heard: dict[int, dict[int, float]] = {}
        deadline = time.monotonic() + WAIT_S
        while True:
            number, words = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            if words[0] == "lost":
                self.lost += 1
                continue
            here = heard.setdefault(int(words[1]), {})
            here[number] = float(words[2])
            if int(words[1]) > after and len(here) == len(self.clients):
                return int(words[1]), max(here.values())

    def abort(self, name: str) -> float:
        self.clients[self._places[name]].say(f"abort {name}")
        return time.monotonic()

    def close(self) -> dict[str, int]:
        """End all; returns what the keeper heard, by kind."""
        while not self._lines.empty():
            self.lost += self._lines.get()[1][0] == "lost"
        self.server.finish()
        found: dict[str, int] = json.loads(self.server.line())
        for process in (*self.clients, self.server):
            process.end()
        return found


def measure(size: int, losses: int, freeze_s: float) -> list[Any]:
    """One row of the table."""
    plane = Plane(size)
    began = time.monotonic()
    n, formed = plane.world(0)
    first_s = formed - began
    before, at = plane.server.cpu_s(), time.monotonic()
    time.sleep(STEADY_S)
    steady = (plane.server.cpu_s() - before) / (time.monotonic() - at)
    print(f"{size} workers: the first world after {first_s:.1f} s", file=sys.stderr, flush=True)
    stalls = []
    for i in range(min(losses, size // 2)):
        aborted = plane.abort(f"w{i * 7919 % size:05}")  # a prime: everybody another one, in all processes
        n, formed = plane.world(n)
        stalls.append(formed - aborted)
        print(f"{i + 1} of {losses} losses: the next world after {stalls[-1]:.2f} s", file=sys.stderr, flush=True)
    if freeze_s:
        os.kill(plane.server.pid, signal.SIGSTOP)
        time.sleep(freeze_s)
        os.kill(plane.server.pid, signal.SIGCONT)
        time.sleep(freeze_s)
    heard = plane.close()
    worlds = sum(count for kind, count in heard.items() if kind.startswith("world of "))
    suspected = heard.get("member_late", 0) + heard.get("member_evicted", 0)
    gone = plane.lost, max(0, heard.get("member_lost", 0) - len(stalls)), worlds - 1 - len(stalls)
    ordered = sorted(stalls)
    return [size, first_s, 100 * steady, len(stalls), ordered[len(ordered) // 2], ordered[-1], suspected, *gone]


HEAD = [
    *("workers", "first world s", "server % of a core", "losses", "next world s", "worst s"),
    *("suspected", "refused", "lost besides", "worlds besides"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--freeze", type=float, default=10.0, help="seconds for which the server is stopped; 0: not")
    parser.add_argument("--json")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--clients", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    raise_descriptor_limit()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.clients:
        url, first, count = arguments.clients
        return asyncio.run(Clients(url, int(first), int(count)).run())
    print(f"load average at the start: {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors")
    rows = []
    for size in map(int, arguments.sizes.split(",")):
        rows.append(measure(size, arguments.losses, arguments.freeze))
        print(table(HEAD, rows[-1:]), flush=True)
    print(f"\n{table(HEAD, rows)}")
    write_json(arguments.json, {"head": HEAD, "rows": rows})


if __name__ == "__main__":
    main()
