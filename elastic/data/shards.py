"""Data in many files, on a disk or in object storage, as a map-style dataset: `elastic.Shards`.

An index says where each sample lies. The order is that of `data.windows`: a worker reads whole windows, ahead of the
step that needs them, and no byte is read twice in an epoch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from elastic.data.samples import Told
from elastic.data.shard_formats import FORMATS, Rows, format_of, rows_of
from elastic.data.windows import Key, Piece, Windows
from elastic.errors import ConfigError, one_line
from elastic.job import Plan

READERS = 16  # threads that read for one process


class Shards(Told):
    """The samples of many files, in the order of their names and rows.

    Where `train_data` returns this and the job has no `sampler`, each epoch has all samples once, in random order over
    the shards and over windows of neighbouring samples.

    Args:
        urls: a URL or path of fsspec's, or several; `*` stands for many.
        format: jsonl, tar (WebDataset), parquet or arrow; by default what names end with.
        window: samples of one window: what is shuffled together, and what a worker holds in memory for each microbatch,
            twice. It is part of the order.
        decode: makes the sample of what lies in the file (dictionaries, for tar one of bytes); it may draw at random.
        index: where the index is kept, as a URL or path; by default beside the first shard.

    Raises:
        ConfigError: there are no such files, they have no samples, or the index cannot be written.
    """

    _fs: Any
    _pool: ThreadPoolExecutor | None
    _windows: dict[Key, list[tuple[Piece, Future[Rows]]]]
    _held: list[tuple[int, int, Future[Rows]]]
    _begins: list[int]
    _asked: dict[int, int]  # the position at which each microbatch was asked for last

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        format: str | None = None,
        window: int = 1024,
        decode: Callable[[Any], Any] | None = None,
        index: str | None = None,
    ):
        if not isinstance(window, int) or window < 1:
            raise ConfigError(f"Shards() was given the window {window!r}; give a whole number of samples from 1")
        self.window, self.decode = window, decode
        given = [urls] if isinstance(urls, str) else list(urls)
        self._url = given[0] if given else ""
        self.paths = self._found(given)
        self.format = format or format_of(self.paths)
        if self.format not in FORMATS:
            raise ConfigError(f"Shards() was given the format {format!r}; give one of {', '.join(FORMATS)}")
        self._offsets = self._indexed(index)
        counts = [rows_of(self.format, offsets) for offsets in self._offsets]
        self.starts = np.cumsum([0, *counts]).astype(np.int64)
        if not self.starts[-1]:
            raise ConfigError(f"Shards(): the {len(self.paths)} files of {self._url!r} have no samples")
        self.order = Windows(self.starts, window)
        self._plan: Plan | None = None
        self._forget()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = bisect_right(self._begins, index) - 1
        if at >= 0 and index < self._held[at][1]:
            begin, _, future = self._held[at]
            found = future.result().row(index - begin)
        else:  # nobody said that it would be asked for
            shard = int(np.searchsorted(self.starts, index, side="right")) - 1
            row = index - int(self.starts[shard])
            found = self._read(Piece(shard, row, row + 1)).row(0)
        return found if self.decode is None else self.decode(found)

    # ---- what comes next ---------------------------------------------------------------------------------------------

    def bind(self, plan: Plan) -> None:
        self._plan = plan

    def upcoming(self, first: int, count: int) -> None:
        plan = self._plan
        if plan is None:  # the job has an order of its own
            return
        wanted: set[Key] = set()
        for key, _, _ in self.order.split(np.arange(first, first + count, dtype=np.int64), plan):
            after = self.order.following(key, plan)
            wanted |= {key, after} if after[0] * plan.samples < plan.batches * plan.batch_size else {key}
        self._asked.update((slot, first) for _, slot, _ in wanted)
        gone = {slot for slot, at in self._asked.items() if at <= first - 2 * plan.batch_size}  # to other workers
        for slot in gone:
            del self._asked[slot]
        here = gone | {slot for _, slot, _ in wanted}
        missing = sorted(wanted - self._windows.keys())
        old = [key for key in self._windows if key[1] in here and key not in wanted]
        if not missing and not old:
            return
        for key in old:
            self._windows.pop(key)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
        for key in missing:
            pieces = self.order.at(key, plan).pieces
            self._windows[key] = [(piece, self._pool.submit(self._read, piece)) for piece in pieces]
        held = []
        for pieces_read in self._windows.values():
            for piece, future in pieces_read:
                begin = int(self.starts[piece.shard])
                held.append((begin + piece.begin, begin + piece.end, future))
        self._held = sorted(held, key=lambda one: one[0])
        self._begins = [one[0] for one in self._held]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._forget()

    def _read(self, piece: Piece) -> Rows:
        offsets = self._offsets[piece.shard]
        return FORMATS[self.format].read(self._files(), self.paths[piece.shard], offsets, piece.begin, piece.end)

    def _forget(self) -> None:
        self._fs = self._pool = None
        self._windows, self._held, self._begins, self._asked = {}, [], [], {}

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_fs", "_pool", "_windows", "_held", "_begins", "_asked")
        return {name: value for name, value in vars(self).items() if name not in mine}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        self._forget()

    # ---- files and their index ---------------------------------------------------------------------------------------

    def _files(self) -> Any:
        if self._fs is None:
            self._fs = _file_system(self._url)[0]
        return self._fs

    def _found(self, given: Sequence[str]) -> list[str]:
        found: list[str] = []
        self._fs = None
        for url in given:
            fs, path = _file_system(url)
            some = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
            if not some:
                raise ConfigError(f"Shards(): there is no file {url!r}; give URLs of files, * stands for many")
            found += some
        if not found:
            raise ConfigError("Shards() was given no files")
        return found

    def _indexed(self, where: str | None) -> list[np.ndarray]:
        """The index of every shard: of the kept one where a file is as it was, else made."""
        fs = self._files()
        with ThreadPoolExecutor(READERS) as pool:
            infos = list(pool.map(fs.info, self.paths))
            sizes = [int(info["size"]) for info in infos]
            signs = [[size, _version(info)] for size, info in zip(sizes, infos)]
            names = [path.rpartition("/")[2] for path in self.paths]
            place = where or f"{self.paths[0].rpartition('/')[0]}/{_index_name(self.paths, self.format)}"
            index_fs, index_path = _file_system(where) if where else (fs, place)
            kept = _load(index_fs, index_path)
            now = [kept.get(json.dumps([name, *sign])) for name, sign in zip(names, signs)]
            reader = FORMATS[self.format]
            made = list(
                pool.map(
                    lambda i: now[i] if now[i] is not None else reader.index(fs, self.paths[i], sizes[i]),
                    range(len(now)),
                )
            )
        found = [np.asarray(offsets, dtype=np.int64) for offsets in made]
        if any(offsets is None for offsets in now):
            keys = [json.dumps([name, *sign]) for name, sign in zip(names, signs)]
            _save(index_fs, index_path, dict(zip(keys, found)))
        return found


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"Shards(): {url!r} cannot be opened, {one_line(error)}") from error
    return fs, path


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified") if key in info), ""))


def _index_name(paths: Sequence[str], format: str) -> str:
    names = "\n".join([format, *(path.rpartition("/")[2] for path in paths)])
    return f"elastic-index-{hashlib.blake2b(names.encode(), digest_size=6).hexdigest()}.npz"


def _load(fs: Any, path: str) -> dict[str, np.ndarray]:
    """The kept index: for each file, with its size and version, where its samples lie; empty where there is none."""
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        return {}
    try:
        with np.load(io.BytesIO(data)) as arrays:
            bounds, offsets = arrays["bounds"], arrays["offsets"]
            keys = json.loads(bytes(arrays["keys"]).decode())
        return {key: offsets[bounds[i] : bounds[i + 1]] for i, key in enumerate(keys)}
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"Shards(): {path} is no index that can be read ({one_line(error)}); remove it, or give index="
        ) from error


def _save(fs: Any, path: str, found: dict[str, np.ndarray]) -> None:
    data = io.BytesIO()
    bounds = np.cumsum([0, *map(len, found.values())]).astype(np.int64)
    keys = np.frombuffer(json.dumps(list(found)).encode(), dtype=np.uint8)
    np.savez(data, bounds=bounds, offsets=np.concatenate(list(found.values())), keys=keys)
    try:
        if getattr(fs, "local_file", False) or type(fs).__name__ == "LocalFileSystem":
            temporary = f"{path}.{uuid.uuid4().hex}"
            with open(temporary, "wb") as file:
                file.write(data.getvalue())
            os.replace(temporary, path)
        else:
            fs.pipe_file(path, data.getvalue())
    except OSError as error:
        raise ConfigError(
            f"Shards() cannot keep its index at {path} ({one_line(error)}); give index= another place"
        ) from error
