"""Moves boxes of tensors between the ranks of a world, many in one collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from elastic.checkpoint.tensors import DTYPES, from_bytes
from elastic.parallel.device import host_wait
from elastic.parallel.layout import Move, moves
from elastic.placement import Cut, Part, TensorSpec, common, narrowed
from elastic.worker.group import Group

BATCH_BYTES = 64 << 20  # that one rank receives at a time
ALONE_BYTES = 1 << 20  # whole tensors from this size on are sent one by one, directly between their memories
Piece = tuple[TensorSpec, int, int]  # (tensor, index, count): that piece of `count` of each new box of the tensor


def exchange(
    group: Group,
    specs: Sequence[TensorSpec],
    held: Mapping[str, torch.Tensor],
    found: Mapping[Part, Sequence[int]],
    wants: Mapping[int, Part],
    into: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Give each rank its part of a state from the memory of ranks that hold it. All ranks of the world call this.

    Args:
        held: the boxes that this rank holds, by name.
        found: the ranks that hold each part.
        wants: the part that each rank gets; ranks that it does not name get none.
        into: tensors, by name, to receive boxes in; those that do not fit are left alone.

    Returns:
        this rank's boxes, by name, on the device of the group: tensors of `into` and, for the others, new ones.
    """
    plans = {cut: moves(found, wants, cut) for cut in {spec.cut for spec in specs}}
    mine = wants.get(group.rank)
    received: dict[str, torch.Tensor] = {}
    if mine is not None:
        for spec in specs:
            head, place = (spec.box(mine).sizes, DTYPES[spec.dtype], group.device), into.get(spec.name)
            if place is None or (tuple(place.shape), place.dtype, place.device) != head:
                place = torch.empty(head[0], dtype=head[1], device=head[2])
            received[spec.name] = place
    parts, sources = {*found, *wants.values()}, {m.source for plan in plans.values() for m in plan}
    same = parts == {Part()} and len(sources) == 1 and {*sources, *wants} == set(range(group.size))
    giver = min(sources) if same else None
    takers = Counter((m.source, m.target) for plan in plans.values() for m in plan if m.source != m.target)
    takers_of_one = 1 if same else max(Counter(source for source, _ in takers).values(), default=1)
    # a rank that gives to several ranks needs memory for a copy for each of them
    batch_bytes = max(min(ALONE_BYTES, BATCH_BYTES), BATCH_BYTES // takers_of_one)
    plans = {cut: [m for m in plan if group.rank in (m.source, m.target)] for cut, plan in plans.items()}
    batch: list[Piece] = []
    left = batch_bytes
    for spec in specs:
        size = max(spec.box(part).volume for part in wants.values()) * DTYPES[spec.dtype].itemsize
        count = max(1, -(-size // batch_bytes))
        for index in range(count):
            if parts == {Part()} and size // count >= ALONE_BYTES:
                _move(group, plans, [(spec, index, count)], held, received, giver)
                continue
            if batch and left < size // count:
                _move(group, plans, batch, held, received, giver)
                batch, left = [], batch_bytes
            batch.append((spec, index, count))
            left -= size // count
    if batch:
        _move(group, plans, batch, held, received, giver)
    host_wait(group.device)
    group.check()
    return received


def _move(
    group: Group,
    plans: Mapping[Cut, Sequence[Move]],
    batch: Sequence[Piece],
    held: Mapping[str, torch.Tensor],
    taken: Mapping[str, torch.Tensor],
    giver: int | None,
) -> None:
    """Move some pieces.

    Args:
        taken: the boxes that this rank receives.
        plans: the moves from and to this rank.
        giver: the rank that sends the same to all others, None if ranks send different pieces.
    """
    rank, device = group.rank, group.device
    going: list[list[torch.Tensor]] = [[] for _ in range(group.size)]
    coming: list[list[torch.Tensor]] = [[] for _ in range(group.size)]
    for spec, index, count in batch:
        for m in plans[spec.cut]:
            old, new = spec.box(m.old), spec.box(m.new)
            box = common(old, new.piece(index, count))
            if box is None:
                continue
            if m.target == rank:
                place = narrowed(taken[spec.name], box, new)
            if m.source != rank:
                coming[m.source].append(place)
                continue
            given = narrowed(held[spec.name].detach(), box, old).to(device)
            if m.target == rank:
                place.copy_(given)
            else:
                going[m.target].append(given.contiguous().reshape(-1).view(torch.uint8))
    if giver is not None:
        going = going[giver - 1 : giver] if giver else going[1:2]  # all ranks get the same, so one list is enough
    flat, places = [t for one in going for t in one], [t for one in coming for t in one]
    lengths = [sum(t.nbytes for t in one) for one in coming]
    sent = flat[0] if len(flat) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *flat])
    direct = len(places) == 1 and places[0].is_contiguous()
    received = (
        sent if giver == rank else places[0].reshape(-1).view(torch.uint8) if direct else sent.new_empty(sum(lengths))
    )
    with group.collective("moving state"):
        if giver is not None:
            dist.broadcast(received, giver)  # along a tree
        else:
            dist.all_to_all_single(received, sent, lengths, [sum(map(len, one)) for one in going])
    at = 0
    for place in [] if direct else places:
        place.copy_(from_bytes(received[at : at + place.nbytes], place.dtype, tuple(place.shape)))
        at += place.nbytes
