"""Versions of the packages that results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str | None]:
    """Installed versions by name, without importing anything heavy."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("elastic-train", "torch", "ray", "fsspec", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
