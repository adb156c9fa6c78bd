"""Checks whether runs can be stored in a place: each operation of a run is tried there and reported under the name of
its permission."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from elastic.checkpoint.uploads import open_upload, sweep_uploads
from elastic.errors import ConfigError, StorageError
from elastic.redact import redact
from elastic.storage import Storage
from elastic.tools.machine import Finding

_DATA = b"elastic"
_PART_BYTES = 5 << 20  # S3's least part


def examine_storage(url: str) -> list[Finding]:
    """Check a folder or URL of runs. Nothing is left behind.

    Operations that need one that failed before are left out.
    """
    where = redact(url)
    try:
        storage = Storage(url, option="--storage")
    except ConfigError as error:
        return [Finding("storage", where, "fail", str(error), "give a folder or a URL that can be opened")]
    folder = f".doctor-{uuid.uuid4().hex[:12]}"
    one, large = f"{folder}/one", f"{folder}/large"
    bucket = storage.root.partition("/")[0] if storage.is_s3 else ""
    objects = f"arn:aws:s3:::{storage.root}/*"
    found: list[Finding] = []

    def attempt(doing: str, permission: str, work: Callable[[], None]) -> bool:
        action = permission if storage.is_s3 else doing
        try:
            work()
        except Exception as error:  # a file system may raise anything, and the error is the result of the check
            reason = redact(" ".join(f"{type(error).__name__}: {error}".split()))
            on = f"arn:aws:s3:::{bucket}" if "List" in permission and "Parts" not in permission else objects
            do = f"let this user {doing} there"
            if storage.is_s3:
                do = f"allow {permission} on {on} (docs/permissions.md)"
            found.append(Finding("storage", where, "fail", f"cannot {doing}: {reason}", do))
            return False
        found.append(Finding("storage", where, "ok", f"{doing} ({action})" if storage.is_s3 else doing))
        return True

    def refuse() -> None:
        try:
            storage.create(one, b"another")
        except FileExistsError:
            return
        raise StorageError("a second create replaced the first: two commits of one checkpoint could both succeed")

    def read() -> None:
        if storage.read(one) != _DATA or storage.read(one, 1, 4) != _DATA[1:4]:
            raise StorageError("other bytes came back")

    def listed() -> None:
        if storage.names(folder) != ["one"]:
            raise StorageError("what was just written is not listed")

    def upload() -> None:
        parts = open_upload(storage, large, 2 * _PART_BYTES, _PART_BYTES)
        try:
            parts.put(0, 0, memoryview(bytes(_PART_BYTES)))
        finally:
            parts.abort()

    try:
        if attempt("create files", "s3:PutObject", lambda: storage.create(one, _DATA)):
            attempt("read files and parts of them", "s3:GetObject", read)
            attempt("refuse to create a file twice", "s3:PutObject and s3:GetObject", refuse)
            attempt("replace files", "s3:PutObject", lambda: storage.replace(one, _DATA))
            attempt("list files", "s3:ListBucket", listed)
            if storage.is_s3:
                attempt("write in parts and give up", "s3:PutObject and s3:AbortMultipartUpload", upload)
                attempt(
                    "list unfinished uploads",
                    "s3:ListBucketMultipartUploads",
                    lambda: _sweep(storage, folder),
                )
    finally:
        if found and found[0].state == "ok":
            attempt("delete files", "s3:DeleteObject", lambda: storage.remove(folder))
    return found


def _sweep(storage: Storage, folder: str) -> None:
    sweep_uploads(storage, folder, keep=lambda name: False)
