"""A stand-in for NCCL on CPUs: gloo underneath, the manners of NCCL on top. Who takes it takes the way of GPUs.

What it does as torch's NCCL does:

* An operation returns at once and runs later, in the order of calls, on the group's own thread: a stream. Its output is
  garbage until the host waits for the stream; computing with it waits too, as kernels of a stream do.
* A communicator is made by the first operation of a group. That takes as long as told and ends only when all members
  have come through. If one does not come, nothing frees it, and an abort before it is made has no effect
  (`creation` "blocks"); or an abort frees it ("freeable"); or nothing does, and the abort waits too, for a lock
  ("held", as torch is in non-blocking mode).
* A peer that is gone raises nothing: the stream stands still. Only an abort frees it; then all that was queued
  "succeeds" and leaves garbage.
* An abort takes its time; a second one at the same time ends the process.
* `shutdown` (of `destroy_process_group`) waits for the other members to come there too.
* A watchdog finds the error of a dead peer, and then sleeps with a lock that every new operation takes.
* An aborted stream runs out only a while later. A world that begins before ends the process: what lies in its memory
  would be written over.

Behaviour is told by the environment variable NCCL_MANNERS, a JSON object with the fields of `Manners`. Faults can be
planned (`elastic.fault`) at "nccl.creating", "nccl.operation" (`step` counts those of a group from 1; "raise" is what a
broken network does), "nccl.kernel" (which never ends where that raises), "nccl.aborting" and "nccl.synchronizing";
ranks are those of the group, 0 where there is none.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.futures import Future

from elastic import fault
from elastic.compat.torch import TorchDispatchMode, tree_flatten, tree_map_only
from elastic.compat.torch_groups import GLOO_OPERATIONS, AroundGloo, AroundGroup, PythonWork
from elastic.parallel import gloo
from elastic.worker.sockets import any_connected, knock, open_sockets, opened_since, shut_down

BACKEND = "nccl_manners"
VARIABLE = "NCCL_MANNERS"
POLL_S = 0.002
NO_OUTPUT = ("send", "barrier")
DUMP_MS = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"


@dataclass(frozen=True)
class Manners:
    """How it behaves.

    Args:
        create_s, abort_s: seconds that making a communicator and aborting one take at least.
        creation: whether an abort frees who makes a communicator: "blocks", "freeable" or "held".
        watchdog: seconds that its watchdog sleeps for each second that torch's would.
        late_s: seconds in which an aborted stream still writes.
        limit_s: seconds that the code under test gives an abort.
    """

    create_s: float = 0.01
    abort_s: float = 0.1
    creation: str = "blocks"
    watchdog: float = 0.05
    late_s: float = 0.02
    limit_s: float = 20.0

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


manners = Manners()


class _Pending:
    """The outputs that are not there yet, by where they lie."""

    def __init__(self) -> None:
        self._events: dict[int, threading.Event] = {}
        self.lock = threading.Lock()
        self.of_aborted = 0  # kernels that still run out

    def add(self, tensors: list[torch.Tensor], event: threading.Event) -> None:
        with self.lock:
            self._events.update({t.untyped_storage().data_ptr(): event for t in tensors})

    def drop(self, event: threading.Event, *, of_aborted: bool = False) -> None:
        with self.lock:
            self._events = {k: e for k, e in self._events.items() if e is not event}
            self.of_aborted -= of_aborted

    def wait(self, tensors: Any) -> None:
        """Until these are there. All operations before are then done too: streams keep their order."""
        if not self._events:
            return
        for t in tensors:
            inner = t._local_tensor if isinstance(t, DTensor) else t
            if isinstance(inner, torch.Tensor) and not inner.is_meta:
                with suppress(RuntimeError, NotImplementedError):  # it has no storage
                    event = self._events.get(inner.untyped_storage().data_ptr())
                    if event is not None:
                        event.wait()

    def synchronize(self) -> None:
        """Wait for all that was enqueued, on whatever stream."""
        for event in list(self._events.values()):
            event.wait()
        while self.of_aborted:
            time.sleep(POLL_S)


_pending = _Pending()


class _InOrder(TorchDispatchMode):
    """Whatever computes with an output comes after it, as the kernels of a stream."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _pending._events:
            _pending.wait(tree_flatten((args, kwargs))[0])
        return func(*args, **(kwargs or {}))


class _Work(PythonWork):
    """An operation on its way. As on a GPU, waiting for it lets the stream wait, and not the host."""

    def __init__(self, done: threading.Event, result: Any):
        super().__init__()
        self._done = done
        self._future: Future[Any] = Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def is_completed(self) -> bool:
        return self._done.is_set()

    def get_future(self) -> Future[Any]:
        return self._future

    def result(self) -> Any:
        return self._future.value()

    def source_rank(self) -> int:
        return -1


class _View:
    """What `torch.distributed` asks the backend of a group for."""

    supports_splitting = supports_coalescing = supports_time_estimate = supports_shrinking = False
    supports_tensor_alloc = False

    def __init__(self, group: NcclManners):
        self._group = group

    def get_error(self) -> Any:
        return self._group.error

    def abort(self) -> None:
        self._group.abort()


class _Error:
    def __init__(self, name: str):
        self.name = name


class NcclManners(AroundGroup):
    """One process group."""

    def __init__(self, options: Any, _: Any):
        super().__init__(options.group_rank, options.group_size)
        if _pending.of_aborted:
            os.write(2, b"nccl manners: a world began while the device still worked for the one before\n")
            os._exit(135)
        self._options, self._store, self._size = options, options.store, options.group_size
        self._rank = options.group_rank
        alone = AroundGloo(dist.HashStore(), 0, 1, options.timeout)
        self.inner = alone.inner  # has the name, and is not communicated over
        self._gloo: gloo.FreeableGloo | None = None
        self._sockets: dict[str, int] = {}
        self._before: dict[str, int] | None = None
        self._todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._aborting, self._aborted, self._count = threading.Lock(), False, 0
        self._enqueuing = threading.Lock()
        self._held = threading.Lock()  # while an operation waits for the communicator
        self._watchdogs = threading.Lock()  # of the list of works under way
        self.error: Any = _Error("SUCCESS")
        threading.Thread(target=self._run, name="nccl-stream", daemon=True).start()

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        return _View(self)

    def getBackendName(self) -> str:
        return BACKEND

    # ---- the communicator ------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Everyone comes, it takes a while, everyone comes through."""
        self._meet("comes")
        fault.point("nccl.creating", self._rank, 0)
        time.sleep(manners.create_s)
        self._meet("goes")
        self._before = open_sockets()
        try:
            made = gloo.FreeableGloo(self._options, None)
            self._sockets = opened_since(self._before)
        except RuntimeError:
            self._stand_still()
            raise
        finally:
            self._before = None
        self._gloo = made
        self._check()

    def _meet(self, where: str) -> None:
        keys = [f"{where}/{rank}" for rank in range(self._size)]
        try:
            self._store.set(f"{where}/{self._rank}", "1")
            while not self._store.check(keys):
                self._check()
                time.sleep(POLL_S)
        except dist.DistNetworkError:  # nobody keeps the store any more: NCCL does not look at it
            self._stand_still()

    def _check(self) -> None:
        if manners.creation == "freeable":
            self._refuse_where_aborted()

    def _stand_still(self) -> None:
        while True:
            self._check()
            time.sleep(POLL_S)

    # ---- the stream ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (next_ := self._todo.get()) is not None:
            operation, outputs, work, done = next_
            if not self._aborted:
                try:
                    self._count += 1
                    fault.point("nccl.operation", self._rank, self._count)
                    if not self._hangs():
                        operation().wait()
                    if not self._aborted:
                        for output, value in zip(outputs, work, strict=True):
                            output.copy_(value)
                except (RuntimeError, fault.PlannedError):  # a peer is gone: the kernel spins
                    self.error = _Error("COMM_ERROR")
                    threading.Thread(target=self._watch, name="nccl-watchdog", daemon=True).start()
                    while not self._aborted:
                        time.sleep(POLL_S)
            if self._aborted and outputs:
                with _pending.lock:
                    _pending.of_aborted += 1
                threading.Thread(target=self._run_out, args=(outputs, done), name="nccl-kernel", daemon=True).start()
            else:
                _pending.drop(done)
            done.set()

    def _hangs(self) -> bool:
        """Whether the operation never ends, of which nobody learns."""
        try:
            fault.point("nccl.kernel", self._rank, self._count)
        except fault.PlannedError:
            while not self._aborted:
                time.sleep(POLL_S)
            return True
        return False

    def _run_out(self, outputs: list[torch.Tensor], done: threading.Event) -> None:
        """Who waits for an aborted operation is let go, and its kernel writes for a while yet."""
        time.sleep(manners.late_s)
        for output in outputs:
            _spoil(output)
        _pending.drop(done, of_aborted=True)

    def _watch(self) -> None:
        """torch's watchdog sleeps four times the time for a dump, with the lock of its list."""
        with self._watchdogs:
            time.sleep(manners.watchdog * 4 * int(os.environ.get(DUMP_MS, "15000")) / 1000)

    def _start(self, name: str, *arguments: Any, **options: Any) -> _Work:
        with self._watchdogs:
            self._refuse_where_aborted()
            if self._gloo is None:
                with self._held:
                    self._create()
            tensors = [a for a in tree_flatten((arguments, options))[0] if isinstance(a, torch.Tensor)]
            _pending.wait(tensors)
            outputs = [] if name in NO_OUTPUT or self._gives(name, arguments) else tree_flatten(arguments[0])[0]
            copies: dict[int, torch.Tensor] = {}

            def copy(t: torch.Tensor) -> torch.Tensor:
                return copies.setdefault(id(t), t.detach().clone())

            arguments, options = tree_map_only(torch.Tensor, copy, (arguments, options))
            with torch.no_grad():
                for output in outputs:
                    _spoil(output.detach())
            done = threading.Event()
            run = partial(getattr(self._gloo, name), *arguments, **options)
            places = [o.data for o in outputs]  # with counters of their own: that of the writes has moved by now
            with self._enqueuing:
                self._refuse_where_aborted()
                _pending.add(outputs, done)
                self._todo.put((run, places, [copies[id(o)] for o in outputs], done))
            return _Work(done, outputs)

    def _gives(self, name: str, arguments: Any) -> bool:
        """Whether it is the source of a broadcast, whose own tensor is only read."""
        return name == "broadcast" and len(arguments) > 1 and arguments[1].rootRank == self._rank

    def _refuse_where_aborted(self) -> None:
        if self._aborted:
            raise dist.DistBackendError("NCCL communicator was aborted")

    # ---- the end ---------------------------------------------------------------------------------------------------

    def abort(self) -> None:
        if not self._aborting.acquire(blocking=False):
            os.write(2, b"nccl manners: a communicator was aborted twice at once\n")
            os._exit(134)
        try:
            fault.point("nccl.aborting", self._rank, 0)
            time.sleep(manners.abort_s)
            with self._held if manners.creation == "held" else nullcontext(), self._enqueuing:
                if self._gloo is None and manners.creation == "blocks":
                    return  # torch does not know the communicator yet
                self._aborted = True
            if (before := self._before) is not None and manners.creation == "freeable":
                found = opened_since(before)
                shut_down(found)
                knock(found, self._size)
            self._drop()
        finally:
            self._aborting.release()

    def _drop(self) -> None:
        if self._gloo is not None:
            shut_down(self._sockets)
            gloo.settle([self._gloo], lambda: any_connected(self._sockets))
            self._gloo.free("aborted")
            self._todo.put(None)
            self._gloo.shutdown()

    def shutdown(self) -> None:
        """Waits for what is queued, for the watchdog, and for all members to come here too."""
        if self._aborted:
            with self._watchdogs:
                return
        done = threading.Event()
        self._todo.put((lambda: _Work(done, None), [], [], done))
        done.wait()
        with self._watchdogs:
            self._meet("ends")
            self._aborted = True
            self._drop()


def _spoil(tensor: torch.Tensor) -> None:
    """What lay in the memory: numbers that mean nothing."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.fill_(True)
    elif tensor.numel():
        numbers = torch.arange(1, tensor.numel() + 1, dtype=torch.int64, device=tensor.device)
        tensor.copy_((numbers * 0x5851F42D4C957F2D).view(tensor.shape))


def _forward(name: str) -> Any:
    def start(self: NcclManners, *arguments: Any, **options: Any) -> _Work:
        return self._start(name, *arguments, **options)

    start.__name__ = start.__qualname__ = name
    return start


for _name in GLOO_OPERATIONS:
    setattr(NcclManners, _name, _forward(_name))

dist.Backend.register_backend(BACKEND, NcclManners, extended_api=True, devices=["cpu"])


def install() -> None:
    """Have this process take the way of GPUs, and this in place of NCCL. It is made of a worker that was forked."""
    import elastic.worker.group as group
    import elastic.worker.nccl_backend as nccl_backend

    global manners
    manners = Manners(**json.loads(os.environ[VARIABLE]))

    class OverManners(nccl_backend.NcclBackend):
        name = BACKEND

    group.BACKENDS["cpu"] = OverManners
    nccl_backend.ABORT_S = manners.limit_s
    torch.cpu.synchronize = _synchronize_device
    torch.cpu.Stream.synchronize = lambda self: _pending.synchronize()  # type: ignore[attr-defined]
    for name in ("tolist", "cpu", "numpy"):  # reads of the host, which dispatch nothing here
        setattr(torch.Tensor, name, _waiting(getattr(torch.Tensor, name)))
    _InOrder().__enter__()


def _synchronize_device(device: Any = None) -> None:
    fault.point("nccl.synchronizing", 0, 0)
    _pending.synchronize()


def _waiting(read: Any) -> Any:
    def wait_and_read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        _pending.wait([self])
        return read(self, *arguments, **options)

    return wait_and_read
