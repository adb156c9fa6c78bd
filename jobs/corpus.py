"""The Python standard library's own sources as bytes: a text that every machine with Python already has."""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEPARATOR = b"\0"  # cannot occur in Python source
_HELD_OUT_ONE_IN = 20
# Installed packages are not the standard library. Tests are left out because they are two thirds of all bytes, mostly
# tables and repeated fixtures, and because distributions such as Debian ship Python without them.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Files in train and held-out parts, each joined by a separator byte into a uint8 array.

    `sha256` is over the names and bytes of all files.
    """

    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray
    sha256: str


@functools.cache
def standard_library() -> Corpus:
    """The corpus of this Python, read once a process."""
    return read(Path(sysconfig.get_paths()["stdlib"]))


def read(root: Path) -> Corpus:
    """Read all Python files under a folder, in the order of their relative paths."""
    digest = hashlib.sha256()
    files: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    for name in _names(root):
        content = (root / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
        files[_is_held_out(name)][name] = content
    train, held_out = files[False], files[True]
    return Corpus(tuple(train), tuple(held_out), _join(train), _join(held_out), digest.hexdigest())


def _names(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS]
        # _sysconfigdata* lists the paths and flags of one build: it would make every machine's corpus another one.
        found = [f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")]
        names += [(Path(folder) / f).relative_to(root).as_posix() for f in found]
    return sorted(names)


def _is_held_out(name: str) -> bool:
    """By hash of the name, so that a file stays on its side when others come or go."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_ONE_IN == 0


def _join(files: dict[str, bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(content + SEPARATOR for content in files.values()), dtype=np.uint8)


class Blocks:
    """Blocks of block + 1 bytes of a text as a map-style dataset: each a context of `block` bytes and the byte after.

    Blocks start `block` bytes apart, so that every byte but the first is predicted once; the last bytes, fewer than
    a block, are left out.

    Args:
        limit: most blocks; fewer than there are lie evenly over the text.
    """

    def __init__(self, text: np.ndarray, block: int, limit: int | None = None):
        whole = (len(text) - 1) // block
        count = whole if limit is None else min(limit, whole)
        self._text = text
        self._starts = np.arange(count) * whole // max(1, count) * block
        self._offsets = np.arange(block + 1)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> np.ndarray:
        """One block, uint8 (block + 1,)."""
        return self._text[self._starts[index] + self._offsets]

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        """Blocks together, uint8 (len(indices), block + 1)."""
        return self._text[self._starts[list(indices), None] + self._offsets]
