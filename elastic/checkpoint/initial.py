"""Initial weights from safetensors: a file, a folder of files, or the URL of either. Read in ranges, like checkpoints.

The format (huggingface/safetensors): 8 bytes of length, a JSON header of names, dtypes, shapes and places, the bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elastic.checkpoint import format
from elastic.checkpoint.downloads import RangeReader
from elastic.checkpoint.fields import ITEM_BYTES, MAX_DIMS
from elastic.checkpoint.format import Chunk, TensorEntry, block_count
from elastic.checkpoint.patience import patiently
from elastic.errors import CheckpointError, ConfigError
from elastic.job_code import job_code
from elastic.storage import Storage

if TYPE_CHECKING:
    from elastic.checkpoint.tensors import Shard
    from elastic.job import Job

SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000
OPTION = "--checkpoint.init-from"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class Source:
    """Files of safetensors that were found, and what is in them: name -> the file, and its entry."""

    url: str
    storage: Storage
    files: tuple[str, ...]
    entries: Mapping[str, tuple[str, TensorEntry]] = field(repr=False)
    option: str = OPTION


@dataclass(frozen=True)
class Initialised:
    """Where a model's weights came from: the sha256 of each file, the names that it lacks, and those that the model
    lacks."""

    url: str
    sha256: dict[str, str]
    missing: list[str]
    unexpected: list[str]

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def initial_source(job: Job, init_from: str | None) -> Source | None:
    """The files that a fresh run of a job starts from: those of the option, else the job's own, else None.

    Raises:
        ConfigError: they cannot be read.
    """
    if init_from is not None:
        return open_initial(init_from)
    with job_code("initial_weights()"):
        own = job.initial_weights()
    return None if own is None else open_initial(own, option="initial_weights()")


def open_initial(url: str, *, option: str = OPTION) -> Source:
    """Find the files at `url` and read their headers.

    Args:
        option: where the URL came from, for messages.

    Raises:
        ConfigError: there are none, or they are no safetensors; one sentence.
    """
    try:
        if url.endswith(SUFFIX):
            parent, _, name = url.rpartition("/")
            storage = Storage(parent or ("/" if url.startswith("/") else "."), option=option, read_only=True)
            files = [name]
        else:
            storage = Storage(url, option=option, read_only=True)
            files = [n for n in patiently(storage.names, retry_s=10) if n.endswith(SUFFIX)]
        if not files:
            raise CheckpointError(f"it has no file *{SUFFIX}")
        entries: dict[str, tuple[str, TensorEntry]] = {}
        for file in files:
            for name, entry in _header(storage, file).items():
                if name in entries:
                    raise CheckpointError(f"{entries[name][0]} and {file} both have the tensor {name!r}")
                entries[name] = (file, entry)
    except ConfigError:
        raise
    except Exception as error:  # whatever a file system raises: the user sees one sentence
        reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{option} is {url!r}, which cannot be read: {' '.join(reason.split())}; give a safetensors file, a folder "
            "of them, or the URL of either"
        ) from error
    return Source(url, storage, tuple(files), entries, option)


def _header(storage: Storage, file: str) -> dict[str, TensorEntry]:
    total = patiently(storage.size, file, retry_s=10)
    length = int.from_bytes(patiently(storage.read, file, 0, 8, retry_s=10), "little")
    if total < 8 or length > min(MAX_HEADER_BYTES, total - 8):
        raise CheckpointError(f"{file} is no safetensors file: its header cannot have {length} bytes")
    try:
        raw = json.loads(patiently(storage.read, file, 8, 8 + length, retry_s=10))
        base, found = 8 + length, {}
        for name, tensor in raw.items():
            if name != "__metadata__":
                found[name] = _entry(file, name, tensor, base, total)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no safetensors file: its header does not say what one says") from error
    return found


def _entry(file: str, name: str, raw: dict[str, Any], base: int, total: int) -> TensorEntry:
    dtype, shape, (begin, end) = _DTYPES.get(raw["dtype"]), tuple(raw["shape"]), raw["data_offsets"]
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name!r} has the dtype {raw['dtype']}, which is not known here")
    numbers = (*shape, begin, end)
    if len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError(f"{file}: tensor {name!r} has the shape {str(shape)[:200]}")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype] or base + end > total:
        raise CheckpointError(f"{file}: tensor {name!r} does not lie inside the file")
    blocks = block_count(end - begin)
    chunk = Chunk((0,) * len(shape), shape, file, base + begin, base + end, ("",) * blocks)
    return TensorEntry(dtype, shape, (chunk,))


def load_initial(
    source: Source,
    shards: Sequence[Shard],
    *,
    partial: bool,
    aliases: Mapping[str, Iterable[str]] | None = None,
    named: Callable[[str], str | None] = lambda name: name,
) -> Initialised:
    """Fill a model's tensors, converting dtypes.

    Returns:
        where they came from, with the hashes of the files, which are read whole for these.

    Raises:
        CheckpointError: as `fill_initial`.
    """
    found, missing = fill_initial(source, shards, partial=partial, aliases=aliases, named=named)
    wanted = {t for s in shards for n in (s.name, *(aliases or {}).get(s.name, ())) if (t := named(n))}
    unexpected = sorted(source.entries.keys() - wanted - set(found.values()))
    return Initialised(source.url, hashes(source), missing, unexpected)


def fill_initial(
    source: Source,
    shards: Sequence[Shard],
    *,
    partial: bool = False,
    aliases: Mapping[str, Iterable[str]] | None = None,
    named: Callable[[str], str | None] = lambda name: name,
) -> tuple[dict[str, str], list[str]]:
    """Fill a model's tensors, converting dtypes.

    Returns:
        by the name of each tensor that was filled its name in the files; and the names of those that the files lack.

    Args:
        partial: leave tensors as they are that the files lack.
        aliases: further names of tied tensors, by the name of the shard.
        named: the name in the files of a tensor of the model, or None to leave it as it is.

    Raises:
        CheckpointError: a tensor that the files lack, unless `partial`; none in common; another shape.
    """
    from elastic.checkpoint.loader import fill  # imports torch, which a driver does without

    found: dict[str, str] = {}
    wanted = {s.name: [t for n in (s.name, *(aliases or {}).get(s.name, ())) if (t := named(n))] for s in shards}
    for name, names in wanted.items():
        known = next((n for n in names if n in source.entries), None)
        if known is not None:
            found[name] = known
    missing = sorted({name for name, names in wanted.items() if names} - found.keys())
    if not found or (missing and not partial):
        raise CheckpointError(
            f"{source.option} is {source.url!r}, which lacks {len(missing)} of the model's tensors, such as "
            f"{missing[:3]} (it has {sorted(source.entries)[:3]}); {_instead(source, bool(found))}"
        )
    entries = {name: source.entries[known][1] for name, known in found.items()}
    fill(source.storage, entries, [s for s in shards if s.name in found])
    return found, missing


def _instead(source: Source, some: bool) -> str:
    if not some:
        return "give other weights"
    if source.option == OPTION:
        return "give --checkpoint.init-partial to leave those as the job made them"
    return "let the job's weight_name() return the name that each has there, or None to leave it as model() makes it"


def hashes(source: Source) -> dict[str, str]:
    """sha256 of each file, whole."""
    from elastic.checkpoint.loader import IN_FLIGHT

    reader, size = RangeReader(source.storage), format.BLOCK_BYTES
    found = {}
    try:
        with ThreadPoolExecutor(IN_FLIGHT // 2, "initial-hash") as pool:
            for file in source.files:
                total, digest = patiently(source.storage.size, file), hashlib.sha256()

                def get(start: int, file: str = file, total: int = total) -> bytearray:
                    data = bytearray(min(size, total - start))
                    reader.read(file, start, [memoryview(data)])
                    return data

                starts = range(0, total, size)
                ahead = [pool.submit(get, start) for start in starts[: IN_FLIGHT // 2]]
                for start in starts[IN_FLIGHT // 2 :]:
                    digest.update(ahead.pop(0).result())
                    ahead.append(pool.submit(get, start))
                for part in ahead:
                    digest.update(part.result())
                found[file] = digest.hexdigest()
    finally:
        reader.close()
    return found
