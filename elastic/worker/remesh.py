"""Bringing a sharded state into a new world: from the memory of those that hold it, else down the ladder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from elastic import fault
from elastic.checkpoint.tensors import Shard
from elastic.config import CheckpointOptions
from elastic.membership.client import WorkerLink
from elastic.parallel.layout import Held, Move, holders, lost_shards, moves
from elastic.storage import Storage
from elastic.worker import ladder
from elastic.worker.group import Group
from elastic.worker.ladder import Remeshed, tell
from elastic.worker.snapshots import Snapshots
from elastic.worker.state import TrainState

BATCH_BYTES = 64 << 20  # of one rank's traffic at a time


def remesh(
    old: TrainState | None,
    held: Held,
    group: Group,
    make: Callable[[bool], TrainState],
    options: CheckpointOptions,
    storage: Storage,
    link: WorkerLink,
    snapshots: Snapshots,
    lost: str | None,
    let_go: Callable[[str | None], None],
) -> Remeshed:
    """Go down the ladder: state in memory, then what would be the least to do again, or a fresh start.

    Everyone of the world calls this, spares too. Where it breaks off, the old states are as they were.

    Args:
        old: the state this worker has, of which `held` says what part it is.
        make: builds the empty state of this worker in the new mesh; with initial values if told so.
        lost: why this worker has none any more, if an earlier attempt found that and then broke off.
        let_go: called when what all hold is not the whole state, with the reason; its memory is needed.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded.
    """
    began = time.monotonic()
    everyone = [Held(*row) for row in group.gather_rows([held.step, held.shard, held.shards])]
    found = holders(everyone)
    if found is not None:
        step = max(h.step for h in everyone)
        state = _from_memory(old, found, step, group, make)
        if held.step != step and state is not None:
            tell(link, step, began, {"rung": "peer", "source": found[0][0]})
        return Remeshed(step, state, "memory", found[0][0], open=True)
    reason = lost_shards(everyone) if max(h.step for h in everyone) >= 0 else None
    reason = reason or next((r for r in group.gather_json(lost) if r), None)
    let_go(reason)
    del old
    return ladder.descend(group, make, options, storage, link, snapshots, reason)


# ---- from memory ---------------------------------------------------------------------------------------------------


def _from_memory(
    old: TrainState | None, found: list[list[int]], step: int, group: Group, make: Callable[[bool], TrainState]
) -> TrainState | None:
    layout, source = group.layout, found[0][0]
    holding = any(group.rank in ranks for ranks in found)
    mine: dict[str, Shard] = {}
    said = None
    if holding:
        assert old is not None
        mine = {shard.name: shard for shard in old.shards(0, 1)}
        if group.rank == source:
            said = {"values": old.values(), "tensors": old.heads()}
    said = group.send_json(said, source)
    state = make(False) if group.place is not None else None
    fault.point("state.moving", group.rank, step)
    targets = [(rank, place % layout.shards, layout.shards) for place, rank in enumerate(layout.ranks)]
    everywhere = [sorted(rank for ranks in found for rank in ranks)]
    exchange = _Exchange(group)
    for name, dtype, shape, cut in said["tensors"]:
        piece = mine[name].tensor if holding else None
        rows = shape if cut else [1, *shape]
        plan = moves(rows[0], found if cut else everywhere, targets if cut else [(rank, 0, 1) for rank in layout.ranks])
        start = mine[name].offsets[0] if holding and cut else 0
        exchange.add(name, getattr(torch, dtype), rows, plan, piece, start, whole=None if cut else shape)
    tensors = exchange.finish()
    if state is not None:
        state.load(tensors, said["values"], said["tensors"])
    group.gather_ints(step)  # nobody drops the old state before everybody has the new one
    return state


class _Exchange:
    """Moves rows of tensors between ranks, many tensors in one collective."""

    def __init__(self, group: Group):
        self._group = group
        self._waiting: list[tuple[str, torch.dtype, list[int], list[Move], torch.Tensor | None, int, Any]] = []
        self._bytes = 0
        self._done: dict[str, torch.Tensor] = {}

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        shape: list[int],
        plan: list[Move],
        held: torch.Tensor | None,
        start: int,
        whole: list[int] | None,
    ) -> None:
        """A tensor of `shape`, of which this rank holds the rows from `start` on.

        Args:
            whole: its shape if it is not cut, but goes as one row.
        """
        self._waiting.append((name, dtype, shape, plan, held, start, whole))
        rows = sum(m.stop - m.start for m in plan if m.source != m.target)
        self._bytes += rows * _row_bytes(dtype, shape)
        if self._bytes > BATCH_BYTES * self._group.size:
            self._flush()

    def finish(self) -> dict[str, torch.Tensor]:
        """What this rank was to get, by name."""
        self._flush()
        return self._done

    def _flush(self) -> None:
        rank, size, device = self._group.rank, self._group.size, self._group.device
        send: list[list[torch.Tensor]] = [[] for _ in range(size)]
        coming = [0] * size
        places: list[tuple[int, int, torch.Tensor]] = []  # source, bytes, where they go
        for name, dtype, shape, plan, held, start, whole in self._waiting:
            width = _row_bytes(dtype, shape)
            mine = [m for m in plan if m.target == rank]
            if rank in self._group.layout.ranks:
                first = min((m.start for m in mine), default=0)
                count = sum(m.stop - m.start for m in mine)
                target = torch.empty([count, *shape[1:]], dtype=dtype, device=device)
                self._done[name] = target if whole is None else target.view(whole)
            for m in plan:
                if m.source == rank:
                    assert held is not None
                    rows = held if whole is None else held.unsqueeze(0)
                    box = rows[m.start - start : m.stop - start].detach()
                    if m.target == rank:
                        target[m.start - first : m.stop - first] = box.to(device)
                    else:
                        send[m.target].append(_flat(box.to(device)))
                elif m.target == rank:
                    coming[m.source] += (m.stop - m.start) * width
                    places.append((m.source, (m.stop - m.start) * width, target[m.start - first : m.stop - first]))
        moving = self._bytes
        self._waiting, self._bytes = [], 0
        if not moving:
            return  # everyone knows the whole plan, so all return
        going = [sum(t.numel() for t in ts) for ts in send]
        out = torch.cat([t for ts in send for t in ts] or [torch.empty(0, dtype=torch.uint8, device=device)])
        received = torch.empty(sum(coming), dtype=torch.uint8, device=device)
        with self._group.collective("moving state"):
            dist.all_to_all_single(received, out, coming, going)
        at = [sum(coming[:source]) for source in range(size)]
        for source, length, target in places:
            flat = received[at[source] : at[source] + length]
            target.copy_(flat.clone().view(target.dtype).view(target.shape))
            at[source] += length


def _row_bytes(dtype: torch.dtype, shape: list[int]) -> int:
    count = dtype.itemsize
    for n in shape[1:]:
        count *= n
    return count


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
