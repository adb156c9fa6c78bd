"""Errors of storage: which of them are transient, how long to retry, and how an error becomes one sentence."""

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
RETRY_S = 120.0  # long enough for a server to restart
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_NO_USE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBADF, errno.EINVAL, errno.EFBIG}
_HOPELESS = ("NoCredentials", "PartialCredentials", "ParamValidation", "InvalidRange", "ExpiredToken", "AccessDenied")

#: Libraries that access object stores, and those of them whose HTTP status shows whether an error is transient. That of
#: S3's libraries does not: some 400 and 409 of S3 are transient.
_LIBRARIES = {"aiohttp", "aiobotocore", "botocore", "requests", "urllib3", "gcsfs", "google", "azure", "adlfs"}
_BY_STATUS = {"aiohttp", "gcsfs", "google", "azure", "adlfs"}
_FORBIDDEN = "Forbidden: "  # how gcsfs raises a 403: as an OSError that has neither a status nor a number
_PASSING_STATUS = {408, 425, 429}
_PASSING_AUTH = ("TransportError", "RefreshError")  # raised by google.auth if it does not reach the token server


def _unwrapped(error: BaseException) -> BaseException:
    """Return the error that a library raised, without the RuntimeError in which its file system wraps it."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and cause is not None and is_from_storage(cause) else error


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of a library's error, whose name differs between libraries."""
    for name in ("status_code", "status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def is_from_storage(error: BaseException) -> bool:
    """Whether the error comes from a file system or from a library that accesses an object store."""
    return isinstance(_unwrapped(error), OSError) or _library(_unwrapped(error)) in _LIBRARIES


@contextlib.contextmanager
def in_one_sentence(storage: Storage, doing: str) -> Iterator[None]:
    """Turn an error that storage raises inside, after all retries, into one sentence.

    Args:
        doing: the participle for the sentence, such as "read".

    Raises:
        StorageError: for example: the keys have expired, the store does not answer, or the disk fails.
    """
    try:
        yield
    except Exception as error:
        if not is_from_storage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StorageError(f"{storage.url} could not be {doing}: {reason}") from error


def is_no_room(error: BaseException) -> bool:
    """Whether the error means that the storage is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Cancelled(Exception):
    """The transfer was called off."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: after a 5xx status, SlowDown, a broken or refused
    connection, or a time-out."""
    error = _unwrapped(error)
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
    """Call with `args`, and retry with exponential backoff and jitter while `passes` holds for the error.

    Args:
        retry_s: the seconds after which no further attempt begins.
        cancelled: ends the retries when it is set.
        on_retry: called before each wait.

    Raises:
        Cancelled: `cancelled` was set.
        Exception: the last error, if it cannot pass or did not pass within `retry_s`.
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
