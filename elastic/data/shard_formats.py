"""Formats of shards: where the samples of a file lie, and what rows of it are, on any file system of fsspec's."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from elastic.errors import ConfigError

CHUNK = 8 << 20
PART = 16 << 20  # bytes of one request


class Rows(Protocol):
    """Some consecutive rows of a shard, in memory."""

    def row(self, index: int) -> Any:
        """The sample that is `index` rows after the first."""
        ...


class ShardFormat(Protocol):
    """How to find and read the samples of one file."""

    def index(self, fs: Any, path: str, size: int) -> np.ndarray:
        """int64 [rows + 1]: where each sample begins, in bytes (or in groups of rows, in rows), and the end."""
        ...

    def read(self, fs: Any, path: str, offsets: np.ndarray, begin: int, end: int) -> Rows:
        """Rows `[begin, end)`."""
        ...


class _Bytes:
    def __init__(self, data: bytes, starts: np.ndarray, sample: Any):
        self._data, self._starts, self._sample = data, starts, sample

    def row(self, index: int) -> Any:
        return self._sample(self._data[self._starts[index] : self._starts[index + 1]])


def _read(fs: Any, path: str, begin: int, end: int) -> bytes:
    """
    Raises:
        OSError: the file is shorter than its index says.
    """
    parts = [fs.cat_file(path, start=at, end=min(at + PART, end)) for at in range(begin, end, PART)]
    found = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(found) != end - begin:
        raise OSError(
            f"{path} has {len(found)} bytes from {begin} on where its index has {end - begin}: it has changed"
        )
    return found


class JsonLines:
    """A sample a line: what `json.loads` makes of it."""

    def index(self, fs: Any, path: str, size: int) -> np.ndarray:
        found, at, last = [np.zeros(1, dtype=np.int64)], 0, b"\n"
        while at < size:
            data = fs.cat_file(path, start=at, end=min(at + CHUNK, size))
            found.append(np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 10) + at + 1)
            at, last = at + len(data), data[-1:]
        starts = np.concatenate(found)
        return starts if last == b"\n" else np.append(starts, size)

    def read(self, fs: Any, path: str, offsets: np.ndarray, begin: int, end: int) -> Rows:
        first = int(offsets[begin])
        return _Bytes(_read(fs, path, first, int(offsets[end])), offsets[begin : end + 1] - first, json.loads)


class Tar:
    """WebDataset's: files that follow each other and have one name up to the first dot of the file's name are a sample,
    a dictionary of their bytes by the rest of the name, and `__key__`."""

    def index(self, fs: Any, path: str, size: int) -> np.ndarray:
        found, key, end = [], None, 0
        with fs.open(path, "rb", block_size=CHUNK) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if _key(member.name) != key:
                    key = _key(member.name)
                    found.append(member.offset)
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return np.array([*found, end], dtype=np.int64)

    def read(self, fs: Any, path: str, offsets: np.ndarray, begin: int, end: int) -> Rows:
        first = int(offsets[begin])
        return _Bytes(_read(fs, path, first, int(offsets[end])), offsets[begin : end + 1] - first, _tar_sample)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _tar_sample(data: bytes) -> dict[str, Any]:
    sample: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            sample["__key__"] = _key(member.name)
            inside = tar.extractfile(member)
            assert inside is not None
            sample[member.name.rpartition("/")[2].partition(".")[2]] = inside.read()
    return sample


class _Table:
    def __init__(self, table: Any):
        self._table = table

    def row(self, index: int) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


class Parquet:
    """A sample is a row, as a dictionary. What is read at once is a row group, so that one at the border of two workers
    is read by both."""

    def index(self, fs: Any, path: str, size: int) -> np.ndarray:
        import pyarrow.parquet as pq

        with fs.open(path, "rb") as file:
            found = pq.ParquetFile(file).metadata
            ends = np.cumsum([0, *(found.row_group(i).num_rows for i in range(found.num_row_groups))])
        return ends.astype(np.int64)

    def read(self, fs: Any, path: str, offsets: np.ndarray, begin: int, end: int) -> Rows:
        import pyarrow.parquet as pq

        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, end, side="left"))
        with fs.open(path, "rb", cache_type="none") as file:
            table = pq.ParquetFile(file, pre_buffer=True).read_row_groups(list(range(first, last)), use_threads=False)
        return _Table(table.slice(begin - int(offsets[first]), end - begin))


class Arrow:
    """Arrow's file format (not its stream): a sample is a row, as a dictionary; batches are read as row groups are."""

    def index(self, fs: Any, path: str, size: int) -> np.ndarray:
        with fs.open(path, "rb") as file:
            reader = _arrow(file, path)
            sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        return np.cumsum([0, *sizes]).astype(np.int64)

    def read(self, fs: Any, path: str, offsets: np.ndarray, begin: int, end: int) -> Rows:
        import pyarrow as pa

        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, end, side="left"))
        with fs.open(path, "rb", cache_type="none") as file:
            reader = _arrow(file, path)
            table = pa.Table.from_batches([reader.get_batch(i) for i in range(first, last)])
        return _Table(table.slice(begin - int(offsets[first]), end - begin))


def _arrow(file: Any, path: str) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"Shards(): {path} is not in Arrow's file format ({str(error).splitlines()[0]}); what save_to_disk of "
            "datasets writes is opened by datasets.load_from_disk, which is map-style already"
        ) from error


FORMATS: dict[str, ShardFormat] = {
    "jsonl": JsonLines(),
    "tar": Tar(),
    "parquet": Parquet(),
    "arrow": Arrow(),
}


def rows_of(kind: str, offsets: np.ndarray) -> int:
    """How many samples a shard has, by its index."""
    return int(offsets[-1]) if kind in ("parquet", "arrow") else len(offsets) - 1


def format_of(paths: Sequence[str]) -> str:
    """The format that all names end with.

    Raises:
        ConfigError: names that are of none, or of several.
    """
    ends = {path.rpartition("/")[2].partition(".")[2] for path in paths}
    kinds = {end.rpartition(".")[2] for end in ends}
    packed = kinds & {"gz", "zst", "bz2", "xz", "tgz"}
    if packed:
        raise ConfigError(
            f"Shards(): {paths[0]} and others end with .{sorted(packed)[0]}, and no sample inside can be read alone; "
            "unpack them, or use parquet, which compresses groups of rows"
        )
    if len(kinds) != 1 or not kinds <= FORMATS.keys():
        raise ConfigError(
            f"Shards(): names end with {', '.join(f'.{k}' for k in sorted(kinds))}; give format=, one of "
            f"{', '.join(FORMATS)}"
        )
    return kinds.pop()
