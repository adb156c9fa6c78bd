"""Uploading objects in parts, and removing the unfinished objects of writers that died.

Parts of S3 objects are sent straight from the caller's memory. A file is written under a temporary name until it is
whole. Objects of other file systems are written as one stream, through fsspec.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from elastic.checkpoint.patience import is_no_room, patiently
from elastic.storage import Storage, make_folder, sync_folder

_SLICE = 1 << 18


class Upload(Protocol):
    """An object that is being written. It exists after `complete`, and then it is whole."""

    parallel: bool  # whether `put` may be called for several parts at the same time and in any order

    def put(self, number: int, offset: int, data: memoryview) -> None: ...

    def complete(self) -> None: ...

    def abort(self) -> None: ...


def open_upload(
    storage: Storage, name: str, size: int, part_bytes: int, on_move: Callable[[], None] = lambda: None
) -> Upload:
    """Start writing an object of `size` bytes in parts of `part_bytes`; `on_move` is called whenever bytes are sent."""
    if storage.local:
        return _FileUpload(storage.path(name), size)
    if storage.is_s3:
        return _S3Upload(storage.fs, storage.path(name), size, part_bytes, on_move)
    return _StreamUpload(storage.fs, storage.path(name))


class _FileUpload:
    parallel = True

    def __init__(self, path: str, size: int):
        self._path = path
        self._temporary = f"{_partial(path)}{uuid.uuid4().hex}"
        make_folder(os.path.dirname(path))
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        if size:
            self._reserve(size)

    def _reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:  # a file system may lack this call; then writing finds out whether it is full
            if is_no_room(error):  # raised before this file takes the last bytes, which others need
                self.abort()
                raise

    def put(self, number: int, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def complete(self) -> None:
        os.fsync(self._fd)
        os.close(self._fd)
        os.rename(self._temporary, self._path)
        sync_folder(os.path.dirname(self._path))

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # the file may be closed already
            os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)


class _S3Upload:
    parallel = True

    def __init__(self, fs: Any, path: str, size: int, part_bytes: int, on_move: Callable[[], None]):
        self._fs, self._size, self._on_move = fs, size, on_move
        bucket, key, _ = fs.split_path(path)
        self._where = {"Bucket": bucket, "Key": key}
        self._etags: dict[int, str] = {}
        self._id: str | None = None
        if size > part_bytes:
            self._id = patiently(lambda: fs.call_s3("create_multipart_upload", **self._where))["UploadId"]

    def put(self, number: int, offset: int, data: memoryview) -> None:
        if self._id is None:
            self._fs.call_s3("put_object", **self._where, Body=_Body(data, self._on_move))
            return
        part = {"UploadId": self._id, "PartNumber": number + 1, "Body": _Body(data, self._on_move)}
        self._etags[number] = self._fs.call_s3("upload_part", **self._where, **part)["ETag"]

    def complete(self) -> None:
        if self._id is None:
            return
        parts = [{"PartNumber": n + 1, "ETag": etag} for n, etag in sorted(self._etags.items())]
        try:
            self._fs.call_s3(
                "complete_multipart_upload", **self._where, UploadId=self._id, MultipartUpload={"Parts": parts}
            )
        except FileNotFoundError:  # no such upload: it may have been completed and only the answer been lost
            if self._fs.call_s3("head_object", **self._where)["ContentLength"] != self._size:
                raise

    def abort(self) -> None:
        if self._id is not None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.call_s3("abort_multipart_upload", **self._where, UploadId=self._id)


class _Body:
    """Memory as the body of a request, sent in slices without a copy; a `bytes` object would be copied twice.

    aiohttp iterates over it asynchronously; botocore reads it to compute checksums.
    """

    def __init__(self, data: memoryview, on_move: Callable[[], None]):
        self._data, self._at, self._on_move = data, 0, on_move

    def __len__(self) -> int:
        return len(self._data)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for i in range(0, len(self._data), _SLICE):
            self._on_move()
            yield self._data[i : i + _SLICE]

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else min(len(self._data), self._at + size)
        found, self._at = bytes(self._data[self._at : end]), end
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


class _StreamUpload:
    parallel = False

    def __init__(self, fs: Any, path: str):
        self._file = fs.open(path, "wb", block_size=32 << 20)

    def put(self, number: int, offset: int, data: memoryview) -> None:
        self._file.write(data)

    def complete(self) -> None:
        self._file.close()

    def abort(self) -> None:
        discard = getattr(self._file, "discard", None)
        if discard is not None:
            discard()


def _partial(path: str) -> str:
    """Return the prefix of the temporary names under which the object at `path` is written."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.tmp-{name}-"


def discard_partial(storage: Storage, name: str) -> None:
    """Remove the unfinished uploads of an object whose writer was killed."""
    if storage.local:
        folder, _, start = _partial(storage.path(name)).rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            for found in os.listdir(folder):
                if found.startswith(start):
                    os.unlink(f"{folder}/{found}")
    else:
        sweep_uploads(storage, name.rpartition("/")[0], keep=lambda found: found != name)


def sweep_uploads(storage: Storage, prefix: str, keep: Callable[[str], bool]) -> list[str]:
    """Abort unfinished multipart uploads below `prefix`, except those of objects for whose relative name `keep` is
    true.

    Returns:
        the names of the objects whose uploads were aborted; empty for storage other than S3.
    """
    if not storage.is_s3:
        return []
    bucket, base, _ = storage.fs.split_path(storage.root)
    start = f"{base}/" if base else ""
    gone, marker = [], dict[str, str]()
    while True:
        page = storage.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{start}{prefix}/", **marker)
        for upload in page.get("Uploads", []):
            name = upload["Key"].removeprefix(start)
            if not keep(name):
                with contextlib.suppress(FileNotFoundError):
                    storage.fs.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                gone.append(name)
        if not page.get("IsTruncated"):
            return gone
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
