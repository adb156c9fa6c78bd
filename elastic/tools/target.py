"""The objects that tools work on: the folder of a run, one of its checkpoints, and a claim on a run to change it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches

from elastic.checkpoint.format import FOLDER
from elastic.checkpoint.reader import Committed, newest_first
from elastic.errors import ConfigError, FencedError
from elastic.run.folder import CLAIMS, CONFIG, STATUS, RunFolder
from elastic.storage import Storage
from elastic.tools.places import USUAL

_HINTS = 5
_MOST_LOOKED_AT = 100


def open_run(url: str, *, read_only: bool = False) -> RunFolder:
    """Open the folder of a run, or a folder of checkpoints alone.

    Raises:
        ConfigError: `url` is no such folder, or cannot be listed.
    """
    storage = Storage(url, option="URL", read_only=read_only)
    names = list_names(storage)
    if not {FOLDER, CONFIG, STATUS} & set(names):
        raise ConfigError(f"URL is {url!r}, {_what_it_is(url, storage, names)}")
    return RunFolder(storage)


def _what_it_is(url: str, storage: Storage, names: list[str]) -> str:
    """Describe a folder that is no run, and what to give instead."""
    if CLAIMS in names:
        return (
            "which is half a run: a command claimed it and was ended before it wrote config.json; start it again by "
            "its name, or remove it"
        )
    runs = [n for n in names[:_MOST_LOOKED_AT] if storage.exists(f"{n}/{CONFIG}")][:_HINTS]
    if runs:
        return f"which is no run; give one of the runs in it: {', '.join(f'{storage.url}/{n}' for n in runs)}"
    near = _near(url)
    hint = f"near that name: {', '.join(near)}" if near else "the folder of one"
    if names:
        few = ", ".join(names[:_HINTS]) + (", ..." if len(names) > _HINTS else "")
        return f"which is no run (it has {few}); give {hint}"
    return f"which is no run; give {hint}"


def _near(url: str) -> list[str]:
    """Find runs with similar names beside this folder, or in the usual folder."""
    place, slash, name = url.rstrip("/").rpartition("/")
    beside = Storage(place if slash else USUAL, option="URL", read_only=True)
    with contextlib.suppress(Exception):  # a file system may raise anything, and this is only a hint
        similar = get_close_matches(name, beside.names(), _HINTS)
        prefix = f"{place}/" if slash else ""
        return [f"{prefix}{n}" for n in similar if beside.exists(f"{n}/{CONFIG}")]
    return []


def list_names(storage: Storage) -> list[str]:
    """Return the names directly at a storage's root.

    Raises:
        ConfigError: the storage cannot be listed.
    """
    try:
        return storage.names()
    except Exception as error:  # a file system may raise anything; the user sees one sentence
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"URL is {storage.url!r}, which cannot be listed: {reason}; give the folder of a run"
        ) from error


def choose(storage: Storage, step: int | None) -> Committed:
    """Return the newest committed checkpoint, or the newest of `step`.

    Raises:
        ConfigError: there is none.
    """
    committed = list(newest_first(storage))
    found = next((c for c in committed if step in (None, c.step)), None)
    if found is None and step is not None and committed:
        steps = ", ".join(str(s) for s in sorted({c.step for c in committed}))
        raise ConfigError(f"--step is {step}, but {storage.url} has checkpoints of the steps {steps}; give one of them")
    if found is None:
        raise ConfigError(f"URL is {storage.url!r}, which has no committed checkpoint; give a run that has")
    return found


@dataclass(frozen=True)
class Hold:
    """A claim on a run that nobody drives. Earlier claims can no longer commit anything."""

    folder: RunFolder
    epoch: int

    def check(self) -> None:
        """Check that the run has no newer claim.

        Raises:
            FencedError: another command has claimed it.
        """
        newest = self.folder.newest_epoch()
        if newest > self.epoch:
            raise FencedError(
                f"run {self.folder.storage.url} was claimed by another command (claim {newest}) at this moment; "
                "wait for its end and try again"
            )


@contextmanager
def hold(folder: RunFolder, doing: str) -> Iterator[Hold]:
    """Claim a run that nobody drives, and release it at the end.

    Raises:
        ConfigError: the run is live, or was claimed at this moment; with the name of the owner.
    """
    refuse_live(folder, doing)
    with claimed(folder, take_over=False) as held:
        yield held


@contextmanager
def claimed(folder: RunFolder, *, take_over: bool) -> Iterator[Hold]:
    """Claim a run, and release it at the end so that the next driver need not wait.

    Raises:
        ConfigError: the run is live, or was claimed at this moment.
    """
    held = Hold(folder, folder.claim(take_over=take_over))
    try:
        yield held
    finally:
        folder.release(held.epoch)


def refuse_live(folder: RunFolder, doing: str) -> None:
    """Refuse to change a live run, because only its own keeper may.

    Raises:
        ConfigError: the run is live; with the name of its owner.
    """
    driver = folder.live_driver()
    if driver is not None:
        raise ConfigError(
            f"run {folder.storage.url} is live, driven by {driver}, and only that process may {doing} it; stop it first"
        )
