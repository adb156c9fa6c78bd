"""Ranks of a bare process group, without `elastic`: what NCCL and torch do when a peer stops, dies or never comes.

`python -m jobs.bench.gpu_raw rank ...` is one of them; `... gradients DEVICE SETTING` prints a hash of gradients.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.nn import functional

from elastic.compat.torch_groups import forget_groups, process_groups
from elastic.parallel.nccl import SETTINGS

PATIENCE_S = 60.0
LENGTH = 1 << 20


class Ranks:
    """Processes of one group each, told what to do by lines of JSON. Use as a context manager.

    Args:
        place: a `gpu_checks.Place`.
        environment: further environment variables.
    """

    def __init__(self, place: Any, size: int, environment: dict[str, str] | None = None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = {setting.name: setting.value for setting in SETTINGS}
        arguments = [sys.executable, "-m", "jobs.bench.gpu_raw", "rank"]
        self.processes = [
            subprocess.Popen(
                [*arguments, str(rank), str(size), str(port), place.device.type],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **settings, "NCCL_HOSTID": f"rank-{rank}", **(environment or {})},
            )
            for rank in range(size)
        ]
        self._answers: list[queue.Queue[Any]] = [queue.Queue() for _ in self.processes]
        self._readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in range(size)]

    def __enter__(self) -> Ranks:
        for reader in self._readers:
            reader.start()
        for answers in self._answers:
            answers.get(timeout=PATIENCE_S)  # it has imported everything
        return self

    def _read(self, rank: int) -> None:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        for line in stdout:
            with contextlib.suppress(ValueError):  # not ours
                self._answers[rank].put(json.loads(line)["answer"])

    def ask(
        self,
        what: str,
        *arguments: Any,
        only: int | None = None,
        stopping: int | None = None,
        killing: int | None = None,
        wait_s: float = PATIENCE_S,
    ) -> list[Any]:
        """Have the ranks, or `only` one, do something; their answers, None where none came in time.

        Args:
            stopping, killing: first all form a group, and then this rank is stopped or killed.
        """
        if stopping is not None or killing is not None:
            self.ask("form")
            victim = stopping if stopping is not None else killing
            assert victim is not None
            os.kill(self.processes[victim].pid, signal.SIGSTOP if killing is None else signal.SIGKILL)
        asked = range(len(self.processes)) if only is None else (only,)
        for rank in asked:
            stdin = self.processes[rank].stdin
            assert stdin is not None
            stdin.write(json.dumps({"do": what, "arguments": arguments}) + "\n")
            stdin.flush()
        until, found = time.monotonic() + wait_s, []
        for rank in asked:
            try:
                found.append(self._answers[rank].get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                found.append(None)
        return found

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


class Rank:
    """One of them."""

    def __init__(self, rank: int, size: int, port: int, kind: str):
        self._rank, self._size = rank, size
        self._device = torch.device("cuda:0" if kind == "cuda" else "cpu")
        self._backend = "nccl" if kind == "cuda" else "gloo"
        self._store = dist.TCPStore("127.0.0.1", port, size, rank == 0, wait_for_workers=False)
        self._formed = 0

    def form(self) -> bool:
        self._formed += 1
        store = dist.PrefixStore(str(self._formed), self._store)
        dist.init_process_group(
            self._backend,
            store=store,
            rank=self._rank,
            world_size=self._size,
            timeout=timedelta(seconds=PATIENCE_S),
        )
        one = torch.ones(1, device=self._device)
        dist.all_reduce(one)  # the first operation makes the communicator
        return float(one) == self._size  # reading waits for the device: allocations would wait for a kernel

    def _leave(self) -> None:
        if self._backend == "nccl":
            _abort()
        else:
            dist.destroy_process_group()

    def worlds(self, count: int) -> list[dict[str, float]]:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            self.form()
            ones = torch.ones(LENGTH, device=self._device)
            dist.all_reduce(ones)
            assert float(ones[-1]) == self._size
            formed = time.perf_counter() - began
            self._leave()
            free, total = torch.cuda.mem_get_info() if self._device.type == "cuda" else (0, 0)
            found.append(
                {
                    "seconds": formed,
                    "memory_mib": (total - free) >> 20,
                    "threads": len(os.listdir("/proc/self/task")),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                }
            )
        return found

    def abort_from_thread(self) -> dict[str, Any]:
        ones = torch.ones(LENGTH, device=self._device)
        took: dict[str, float] = {}

        def free() -> None:
            time.sleep(1.0)
            began = time.perf_counter()
            _abort()
            took["abort_s"] = round(time.perf_counter() - began, 3)

        thread = threading.Thread(target=free)
        dist.all_reduce(ones)
        behind = ones * 2
        thread.start()
        began, raised = time.perf_counter(), ""
        try:
            first = float(behind.cpu()[0])
        except Exception as error:  # what it is, is what is asked
            first, raised = float("nan"), type(error).__name__
        waited = time.perf_counter() - began
        thread.join()
        torch.cuda.synchronize()
        left = torch.arange(512.0, device=self._device).remainder(7).repeat(512, 1)
        exact = bool((left @ left.T == (left.cpu() @ left.cpu().T).to(self._device)).all())
        assert exact, "products are wrong after an abort"
        return {**took, "host_waited_s": round(waited, 3), "raised": raised, "value_behind": first}

    def create_alone(self, eager: bool) -> dict[str, Any]:
        """Make a communicator whose other member never comes; abort it after 2 s; then make one for this rank alone."""

        def create() -> None:
            store = dist.PrefixStore("alone", self._store)
            device = self._device if eager else None
            dist.init_process_group("nccl", store=store, rank=self._rank, world_size=self._size, device_id=device)
            if not eager:
                dist.all_reduce(torch.ones(1, device=self._device))

        return self._left_alone(create)

    def send_alone(self) -> dict[str, Any]:
        """Send for the first time to a rank that has stopped; abort after 2 s; then be a world alone."""
        return self._left_alone(lambda: dist.send(torch.ones(LENGTH, device=self._device), 1 - self._rank))

    def exchange_alone(self) -> dict[str, Any]:
        """The same with the first exchange between pairs, after sums."""
        ones = torch.ones(self._size, device=self._device)
        return self._left_alone(lambda: dist.all_to_all_single(torch.empty_like(ones), ones))

    def _left_alone(self, work: Callable[[], None]) -> dict[str, Any]:
        found: dict[str, Any] = {"raised": "", "returned_s": None, "abort_s": None, "next_world_s": None}

        def attempt() -> None:
            began = time.perf_counter()
            try:
                work()
            except Exception as error:  # what it is, is what is asked
                found["raised"] = f"{type(error).__name__}: {error}"[:160]
            found["returned_s"] = round(time.perf_counter() - began, 3)

        def free() -> None:
            began = time.perf_counter()
            _abort_all()
            found["abort_s"] = round(time.perf_counter() - began, 3)

        waiting, freeing = (threading.Thread(target=target, daemon=True) for target in (attempt, free))
        waiting.start()
        waiting.join(2.0)
        freeing.start()
        freeing.join(6.0)
        waiting.join(2.0)
        before = time.process_time()
        time.sleep(1.0)
        found["cpu_after"] = round(time.process_time() - before, 3)
        following = threading.Thread(target=self._be_alone, args=(found,), daemon=True)
        following.start()
        following.join(8.0)
        return found

    def _be_alone(self, found: dict[str, Any]) -> None:
        began = time.perf_counter()
        forget_groups()
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        ones = torch.ones(LENGTH, device=self._device)
        dist.all_reduce(ones)
        assert float((ones * 2).sum()) == 2 * LENGTH
        found["next_world_s"] = round(time.perf_counter() - began, 3)

    def drop_after_kill(self) -> float:
        ones = torch.ones(LENGTH, device=self._device)
        dist.all_reduce(ones)
        time.sleep(1.0)
        began = time.perf_counter()
        _abort()
        return round(time.perf_counter() - began, 3)


def _abort() -> None:
    _abort_all()
    forget_groups()


def _abort_all() -> None:
    """Abort all groups side by side, as a worker does when its world breaks."""
    threads = [threading.Thread(target=group.abort) for group in process_groups()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def gradients(device: torch.device, setting: str) -> str:
    """A hash of the gradients of layers of usual kinds, in deterministic mode."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high" if setting == "tf32" else "highest")
    torch.manual_seed(0)
    embedding, convolution = nn.Embedding(100, 64), nn.Conv2d(3, 16, 3)
    layers = nn.ModuleList([embedding, convolution, nn.BatchNorm2d(16), nn.Linear(64, 192), nn.Dropout(0.1)]).to(device)
    tokens = torch.randint(0, 100, (4, 128), device=device)
    q, k, v = layers[3](embedding(tokens)).view(4, 128, 3, 4, 16).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    pictures = layers[2](convolution(torch.randn(4, 3, 32, 32, device=device)))
    (layers[4](attended).square().sum() + pictures.relu().sum()).backward()
    found = xxhash.xxh3_64()
    for parameter in layers.parameters():
        assert parameter.grad is not None
        found.update(parameter.grad.cpu().numpy().tobytes())
    return found.hexdigest()


def main(kind: str, *arguments: str) -> None:
    if kind == "gradients":
        print(gradients(torch.device(arguments[0]), arguments[1]))
        return
    rank, size, port = map(int, arguments[:3])
    this = Rank(rank, size, port, arguments[3])
    actions: dict[str, Callable[..., Any]] = {
        action.__name__: action
        for action in (
            this.form,
            this.worlds,
            this.abort_from_thread,
            this.create_alone,
            this.send_alone,
            this.drop_after_kill,
        )
    }
    print(json.dumps({"answer": "ready"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"answer": actions[asked["do"]](*asked["arguments"])}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
