"""The process group of one world, and the few small collectives that every step boundary needs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from elastic.compat.torch_groups import all_gather_flat, count_groups_from_zero
from elastic.errors import WorldBroken, one_line
from elastic.membership.protocol import Assignment
from elastic.parallel.device import host_wait
from elastic.parallel.layout import Layout, lay_out
from elastic.parallel.mesh import Mesh, make_mesh, make_whole
from elastic.worker.backend import Backend
from elastic.worker.flags import Flags
from elastic.worker.gloo_backend import GlooBackend
from elastic.worker.nccl_backend import NcclBackend

STORE_S = 10.0
LEAST_LEVELLED = 4  # workers: two nodes of two

BACKENDS: dict[str, type[Backend]] = {"cpu": GlooBackend, "cuda": NcclBackend}  # by the type of the device


def backend_of(device: torch.device) -> type[Backend]:
    """The backend for workers with such devices."""
    return BACKENDS[device.type]


@dataclass
class Group:
    """The process group of one world.

    Args:
        strategy, per_node, tensor, stages: how workers are laid out; see `lay_out`.
        costs: of the layers of a pipeline, as this worker knows them; when connected, as rank 0 does, since all must
            cut alike.
        node: this worker's node.
        exact: gradients are exchanged in canonical order.
        on_failure: called, from any thread, with an error that the backend finds by itself.
    """

    assignment: Assignment
    device: torch.device
    strategy: str = "ddp"
    per_node: int | None = None
    node: str = ""
    tensor: int = 1
    stages: tuple[int, int] | None = None
    costs: Sequence[int] = ()
    exact: bool = False
    on_failure: Callable[[str], None] = lambda what: None
    _woken: threading.Event = field(default_factory=threading.Event)
    _backend: Backend = field(init=False)
    mesh: Mesh = field(init=False)

    def __post_init__(self) -> None:
        make = backend_of(self.device)
        self._backend = make(str(self.assignment.generation), self.size, self.device, self.on_failure)

    @property
    def freed(self) -> bool:
        """Whether the world is broken, so that results of its collectives must not be used."""
        return self._backend.freed

    @property
    def rank(self) -> int:
        return self.assignment.rank

    @property
    def size(self) -> int:
        return self.assignment.size

    @property
    def layout(self) -> Layout:
        return self.mesh.layout

    @property
    def place(self) -> int | None:
        """This worker's place in the mesh; None for a spare."""
        return self.mesh.place

    @property
    def leads(self) -> bool:
        """Whether this is the one worker that acts for the world."""
        return self.mesh.place == 0

    def connect(self, timeout_s: float) -> None:
        """Connect to all members, in all groups of the layout.

        Raises:
            WorldBroken: a member or the store did not answer.
        """
        timeout = timedelta(seconds=timeout_s)
        store = self._reach_store()
        with _connecting(f"connecting world {self.assignment.generation}"):
            store.set_timeout(timeout)
            count_groups_from_zero()  # otherwise members that failed to connect before would use other names
            store = dist.PrefixStore(str(self.assignment.generation), store)
            with self._backend.connecting():
                dist.init_process_group(
                    self._backend.name,
                    store=store,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timeout,
                )
                self._backend.open(store, timeout_s)
                self.mesh = self._lay_out()
                self._backend.open(store, timeout_s)

    def _reach_store(self) -> dist.Store:
        """The store at which the members find each other.

        If the store is gone because its world is over, torch tries to connect until a time-out, and cannot be
        interrupted. So a store that refuses a plain connection is not given to torch: there may be no server to declare
        the world broken. And torch connects in a thread of its own, which is left behind when the world breaks.
        """
        host, port = self.assignment.store
        found: list[dist.Store | Exception] = []

        def reach() -> None:
            timeout = timedelta(seconds=STORE_S)
            try:
                socket.create_connection((host, port), STORE_S).close()
                found.append(dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
            except (OSError, RuntimeError) as error:
                found.append(error)
            self._woken.set()

        threading.Thread(target=reach, name="reach-store", daemon=True).start()
        what = f"the store of world {self.assignment.generation} at {host}:{port}"
        if not self._woken.wait(3 * STORE_S) or not found:
            raise WorldBroken(f"{what} was not reached")
        if isinstance(found[0], Exception):
            raise WorldBroken(f"{what} was not reached: {found[0]}") from found[0]
        return found[0]

    def _lay_out(self) -> Mesh:
        nodes = [""] * self.size
        levels = self.strategy == "ddp" and self.exact and self.size >= LEAST_LEVELLED and self.stages is None
        if self.strategy == "hsdp" or self.tensor > 1 or levels:
            nodes = [str(n) for n in self.gather_ints(xxhash.xxh3_64_intdigest(self.node.encode()) >> 1)]
        if self.stages is not None:
            self.costs = self.gather_json([*self.costs])[0]
        layout = lay_out(nodes, self.strategy, self.per_node, self.tensor, self.stages)
        if self.strategy == "ddp" and self.tensor == 1 and self.stages is None:
            return make_whole(layout, self.rank, nodes)
        return make_mesh(layout, self.rank, self.device, str(self.assignment.generation))

    def free(self) -> None:
        """Make every operation that blocks in this group raise. From any thread; returns at once."""
        self._woken.set()
        self._backend.free()

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Wrap operations that communicate, or may: if they raise because of a peer, the world is broken. Any other
        error is raised unchanged, except those that may come from arbitrary results of a freed world.

        Raises:
            WorldBroken: a member was lost, or the group was freed.
        """
        try:
            yield
        except Exception as error:
            # errors caused by a peer, or by a group that is gone, have one of these types
            of_torch = isinstance(error, (RuntimeError, ValueError))
            if isinstance(error, WorldBroken) or not (self.spoils or (of_torch and self.failed_by(error))):
                raise
            raise WorldBroken(f"{what} failed: {one_line(error)}") from error

    def failed_by(self, error: BaseException) -> bool:
        """Whether an error came from a peer or the network, and not from this process's computation.

        It did if the group was freed or one of its operations failed: the backend knows, or the error has torch's own
        type for it. A world of one has no peer.
        """
        if self.freed:
            return True
        if self.size == 1:
            return False
        return isinstance(error, dist.DistError) or self._backend.has_failed()

    @property
    def spoils(self) -> bool:
        """Whether this process may be computing with arbitrary results, so that no error is believed."""
        return self.freed and self._backend.leaves_garbage

    def report(self) -> str:
        """What the backend knows of where all members are, as a text for people. May take seconds."""
        return self._backend.report()

    def check(self) -> None:
        """Raise if the group was freed: the result of an aborted collective must not be used.

        Raises:
            WorldBroken: it was freed.
        """
        if self.freed:
            raise WorldBroken(f"world {self.assignment.generation} is broken")

    def close(self) -> None:
        """Drop the group; peers that are blocked in it are freed."""
        self._backend.close()

    def agree(self, flags: Flags) -> Flags:
        """The largest of each flag over all members. This is the fence: it ends when all members have entered it, and
        the host waits for it."""
        if self.size == 1:
            host_wait(self.device)
            return flags
        with self.collective("the fence"):
            tensor = torch.tensor(flags.pack(), dtype=torch.int64, device=self.device)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            agreed = tensor.tolist()
        self.check()
        return Flags.unpack(agreed)

    def gather_ints(self, value: int) -> list[int]:
        """Every member's value, by rank; int64."""
        return [row[0] for row in self.gather_rows([value])]

    def gather_rows(self, values: list[int]) -> list[list[int]]:
        """Every member's values, by rank; int64, equally many on all ranks."""
        return self._gather(values, self.size, None)

    def _gather(self, values: list[int], size: int, group: dist.ProcessGroup | None) -> list[list[int]]:
        with self.collective("gathering"):
            mine = torch.tensor(values, dtype=torch.int64, device=self.device)
            everyone = torch.empty(size * len(values), dtype=torch.int64, device=self.device)
            all_gather_flat(everyone, mine, group=group)
            rows = everyone.view(size, len(values)).tolist()
        self.check()
        return rows

    def gather_in_mesh(self, value: int) -> list[int]:
        """The value of each worker in the mesh, by place; int64."""
        return [row[0] for row in self.gather_rows_in_mesh([value])]

    def gather_rows_in_mesh(self, values: list[int]) -> list[list[int]]:
        """The values of each worker in the mesh, by place; int64, equally many on all of them."""
        return self._gather(values, self.layout.size, self.mesh.everyone)

    def gather_json(self, value: Any) -> list[Any]:
        """Every member's JSON value, by rank."""
        return self._gather_json(value, self.size, None)

    def gather_json_in_mesh(self, value: Any) -> list[Any]:
        """The JSON value of each worker in the mesh, by place."""
        return self._gather_json(value, self.layout.size, self.mesh.everyone)

    def _gather_json(self, value: Any, size: int, group: dist.ProcessGroup | None) -> list[Any]:
        data = json.dumps(value).encode()
        lengths = [row[0] for row in self._gather([len(data)], size, group)]
        with self.collective("gathering values"):
            mine = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            everyone = torch.empty(size * max(lengths), dtype=torch.uint8, device=self.device)
            all_gather_flat(everyone, mine, group=group)
            rows = everyone.view(size, -1).cpu().numpy()
        self.check()
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]

    def send_json(self, value: Any, source: int) -> Any:
        """Send a JSON value from rank `source` to all ranks."""
        with self.collective("sending values"):
            data = json.dumps(value).encode() if self.rank == source else b""
            length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
            dist.broadcast(length, source)
            size = int(length.item())
            self.check()
            buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
            if self.rank == source:
                buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(buffer, source)
            data = buffer.cpu().numpy().tobytes()
        self.check()
        return json.loads(data)


@contextmanager
def _connecting(what: str) -> Iterator[None]:
    """Inside nothing is computed: if it fails, a member or the store did not answer."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise WorldBroken(f"{what} failed: {one_line(error)}") from error
