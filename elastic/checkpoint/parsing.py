"""Reading manifests: nothing in one is believed before it was checked."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from elastic.checkpoint.families import Family, Pack, Placement, Stretch
from elastic.checkpoint.fields import ITEM_BYTES, head_of, integer, ints, items, members, number, text
from elastic.checkpoint.format import (
    ELSEWHERE,
    MAX_MANIFEST_BYTES,
    OWN_PACK,
    READABLE,
    SEAL,
    XXH3,
    Chunk,
    Manifest,
    TensorEntry,
    block_count,
    is_sealed,
)
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.placement import Box, tiles

_READS = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"


class _NewerFormat(CheckpointError):
    pass


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read and validate a manifest. Time and memory are bounded by a constant times its size.

    Raises:
        DamagedCheckpoint: anything in it that cannot be true.
        CheckpointError: a newer format.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise DamagedCheckpoint(f"{where} has more than {MAX_MANIFEST_BYTES} bytes, more than a manifest can have")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is not JSON: {error}") from error
    if SEAL.match(data) and not is_sealed(data):
        raise DamagedCheckpoint(f"{where} has other bytes than were written")
    try:
        manifest = _manifest(raw, where)
    except _NewerFormat:
        raise
    except CheckpointError as error:
        raise DamagedCheckpoint(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} does not say what a manifest says: {error!r}"[:1000]) from error
    if manifest.format > 1 and not is_sealed(data):
        raise DamagedCheckpoint(f"{where} has other bytes than were written")
    return manifest


def _manifest(raw: Any, where: str) -> Manifest:
    if not isinstance(raw, dict):
        raise CheckpointError("it is not a JSON object")
    version = raw.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"it has format {str(version)[:100]}")
    if version not in READABLE:
        raise _NewerFormat(f"{where} has format {version}, this version reads {_READS}; install a newer elastic-train")
    step = integer(raw["step"])
    if step < 0:
        raise CheckpointError(f"it has step {step}")
    placement = None
    if version > 3:
        placement = _placement(raw)
        heads = sorted((name, head) for family in placement.families for name, head in family.tensors.items())
        tensors = {name: TensorEntry(*head) for name, head in heads}
    else:
        tensors = {name: _tensor(name, entry, version) for name, entry in raw["tensors"].items()}
        _check_apart(tensors)
    metrics = {text(k): float(number(v)) for k, v in raw.get("metrics", {}).items()}
    for part in ("world", "values"):
        if not isinstance(raw[part], dict):
            raise CheckpointError(f"its {part} is a {type(raw[part]).__name__}, not an object")
    return Manifest(
        step,
        integer(raw["seed"]),
        text(raw["config_digest"]),
        raw["world"],
        raw["values"],
        tensors,
        metrics,
        text(raw.get("nonce", "")),
        version,
        placement,
    )


def _placement(raw: dict[str, Any]) -> Placement:
    families = tuple(map(Family.of, items(raw["families"])))
    found = Placement(families, {name: _pack(name, said) for name, said in members(raw["packs"]).items()})
    found.check()
    return found


def _pack(name: str, raw: Any) -> Pack:
    size, index_size, index_hash, stretches, elsewhere = items(raw)
    if not OWN_PACK.match(name):
        raise CheckpointError(f"it names the pack {name[:200]!r}")
    refers = {path: ints(found) for path, found in members(elsewhere).items()}
    if not all(ELSEWHERE.match(path) and 0 <= used <= end < 1 << 63 for path, (used, end) in refers.items()):
        raise CheckpointError(f"{name} refers to {str(refers)[:200]}")
    if not 0 <= integer(size) < 1 << 63 or integer(index_size) < 0 or not XXH3.match(text(index_hash)):
        raise CheckpointError(f"{name} has {size} bytes, and an index of {index_size}")
    has = tuple(map(Stretch.of, items(stretches)))
    if len({stretch.family for stretch in has}) < len(has):
        raise CheckpointError(f"{name} has two stretches of one family")
    return Pack(name, size, (index_size, index_hash), has, {path: (used, end) for path, (used, end) in refers.items()})


# ---- until format 3 --------------------------------------------------------------------------------------------------


def _tensor(name: str, raw: Any, version: int) -> TensorEntry:
    dtype, shape = head_of(name, raw["dtype"], raw["shape"])
    item = ITEM_BYTES[dtype]
    chunks = tuple(_chunk(name, c, shape, item, version) for c in raw["chunks"])
    if not tiles([c.box for c in chunks], shape):
        raise CheckpointError(f"tensor {name!r} is not tiled by its chunks")
    return TensorEntry(dtype, shape, chunks)


def _check_apart(tensors: dict[str, TensorEntry]) -> None:
    """No two chunks lie in the same bytes: tensors are no larger than the objects that hold them."""
    places = sorted(
        (chunk.pack, chunk.start, chunk.end, name)
        for name, entry in tensors.items()
        for chunk in entry.chunks
        if chunk.end > chunk.start
    )
    for (pack, _, end, one), (other_pack, start, _, other) in itertools.pairwise(places):
        if pack == other_pack and start < end:
            raise CheckpointError(f"tensors {one!r} and {other!r} lie in the same bytes of {pack}")


def _chunk(name: str, raw: Any, shape: tuple[int, ...], item: int, version: int) -> Chunk:
    offsets, sizes = ints(raw["offsets"]), ints(raw["sizes"])
    pack, start, end = text(raw["pack"]), integer(raw["start"]), integer(raw["end"])
    hashes = tuple(map(text, items(raw["hashes"])))
    crcs = ints(raw["crcs"]) if version > 1 else ()
    if not (OWN_PACK.match(pack) or (version > 1 and ELSEWHERE.match(pack))):
        raise CheckpointError(f"tensor {name!r} names the pack {pack[:200]!r}")
    if not Box(offsets, sizes).is_in(shape):
        raise CheckpointError(f"tensor {name!r} has a chunk outside its shape {shape}")
    length = end - start
    if start < 0 or end >= 1 << 63 or length != math.prod(sizes) * item:
        raise CheckpointError(f"tensor {name!r} has a chunk of {length} bytes that should have another length")
    blocks = block_count(length)
    if len(hashes) != blocks or not all(map(XXH3.match, hashes)):
        raise CheckpointError(f"tensor {name!r} has a chunk with {len(hashes)} block hashes, or with invalid ones")
    if version > 1 and (len(crcs) != blocks or not all(0 <= c < 1 << 32 for c in crcs)):
        raise CheckpointError(f"tensor {name!r} has a chunk with {len(crcs)} block checksums, or with invalid ones")
    return Chunk(offsets, sizes, pack, start, end, hashes, crcs)
