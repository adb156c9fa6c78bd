"""Patience with storage: what is tried again, for how long, and what is not."""

from __future__ import annotations

import errno
import threading
import time
from types import SimpleNamespace

import pytest

from elastic.checkpoint import patience
from elastic.checkpoint.patience import Cancelled, in_one_sentence, is_transient, patiently
from elastic.errors import StorageError
from elastic.storage import Storage


class Clock:
    """Time that passes only in waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.waits = 0.0, list[float]()
        monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(patience, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=self._wait)))

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def failing(times: int, error: Exception):
    calls = []

    def call() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return call, calls


def test_what_passes_is_tried_again_with_growing_pauses(clock):
    retries = []
    call, calls = failing(8, ConnectionResetError("reset"))

    assert patiently(call, on_retry=lambda: retries.append(1)) == "done"

    assert len(calls) == 9
    assert len(retries) == 8
    assert all(
        0.5 * expected <= wait <= 1.5 * expected
        for wait, expected in zip(clock.waits, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], strict=True)
    )
    assert len(set(clock.waits)) == 8, "workers do not come back all at one moment"


def test_patience_has_an_end(clock):
    call, _ = failing(10**9, TimeoutError("still"))

    with pytest.raises(TimeoutError, match="still"):
        patiently(call, retry_s=60)

    assert 50 < clock.now < 60 + 1.5 * 5, "no pause begins that would end later, but for its jitter"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("no"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "fixed"),
        OSError("ExpiredToken: renew it"),
        ValueError("a mistake of ours"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_told_at_once(clock, error):
    call, calls = failing(1, error)

    assert not is_transient(error)
    with pytest.raises(type(error)):
        patiently(call)
    assert (len(calls), clock.waits) == (1, [])


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(), TimeoutError(), OSError(errno.EBUSY, "SlowDown"), OSError(errno.EIO, "503")],
    ids=repr,
)
def test_what_may_pass_is_known(error):
    assert is_transient(error)


def test_who_calls_off_is_heard_in_the_middle_of_a_pause():
    cancelled = threading.Event()
    call, _ = failing(10**9, TimeoutError())
    threading.Timer(0.05, cancelled.set).start()
    began = time.monotonic()

    with pytest.raises(Cancelled):
        patiently(call, cancelled=cancelled, retry_s=60)

    assert time.monotonic() - began < 5


def test_what_storage_raises_comes_out_as_one_sentence(tmp_path):
    storage = Storage(str(tmp_path))

    with pytest.raises(StorageError) as caught, in_one_sentence(storage, "read"):
        raise PermissionError("the keys\nhave expired")
    assert str(caught.value) == f"{tmp_path} could not be read: PermissionError: the keys have expired"
    with pytest.raises(ZeroDivisionError), in_one_sentence(storage, "read"):
        raise ZeroDivisionError


def of_library(module: str, name: str, base: type[Exception] = Exception, **attributes: object) -> Exception:
    """An error of a library that is not installed here: its module, name and attributes are all that is looked at."""
    error = type(name, (base,), {"__module__": module})("as the store said it")
    for attribute, value in attributes.items():
        setattr(error, attribute, value)
    return error


def wrapped(error: Exception) -> Exception:
    """As a file system passes it on."""
    try:
        raise RuntimeError("Failed to write") from error
    except RuntimeError as found:
        return found


AZURE, GCS, GOOGLE = "azure.core.exceptions", "gcsfs.retry", "google.auth.exceptions"


@pytest.mark.parametrize(
    ("passes", "error"),
    [
        (True, of_library(GCS, "HttpError", code=503, message="backend error")),
        (True, of_library(GCS, "HttpError", code="429", message="slow down")),
        (True, of_library(GCS, "HttpError", code=None, message="")),
        (True, of_library(GCS, "ChecksumError")),
        (False, of_library(GCS, "HttpError", code=401, message="Invalid Credentials")),
        (False, of_library(GCS, "HttpError", code=400, message="bad")),
        (False, OSError("Forbidden: https://storage.googleapis.com/b/o\nno storage.objects.create access")),
        (True, OSError("the connection to Forbidden: was cut")),
        (True, of_library(GOOGLE, "TransportError")),
        (True, of_library(GOOGLE, "RefreshError", retryable=False)),
        (False, of_library(GOOGLE, "DefaultCredentialsError", retryable=False)),
        (True, of_library(AZURE, "ServiceRequestError", message="no route")),
        (True, of_library(AZURE, "ServiceResponseError", message="cut off")),
        (True, of_library(AZURE, "HttpResponseError", status_code=500, reason="oops")),
        (True, wrapped(of_library(AZURE, "HttpResponseError", status_code=503, reason="busy"))),
        (False, of_library(AZURE, "HttpResponseError", status_code=403, reason="no")),
        (False, of_library(AZURE, "ClientAuthenticationError", status_code=None)),
        (False, of_library("azure.identity", "CredentialUnavailableError")),
        (False, wrapped(of_library(AZURE, "ResourceNotFoundError", status_code=404))),
        (True, of_library("aiohttp.client_exceptions", "ClientResponseError", status=502)),
        (False, of_library("aiohttp.client_exceptions", "ClientResponseError", status=404)),
        (True, of_library("botocore.exceptions", "ClientError")),
        (True, of_library("aiobotocore.httpsession", "ReadTimeoutError")),
    ],
)
def test_errors_of_other_stores_are_of_storage_and_pass_by_their_status(passes, error):
    assert patience.is_from_storage(error)
    assert is_transient(error) is passes


def test_a_runtime_error_of_our_own_is_none_of_storage():
    assert not patience.is_from_storage(RuntimeError("ours"))
    assert not is_transient(wrapped(ValueError("ours")))
    assert not patience.is_from_storage(wrapped(ValueError("ours")))
