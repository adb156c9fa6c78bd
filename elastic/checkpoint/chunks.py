"""The chunks of tensors that a reader wants: of a manifest that does not list them, out of the indexes of their packs.

An index is read once for each manifest, and only if something is wanted of its pack.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import xxhash

from elastic.checkpoint.families import Pack, Placement
from elastic.checkpoint.fields import ITEM_BYTES
from elastic.checkpoint.format import Chunk, Manifest, TensorEntry
from elastic.checkpoint.pack_index import PackIndex
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.plan import Wanted
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.placement import Box
from elastic.storage import Storage

IN_FLIGHT = 32


def unreadable(storage: Storage, folder: str, manifest: Manifest) -> dict[str, str]:
    """Read all indexes; returns what is wrong with those that cannot be read, by the names of their packs."""
    problems: dict[str, str] = {}
    for pack in manifest.placement.packs.values() if manifest.placement is not None else ():
        try:
            if pack.index[0] and pack.name not in manifest.indexes:
                manifest.indexes[pack.name] = read_index(storage, folder, pack)
        except DamagedCheckpoint as error:
            problems[pack.name] = str(error)
    return problems


def find_chunks(
    storage: Storage, folder: str, manifest: Manifest, wanted: Iterable[Wanted], *, skip: Collection[str] = ()
) -> Mapping[str, TensorEntry]:
    """The tensors of which something is wanted, with the chunks that have elements of it.

    Args:
        folder: the checkpoint's.
        skip: packs whose chunks are left out.

    Raises:
        DamagedCheckpoint: an index that is missing, or says other things than were written.
    """
    placement = manifest.placement
    if placement is None:
        return manifest.tensors
    pieces: dict[str, dict[tuple[str, Box], None]] = {}
    for want in wanted:
        if want.name in manifest.tensors and want.box.is_in(manifest.tensors[want.name].shape):
            found = ((pack.name, box) for pack, box in placement.pieces(want.name, want.box) if pack.name not in skip)
            pieces.setdefault(want.name, {}).update(dict.fromkeys(found))
    _read(storage, folder, manifest, placement, {pack for found in pieces.values() for pack, _ in found})
    return {
        name: TensorEntry(
            manifest.tensors[name].dtype,
            manifest.tensors[name].shape,
            tuple(_chunk(folder, manifest, placement, name, pack, box) for pack, box in found),
        )
        for name, found in pieces.items()
    }


def all_chunks(
    storage: Storage, folder: str, manifest: Manifest, *, skip: Collection[str] = ()
) -> Mapping[str, TensorEntry]:
    """Return all tensors of a checkpoint with all their chunks, as `find_chunks` does."""
    wanted = [Wanted(name, Box.whole(entry.shape)) for name, entry in manifest.tensors.items()]
    return find_chunks(storage, folder, manifest, wanted, skip=skip)


def _chunk(folder: str, manifest: Manifest, placement: Placement, name: str, pack: str, box: Box) -> Chunk:
    one = placement.packs[pack]
    length = math.prod(box.sizes) * ITEM_BYTES[manifest.tensors[name].dtype]
    try:
        return manifest.indexes[pack].chunk(placement.number_in(one, name), box, length)
    except (CheckpointError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder}/{one.index_name}: {error} (tensor {name!r})") from error


def _read(storage: Storage, folder: str, manifest: Manifest, placement: Placement, packs: set[str]) -> None:
    missing = [placement.packs[name] for name in sorted(packs - manifest.indexes.keys())]
    if not missing:
        return
    with ThreadPoolExecutor(min(len(missing), IN_FLIGHT), "checkpoint-index") as pool:
        for index in pool.map(lambda pack: read_index(storage, folder, pack), missing):
            manifest.indexes[index.pack] = index


def read_index(storage: Storage, folder: str, pack: Pack) -> PackIndex:
    """The index of a pack, which says what the manifest's hash stands for.

    Raises:
        DamagedCheckpoint: it is missing, or has other bytes than were written.
    """
    path, (size, proof) = f"{folder}/{pack.index_name}", pack.index
    for left in (1, 0):
        try:
            data = patiently(storage.read, path, 0, size + 1)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path} is missing") from error
        if len(data) == size and xxhash.xxh3_128_hexdigest(data) == proof:
            break
        if not left:
            raise DamagedCheckpoint(f"{path} has other bytes than were written")
    try:
        index = PackIndex.parse(data, pack.name)
    except (CheckpointError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        what = str(error) if isinstance(error, CheckpointError) else f"it is no index: {error!r}"
        raise DamagedCheckpoint(f"{path}: {what}"[:1000]) from error
    ends = {pack.name: pack.size, **{name: end for name, (_, end) in pack.elsewhere.items()}}
    for name, (_, end) in index.ends_by_pack().items():
        if end > ends.get(name, 0):
            raise DamagedCheckpoint(
                f"{path} has a chunk up to {end} of {name}, of which the manifest knows {ends.get(name)}"
            )
    return index
