"""Moving bytes between memory and storage: parts of an object up, ranges of objects down, again where that helps.

S3 is spoken to part by part, straight from and into the caller's memory. A folder is written and read in place. Other
file systems get their objects in one stream, through fsspec.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from elastic.checkpoint.s3get import DirectReads
from elastic.errors import DamagedCheckpoint, StorageError
from elastic.storage import Storage, make_folder, sync_folder

T = TypeVar("T")
RETRY_S = 120.0  # a server that restarts is back by then
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_SLICE = 1 << 18
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_NO_USE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBADF, errno.EINVAL, errno.EFBIG}
_HOPELESS = ("NoCredentials", "PartialCredentials", "ParamValidation", "InvalidRange", "ExpiredToken", "AccessDenied")


#: Libraries that speak to stores, and those of them whose errors say by their HTTP status whether they pass. S3's do
#: not: some of its 400 and 409 pass.
_LIBRARIES = {"aiohttp", "aiobotocore", "botocore", "requests", "urllib3", "gcsfs", "google", "azure", "adlfs"}
_BY_STATUS = {"aiohttp", "gcsfs", "google", "azure", "adlfs"}
_FORBIDDEN = "Forbidden: "  # how gcsfs raises a 403: as an OSError that has neither a status nor a number
_PASSING_STATUS = {408, 425, 429}
_PASSING_AUTH = ("TransportError", "RefreshError")  # of google.auth: the token server was not reached


def _told_by_library(error: BaseException) -> BaseException:
    """What a library raised, without what its file system put around it."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and cause is not None and is_from_storage(cause) else error


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _status(error: BaseException) -> int | None:
    """The HTTP status that a library's error carries: each has another name for it."""
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def is_from_storage(error: BaseException) -> bool:
    """Whether it is a file system's error, or one of a library that speaks to a store."""
    return isinstance(_told_by_library(error), OSError) or _library(_told_by_library(error)) in _LIBRARIES


@contextlib.contextmanager
def in_one_sentence(storage: Storage, doing: str) -> Iterator[None]:
    """What storage raises inside, after all patience, comes out as one sentence.

    Raises:
        StorageError: expired keys, a store that is away, a disk that fails.
    """
    try:
        yield
    except Exception as error:
        if not is_from_storage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StorageError(f"{storage.url} could not be {doing}: {reason}") from error


def is_no_room(error: BaseException) -> bool:
    """Whether it says that the storage is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Cancelled(Exception):
    """The transfer was called off."""


class ShortRead(Exception):
    """An object ends before the bytes that were asked for."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: 5xx, SlowDown, cut and refused connections, time-outs."""
    error = _told_by_library(error)
    if isinstance(error, _PERMANENT) or any(word in f"{type(error).__name__} {error}" for word in _HOPELESS):
        return False
    if isinstance(error, OSError):
        return error.errno not in _NO_USE and not (error.errno is None and str(error).startswith(_FORBIDDEN))
    library, name, status = _library(error), type(error).__name__, _status(error)
    if library in _BY_STATUS and status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if library == "google":
        return bool(getattr(error, "retryable", False)) or name in _PASSING_AUTH
    if library == "azure":
        return not any(word in name for word in ("Authentication", "Credential", "Resource"))
    return library in _LIBRARIES


def patiently(
    call: Callable[..., T],
    *args: Any,
    retry_s: float = RETRY_S,
    cancelled: threading.Event | None = None,
    on_retry: Callable[[], None] | None = None,
    passes: Callable[[BaseException], bool] = is_transient,
) -> T:
    """Call with `args`, and again after a growing, jittered wait while the error is one that `passes`.

    Raises:
        Cancelled: meanwhile it was called off.
        Exception: whatever the call raised last, if it cannot pass or did not within `retry_s`.
    """
    deadline, wait = time.monotonic() + retry_s, _FIRST_WAIT_S
    while True:
        if cancelled is not None and cancelled.is_set():
            raise Cancelled
        try:
            return call(*args)
        except Exception as error:
            if not passes(error) or time.monotonic() + wait > deadline:
                raise
        if on_retry is not None:
            on_retry()
        pause = wait * random.uniform(0.5, 1.5)
        (cancelled or threading.Event()).wait(pause)
        wait = min(2 * wait, _LONGEST_WAIT_S)


# ---- up ------------------------------------------------------------------------------------------------------------


class Upload(Protocol):
    """An object that is being written; it is there, whole, after `complete`, and not at all before."""

    parallel: bool  # whether parts may come at the same time and in any order

    def put(self, number: int, offset: int, data: memoryview) -> None: ...

    def complete(self) -> None: ...

    def abort(self) -> None: ...


def open_upload(
    storage: Storage, name: str, size: int, part_bytes: int, on_move: Callable[[], None] = lambda: None
) -> Upload:
    """Start writing an object of `size` bytes in parts of `part_bytes`; `on_move` is called as bytes leave."""
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
        except OSError as error:  # where the file system cannot do this, writing finds out
            if is_no_room(error):  # said before the last bytes are taken, which others need
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
        with contextlib.suppress(OSError):  # it may be closed already
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
        except FileNotFoundError:  # no such upload: completed before, and the answer was lost?
            if self._fs.call_s3("head_object", **self._where)["ContentLength"] != self._size:
                raise

    def abort(self) -> None:
        if self._id is not None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.call_s3("abort_multipart_upload", **self._where, UploadId=self._id)


class _Body:
    """Memory as the body of a request, sent slice by slice without a copy; `bytes` would be copied twice over.

    aiohttp takes what is iterable asynchronously; botocore, where it computes checksums, reads.
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
    """How the names of unfinished files begin that are to be the object at `path`."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/.tmp-{name}-"


def discard_partial(storage: Storage, name: str) -> None:
    """Remove what is left of an object whose writer was killed."""
    if storage.local:
        folder, _, start = _partial(storage.path(name)).rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            for found in os.listdir(folder):
                if found.startswith(start):
                    os.unlink(f"{folder}/{found}")
    else:
        sweep_uploads(storage, name.rpartition("/")[0], keep=lambda found: found != name)


def sweep_uploads(storage: Storage, prefix: str, keep: Callable[[str], bool]) -> list[str]:
    """Abort unfinished multipart uploads below `prefix`, but for objects (relative names) that `keep` keeps.

    Returns:
        the names of those aborted. Nothing where the storage has no such uploads.
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


# ---- down ----------------------------------------------------------------------------------------------------------


class RangeReader:
    """Reads ranges of objects into memory. From any thread; close it."""

    def __init__(self, storage: Storage):
        self._storage = storage
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._direct = DirectReads(storage.fs) if storage.is_s3 else None

    def read(self, name: str, start: int, views: Sequence[memoryview]) -> None:
        """Fill `views`, one after the other, with the bytes of `name` from `start`.

        Raises:
            DamagedCheckpoint: there is no such object, or it ends before.
        """
        try:
            patiently(lambda: self._once(name, start, views))
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{name} is missing") from error
        except ShortRead as error:
            raise DamagedCheckpoint(
                f"{name} is too short: it has no byte {start + sum(map(len, views)) - 1}"
            ) from error

    def _once(self, name: str, start: int, views: Sequence[memoryview]) -> None:
        if self._storage.local:
            fd = self._open(name)
            for view in views:
                while view:
                    count = os.preadv(fd, [view], start)
                    if not count:
                        raise ShortRead
                    view, start = view[count:], start + count
            return
        size = sum(map(len, views))
        if self._direct is not None:
            from fsspec.asyn import sync

            if self._direct.read(self._storage.path(name), start, size, views):
                return
            sync(self._storage.fs.loop, _stream_s3, self._storage.fs, self._storage.path(name), start, size, views)
            return
        data = memoryview(self._storage.read(name, start, start + size))
        if len(data) != size:
            raise ShortRead
        for view in views:
            view[:], data = data[: len(view)], data[len(view) :]

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self._storage.path(name), os.O_RDONLY)
            return self._files[name]

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        if self._direct is not None:
            self._direct.close()


async def _stream_s3(fs: Any, path: str, start: int, size: int, views: Sequence[memoryview]) -> None:
    bucket, key, _ = fs.split_path(path)
    try:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{start + size - 1}")
    except OSError as error:
        if "InvalidRange" in str(error) or "416" in str(error) or "not satisfiable" in str(error):
            raise ShortRead from error
        raise
    body = answer["Body"]
    try:
        left, view = list(views), memoryview(b"")
        while data := memoryview(await body.read(_SLICE)):
            while data:
                if not view:
                    if not left:
                        raise OSError(errno.EIO, f"{path} answered with more bytes than were asked for")
                    view = left.pop(0)
                count = min(len(view), len(data))
                view[:count] = data[:count]
                view, data = view[count:], data[count:]
        if view or any(left):
            total = int((answer.get("ContentRange") or "/0").rpartition("/")[2] or 0)
            if total < start + size:
                raise ShortRead
            raise ConnectionResetError(f"{path} was cut off while it was read")
    finally:
        body.close()
