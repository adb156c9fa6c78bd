"""Files of a run on any fsspec URL, with the one primitive that commits need: create-if-absent.

Local disk: `os.link` of a synced temporary file (EEXIST = refused); rename would overwrite, and fsspec's own local
create is exists() + open, which races. Object stores: `pipe_file(mode="create")`, which sends If-None-Match.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

from elastic.errors import ConfigError, StorageError

_ATOMIC_CREATE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
_PACKAGE = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # what file systems without hard links answer
_CONFLICT_WAITS_S = (0.1, 0.3, 1.0)  # pauses while another create of the same name is going on (409)
_PERMIT = "give a place that you may write to"
_ATOMIC = "give a local disk, NFS, or a store with conditional writes (If-None-Match)"


class Storage:
    """One folder at a URL. All paths given to its methods are relative and use `/`.

    Args:
        option: the option that gave the URL, for errors.
        read_only: nothing will be written, so a file system without atomic create is fine.

    Raises:
        ConfigError: the scheme is unknown, a package is missing, or the file system has no atomic create.
    """

    def __init__(self, url: str, *, option: str = "--run.storage", read_only: bool = False):
        self._option = option
        meant = _unmeant(url)
        if meant:
            raise ConfigError(f"{option} is {url!r}, {meant}")
        scheme, separator, rest = url.partition("://")
        self.local = not separator or scheme in ("file", "local")
        self.is_s3 = bool(separator) and scheme in ("s3", "s3a")
        self.in_process = bool(separator) and scheme == "memory"
        if self.local:
            self.root = str(Path(rest if separator else url).expanduser().absolute())
            self.url = self.root
            return
        if scheme not in _ATOMIC_CREATE and not read_only:
            raise ConfigError(
                f"{option} is {url!r}, whose scheme {scheme!r} is not known to create files atomically; use a "
                f"folder, file://, or one of {', '.join(sorted(s + '://' for s in _ATOMIC_CREATE))}"
            )
        import fsspec

        try:
            self.fs, self.root = fsspec.url_to_fs(url, **_options(scheme))
        except (
            ValueError,
            ImportError,
        ) as error:  # ValueError: fsspec knows no such scheme, before that package is there
            if scheme not in _PACKAGE and isinstance(error, ValueError):
                raise ConfigError(f"{option} is {url!r}, whose scheme {scheme!r} is not known") from error
            package = _PACKAGE.get(scheme, scheme)
            raise ConfigError(f"{option} is {url!r}, which needs `pip install {package}` ({error})") from error
        self.root = self.root.rstrip("/")
        self.url = url.rstrip("/")

    @property
    def can_append(self) -> bool:
        """Whether `append` works; object stores cannot."""
        return self.local

    def child(self, name: str) -> Storage:
        """The storage of a folder inside this one."""
        return Storage(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def create(self, name: str, data: bytes) -> None:
        """Create `name` with `data`; it is durable when this returns.

        On object storage two creates of the same bytes may both succeed: the answer to a request can be lost, and its
        repetition is refused, so an existing object with our bytes counts as ours.

        Raises:
            FileExistsError: `name` existed before; it is unchanged.
            StorageError: the file system has no atomic create.
        """
        path = self.path(name)
        if not self.local:
            self._create_object(path, data)
            return
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StorageError("this file system has no hard links, which make a create atomic") from error
        finally:
            os.unlink(temporary)
        sync_folder(os.path.dirname(path))

    def _create_object(self, path: str, data: bytes) -> None:
        for wait_s in (*_CONFLICT_WAITS_S, None):
            try:
                self.fs.pipe_file(path, data, mode="create")
                return
            except OSError as error:
                code = _error_code(error)
                if code == "ConditionalRequestConflict" and wait_s is not None:
                    time.sleep(wait_s)
                    continue
                if not isinstance(error, FileExistsError) and code not in ("PreconditionFailed", "412"):
                    raise
                if self.fs.cat_file(path) != data:
                    raise FileExistsError(f"{path} exists") from error
                return

    def replace(self, name: str, data: bytes) -> None:
        """Write `name` completely, replacing an older one; readers see the old or the new bytes, never a mixture."""
        path = self.path(name)
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        os.replace(_write_temporary(path, data), path)

    def append(self, name: str, data: bytes) -> None:
        """Append to a local file: all of `data`, or nothing if that fails."""
        assert self.local, "object storage cannot append"
        path, left = self.path(name), memoryview(data)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(fd).st_size
            try:
                while left:
                    left = left[os.write(fd, left) :]
            except OSError:
                with contextlib.suppress(OSError):  # the file then ends with a partial line, which readers tolerate
                    os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)

    def upload(self, name: str, file: str) -> None:
        """Copy a local file to `name`."""
        self.replace(name, Path(file).read_bytes())

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `[start, end)` of `name`.

        Raises:
            FileNotFoundError: there is no such object.
        """
        if not self.local:
            return self.fs.cat_file(self.path(name), start=start, end=end)
        with open(self.path(name), "rb") as f:
            f.seek(start or 0)
            return f.read() if end is None else f.read(end - (start or 0))

    def exists(self, name: str) -> bool:
        return Path(self.path(name)).exists() if self.local else self.fs.exists(self.path(name))

    def size(self, name: str) -> int:
        return os.path.getsize(self.path(name)) if self.local else int(self.fs.info(self.path(name))["size"])

    def modified(self, name: str) -> float:
        """When an object was last written, by the clock of its storage: unix seconds."""
        path = self.path(name)
        return os.path.getmtime(path) if self.local else float(self.fs.modified(path).timestamp())

    def now(self) -> float:
        """The present time by the clock of `modified`: that of an object written at this moment."""
        name = f".tmp-clock-{uuid.uuid4().hex}"
        self.replace(name, b"")
        try:
            return self.modified(name)
        finally:
            self.remove(name)

    def names(self, folder: str = "") -> list[str]:
        """Names directly inside a folder, sorted; empty if there is no such folder."""
        path = self.path(folder)
        try:
            if self.local:
                return sorted(n for n in os.listdir(path) if not n.startswith(".tmp-"))
            paths = {str(p).rstrip("/") for p in self.fs.ls(path, detail=False)}
            # An empty folder, which some stores keep for a while, and an object are listed as themselves.
            return sorted(p.rsplit("/", 1)[-1] for p in paths if p.strip("/") != path.strip("/"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each object directly inside a folder, by name; empty if there is no such folder."""
        path = self.path(folder)
        try:
            if self.local:
                return {name: os.path.getsize(f"{path}/{name}") for name in os.listdir(path)}
            listed = self.fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            str(o["name"]).rstrip("/").rsplit("/", 1)[-1]: int(o["size"] or 0) for o in listed if o["type"] == "file"
        }

    def usage(self) -> int:
        """Bytes of everything below the root; 0 where there is nothing. An object store lists all of it."""
        if not self.local:
            try:
                return int(self.fs.du(self.path("").rstrip("/"), total=True))
            except FileNotFoundError:
                return 0
        total, folders = 0, [self.root]
        while folders:
            with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:  # removed meanwhile, or not ours
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        return total

    def remove(self, name: str) -> None:
        """Remove an object or a whole folder. It is no error if there is none."""
        path = self.path(name)
        if not self.local:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)
            return
        import shutil

        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=False)
        else:
            Path(path).unlink(missing_ok=True)

    def probe(self) -> None:
        """Check, before anything depends on it, that this storage can write, create atomically, read and delete.

        Raises:
            ConfigError: it cannot; the message has the failed operation.
        """
        name = f".probe-{uuid.uuid4().hex[:8]}"
        doing, fix = "write", _PERMIT
        try:
            self.create(name, b"elastic")
            doing, fix = "refuse to create an existing file", _ATOMIC
            try:
                self.create(name, b"again")
            except FileExistsError:
                pass
            else:
                raise StorageError("a second create overwrote the first")
            doing, fix = "read back", _PERMIT
            if self.read(name) != b"elastic":
                raise StorageError("other bytes came back")
            doing = "delete"
            self.remove(name)
        except Exception as error:  # file systems raise all kinds of exceptions; the user gets one sentence
            if doing == "write" and isinstance(error, StorageError):
                doing, fix = "create files atomically", _ATOMIC
            if doing == "refuse to create an existing file":
                with contextlib.suppress(Exception):  # the first error is what counts
                    self.remove(name)
            raise self.refusal(doing, error, fix) from error

    def try_out(self) -> None:
        """Like `probe`, but folders that this creates are removed again.

        Raises:
            ConfigError: it cannot; the message has the failed operation.
        """
        missing = []
        if self.local:
            missing = [f for f in (Path(self.root), *Path(self.root).parents) if not f.exists()]
        try:
            self.probe()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # another process put something there, or it was never created
                    folder.rmdir()

    def refusal(self, doing: str, error: Exception, fix: str = _PERMIT) -> ConfigError:
        """The error for a storage that cannot do something that a run needs."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return ConfigError(f"{self._option} is {self.url!r}, which cannot {doing}: {reason}; {fix}")


def _unmeant(url: str) -> str:
    """What is probably wrong with a URL, and what to write instead; empty if it looks right."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        one_slash = re.match(r"([a-z][a-z0-9]+):/*", url)
        if one_slash and one_slash[1] in {*_ATOMIC_CREATE, "file", "http", "https"}:
            place = ("/" if one_slash[1] == "file" else "") + url[one_slash.end() :]
            return f"which has no '://' and would be a local folder; write {one_slash[1]}://{place}"
        if not url.strip():
            return "which names no place; give a folder or a URL"
        if url in ("None", "null", "undefined"):
            return f"which looks like a variable that is not set; give a folder or a URL, or write ./{url}"
        if url.startswith("~") and not os.path.isabs(os.path.expanduser(url)):
            return f"but there is no user {url[1:].partition('/')[0]!r} on this machine; give a folder from / on"
        return ""
    if scheme in ("file", "local"):
        if rest and not rest.startswith(("/", "~")):
            return f"which names a host or a relative folder; write {scheme}:///folder with three slashes"
        return "" if rest else "which names no folder; write file:///folder"
    if scheme in _PACKAGE and not rest.strip("/"):
        return f"which names no bucket; write {scheme}://bucket/folder"
    if scheme in _PACKAGE and (rest.startswith("/") or "//" in rest.rstrip("/")):
        place = re.sub("/+", "/", rest.strip("/"))
        return f"which has an empty name between two slashes; write {scheme}://{place}"
    return ""


def _error_code(error: OSError) -> str | None:
    """The store's own error code, since one errno stands for several of them."""
    response = getattr(error.__cause__, "response", None)
    return response["Error"].get("Code") if response else None


def _options(scheme: str) -> dict[str, Any]:
    """Options for opening a file system, in addition to fsspec's own configuration.

    Listings are never cached, since other processes write too. S3 clients get connections for all requests that are in
    flight at a time (botocore has 10), and neither hash nor sign bodies: checkpoints carry their own checksums, and
    hashing took longer than sending.
    """
    if scheme not in _ATOMIC_CREATE or scheme == "memory":
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a"):
        from fsspec.config import conf

        given = conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {
            "max_pool_connections": 64,
            "signature_version": "s3v4",
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **given,
            "s3": {"payload_signing_enabled": False, **given.get("s3", {})},
        }
    return options


def _write_temporary(path: str, data: bytes) -> str:
    folder = os.path.dirname(path)
    make_folder(folder)
    temporary = f"{folder}/.tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def make_folder(path: str) -> None:
    """Create a local folder and its parents, all durably: a file in a folder that is lost would be lost too."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(os.path.dirname(folder))


def sync_folder(path: str) -> None:
    """Make the names in a local folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
