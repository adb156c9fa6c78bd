"""Four ways of saving and loading the same sharded tensors, behind one interface: this project's and torch's."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from elastic.checkpoint.format import Manifest
from elastic.checkpoint.loader import load_together
from elastic.checkpoint.reader import Committed, read_manifest
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import Shard
from elastic.checkpoint.writer import commit
from elastic.storage import Storage

WAIT_S = 600.0
#: Least stall of all on a machine without an accelerator: staged by a thread into shared memory, written by a process.
BEST_STAGING = StagingOptions(
    use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
)
State = dict[str, torch.Tensor]
"""name -> this rank's rows of a tensor that is cut evenly along its first dimension."""


class Engine(Protocol):
    """One way. A save is `save`, then `before_update`, then `wait`; all ranks take part in all of them."""

    def save(self, state: State, step: int) -> None: ...

    def before_update(self) -> None: ...

    def wait(self) -> None: ...

    def load(self, state: State, step: int) -> None: ...

    def close(self) -> None: ...


class Ours:
    """This project's engine."""

    def __init__(self, url: str):
        self._storage = Storage(url)
        self._saver = Saver(self._storage)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()

    def _shards(self, state: State) -> list[Shard]:
        return [
            Shard(
                name,
                t,
                (t.shape[0] * self._world, *t.shape[1:]),
                (t.shape[0] * self._rank, 0),
                stable=True,
                cut=((0, self._rank, self._world),) if self._world > 1 else (),
            )
            for name, t in state.items()
        ]

    def save(self, state: State, step: int) -> None:
        self._saver.start(step, _attempt(step), self._shards(state), rank=self._rank)

    def before_update(self) -> None:
        self._saver.settle()

    def wait(self) -> None:
        saved = self._saver.wait(WAIT_S)
        assert saved.error is None, saved.error
        indexes = _gather(saved.index)
        if self._rank == 0:
            commit(self._storage, saved.attempt, Manifest(saved.step, 0, "", {}, {}), indexes)
        dist.barrier()
        self._saver.committed(saved.step, saved.attempt)

    def load(self, state: State, step: int) -> None:
        checkpoint = Committed(step, _attempt(step))
        manifest = read_manifest(self._storage, checkpoint)
        load_together(self._storage, checkpoint.folder, manifest, self._shards(state), _gather)

    def close(self) -> None:
        self._saver.close()


def _attempt(step: int) -> str:
    return f"1-1-{step:x}"


def _gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class Dcp:
    """`torch.distributed.checkpoint.save` and `load` with fsspec's writer and reader; no sync of local disks."""

    def __init__(self, url: str):
        self._url = url
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def _tensors(self, state: State) -> dict[str, Any]:
        return {name: DTensor.from_local(t, self._mesh, [ShardPlacement(0)]) for name, t in state.items()}

    def _writer(self, step: int) -> FsspecWriter:
        return FsspecWriter(f"{self._url}/step-{step}", sync_files=False)

    def save(self, state: State, step: int) -> None:
        dcp.save(self._tensors(state), storage_writer=self._writer(step))

    def before_update(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def load(self, state: State, step: int) -> None:
        dcp.load(self._tensors(state), storage_reader=FsspecReader(f"{self._url}/step-{step}"))

    def close(self) -> None:
        pass


class DcpAsync(Dcp):
    """`dcp.async_save` in a process of its own, with the staging that stalls least."""

    def __init__(self, url: str):
        super().__init__(url)
        self._stager = DefaultStager(BEST_STAGING)
        self._answer: Any = None

    def save(self, state: State, step: int) -> None:
        self._answer = dcp.async_save(
            self._tensors(state),
            storage_writer=self._writer(step),
            async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )

    def before_update(self) -> None:
        self._answer.staging_completion.result(WAIT_S)

    def wait(self) -> None:
        self._answer.upload_completion.result(WAIT_S)

    def close(self) -> None:
        self._stager.close()


class TorchSave:
    """`torch.save` into memory, then the whole object through fsspec; no other world size can load it."""

    def __init__(self, url: str):
        self._storage = Storage(url)
        self._rank = dist.get_rank()

    def _path(self, step: int) -> str:
        return self._storage.path(f"step-{step}/rank-{self._rank}.pt")

    def save(self, state: State, step: int) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._storage.fs.pipe_file(self._path(step), buffer.getvalue())

    def before_update(self) -> None:
        pass

    def wait(self) -> None:
        dist.barrier()

    def load(self, state: State, step: int) -> None:
        found = torch.load(io.BytesIO(self._storage.fs.cat_file(self._path(step))), weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(found[name])
        dist.barrier()

    def close(self) -> None:
        pass


ENGINES: dict[str, Callable[[str], Engine]] = {
    "here": Ours,
    "dcp.save": Dcp,
    "dcp.async_save": DcpAsync,
    "torch.save": TorchSave,
}
