"""Errors of storage: which of them pass, how long to wait for that, and how one is told in a sentence."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from elastic.errors import StorageError
from elastic.storage import Storage

T = TypeVar("T")
RETRY_S = 120.0  # a server that restarts is back by then
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
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
