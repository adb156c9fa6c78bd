"""An asynchronous parameter server on Ray actors, beside a synchronous one: digits, without Elastic's trainer.

    python -m jobs.parameter_server [--workers 3] [--updates 300] [--kill 1] [--slow-ms 30] [--address ADDRESS]

One actor holds the weights. Workers ask for them, and send gradients, each at its own speed; `--batch` gradients make
an update, their mean. A gradient of weights that are more than `--max-staleness` updates old is dropped. Workers come
and go: one that is killed (`--kill`) is missed by nobody, and another one takes its place. The synchronous run waits
for a gradient of every worker in each update, so that it is as fast as the slowest (`--slow-ms`).

It makes no promise of bits: which gradients make an update depends on who was fast. A run that must be repeatable, or
count each sample once, is an `elastic.Job`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from jobs.digits import Digits

SAMPLES = 32  # of one gradient


@dataclass(frozen=True)
class Settings:
    """
    Args:
        updates: after which the run ends.
        batch: gradients of one update.
        max_staleness: updates by which the weights of a gradient may be older than those that it is applied to.
        slow_ms: what the first worker waits before each gradient.
    """

    workers: int = 3
    updates: int = 300
    batch: int = 2
    max_staleness: int = 8
    lr: float = 0.05
    slow_ms: float = 30.0


@dataclass
class Message:
    """A gradient, float32, of all parameters in a line.

    Args:
        version: of the weights that it was computed with.
    """

    gradient: np.ndarray
    version: int
    loss: float


@ray.remote(num_cpus=0)
class Server:
    """Holds the weights, and says which version they are: how many updates made them."""

    def __init__(self, settings: Settings):
        torch.set_num_threads(1)
        self._begin(settings)

    def _begin(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self._settings, self._model = settings, Digits(dropout=0.0).model()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=settings.lr, momentum=0.9)
        self._pending: list[Message] = []
        self._staleness: Counter[int] = Counter()
        self._version, self._dropped, self._began = 0, 0, 0.0
        self._seconds, self._gradients = 0.0, 0
        self._senders: set[int] = set()
        self._done = asyncio.Event()

    async def begin(self, settings: Settings) -> None:
        """Begin another run, from the same weights."""
        self._begin(settings)

    async def exchange(self, worker: int, message: Message | None) -> tuple[int, np.ndarray] | None:
        """Take a gradient, and give the newest weights with their version; None when the run is over."""
        if message is not None and not self._done.is_set():
            self._began = self._began or time.perf_counter()
            self._take(worker, message)
        if self._done.is_set():
            return None
        return self._version, parameters_to_vector(self._model.parameters()).detach().numpy().copy()

    def _take(self, worker: int, message: Message) -> None:
        self._senders.add(worker)
        late = self._version - message.version
        if late > self._settings.max_staleness:
            self._dropped += 1
            return
        self._staleness[late] += 1
        self._pending.append(message)
        if len(self._pending) < self._settings.batch:
            return
        mean = torch.from_numpy(np.mean([one.gradient for one in self._pending], axis=0))
        self._gradients, self._pending = self._gradients + len(self._pending), []
        with torch.no_grad():
            at = 0
            for parameter in self._model.parameters():
                parameter.grad = mean[at : at + parameter.numel()].view_as(parameter)
                at += parameter.numel()
        self._optimizer.step()
        self._version += 1
        if self._version == self._settings.updates:
            self._seconds = time.perf_counter() - self._began
            self._done.set()

    async def progress(self) -> tuple[int, set[int]]:
        """How many updates there were, and the numbers of the workers that have sent gradients."""
        return self._version, self._senders

    async def result(self) -> dict[str, Any]:
        """Wait for the end; the figures, and how good the weights are on held-out digits."""
        await self._done.wait()
        data = Digits().eval_data()
        with torch.no_grad():  # in training mode: running statistics of a norm are the workers' own
            right = (self._model(data.images).argmax(1) == data.labels).float().mean()
        return {
            "updates": self._version,
            "gradients": self._gradients,
            "samples_s": self._gradients * SAMPLES / self._seconds,
            "dropped": self._dropped,
            "staleness": {str(late): count for late, count in sorted(self._staleness.items())},
            "senders": len(self._senders),
            "accuracy": round(float(right), 4),
        }


@ray.remote(num_cpus=1, max_restarts=0)
class Worker:
    """Computes gradients of random samples. It keeps nothing that is missed when it dies."""

    def __init__(self, number: int, settings: Settings):
        torch.set_num_threads(1)
        self._number, self._wait_s = number, settings.slow_ms / 1000 if number == 0 else 0.0
        self._job = Digits(dropout=0.0)
        self._model, self._data = self._job.model(), self._job.train_data()
        self._draws = torch.Generator().manual_seed(number)

    def ready(self) -> None:
        """Return when this worker has imported everything, which takes longer than the rest."""

    def gradient(self, version: int, weights: np.ndarray) -> Message:
        """One gradient, of the mean loss of SAMPLES samples."""
        if self._wait_s:
            time.sleep(self._wait_s)  # what a slower machine would take
        vector_to_parameters(torch.from_numpy(weights.copy()), self._model.parameters())
        self._model.zero_grad()
        chosen = torch.randint(len(self._data), (SAMPLES,), generator=self._draws)
        loss, weight, _ = self._job.loss(self._model, self._data.__getitems__(chosen))
        (loss / weight).backward()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return Message(parameters_to_vector(gradients).numpy(), version, float(loss) / weight)

    def run(self, server: Any) -> int:
        """Exchange gradients for weights until the run is over; returns how many were sent."""
        sent, message = 0, None
        while (found := ray.get(server.exchange.remote(self._number, message))) is not None:
            message = self.gradient(*found)
            sent += 1
        return sent


def asynchronous(settings: Settings, server: Any, workers: list[Any], kill: int, timeout_s: float) -> dict[str, Any]:
    """A run in which nobody waits for anybody. `kill` workers die on the way, and others take their place.

    Raises:
        TimeoutError: it did not end in time.
    """
    ray.get(server.begin.remote(settings), timeout=timeout_s)
    result, deadline = server.result.remote(), time.monotonic() + timeout_s
    running = {worker.run.remote(server): (number, worker) for number, worker in enumerate(workers)}
    started, killed, joined = len(workers), 0, 0
    try:
        while True:
            ended, _ = ray.wait([result, *running], timeout=0.1)
            if result in ended:
                return {**ray.get(result), "killed": killed, "joined": joined}
            for reference in ended:
                running.pop(reference)
                worker = Worker.remote(started, settings)  # type: ignore[attr-defined]
                running[worker.run.remote(server)] = (started, worker)
                started, joined = started + 1, joined + 1
            version, senders = ray.get(server.progress.remote())
            due = version >= settings.updates * (killed + 1) // (kill + 2)  # spread over the run
            victims = [worker for number, worker in running.values() if number in senders and number != 0]
            if killed < kill and due and victims:
                ray.kill(victims[-1])
                killed += 1
            if time.monotonic() > deadline:
                raise TimeoutError(f"{version} of {settings.updates} updates after {timeout_s:g} s")
    finally:
        for _, worker in running.values():
            ray.kill(worker)


def synchronous(settings: Settings, server: Any, workers: list[Any], timeout_s: float) -> dict[str, Any]:
    """A run in which each update is the mean of a gradient of every worker.

    Raises:
        TimeoutError: it did not end in time.
    """
    rounds = max(1, settings.updates * settings.batch // settings.workers)  # as many gradients
    one = Settings(**{**asdict(settings), "batch": settings.workers, "updates": rounds})
    ray.get(server.begin.remote(one), timeout=timeout_s)
    result, deadline = server.result.remote(), time.monotonic() + timeout_s
    while (found := ray.get(server.exchange.remote(0, None), timeout=timeout_s)) is not None:
        messages = ray.get([w.gradient.remote(*found) for w in workers], timeout=timeout_s)
        ray.get([server.exchange.remote(number, m) for number, m in enumerate(messages)], timeout=timeout_s)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{found[0]} of {rounds} updates after {timeout_s:g} s")
    return ray.get(result, timeout=timeout_s)  # type: ignore[no-any-return]


def main() -> None:
    """Run both, and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--kill", type=int, default=1, help="workers that are killed on the way")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for the start, and for each of the two runs"
    )
    parser.add_argument("--address", help="of a Ray cluster; by default one is started")
    parser.add_argument("--json", metavar="FILE")
    given = vars(parser.parse_args())
    kill, timeout_s, address, file = (given.pop(name) for name in ("kill", "timeout", "address", "json"))
    settings = Settings(**given)
    ray.init(
        address=address, num_cpus=None if address else settings.workers, log_to_driver=False, include_dashboard=False
    )
    began = time.monotonic()
    try:
        server = Server.remote(settings)  # type: ignore[attr-defined]
        workers = [Worker.remote(number, settings) for number in range(settings.workers)]  # type: ignore[attr-defined]
        # both runs have these processes: what they import takes longer than what they compute
        ray.get([worker.ready.remote() for worker in workers], timeout=timeout_s)
        print(f"{settings.workers} workers are ready after {time.monotonic() - began:.0f} s", flush=True)
        bound = synchronous(settings, server, workers, timeout_s)
        found = {"asynchronous": asynchronous(settings, server, workers, kill, timeout_s), "synchronous": bound}
    finally:
        ray.shutdown()
    if file:
        Path(file).write_text(json.dumps(found))
    for name, run in found.items():
        late = [int(k) for k in run["staleness"]]
        print(
            f"{name:<13} {run['samples_s']:>7.0f} samples/s, {run['updates']} updates of {run['gradients']} gradients, "
            f"{max(late)} updates late at most, {run['dropped']} dropped, held-out accuracy {run['accuracy']}"
        )
    lost = found["asynchronous"]
    print(f"workers lost {lost['killed']}, joined {lost['joined']}, senders {lost['senders']}")


if __name__ == "__main__":
    main()
