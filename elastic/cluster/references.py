"""Ray's object references: looked at without waiting, and functions that travel as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


def is_ready(reference: Any) -> bool:
    """Whether the reference's value or error is available."""
    ready, _ = ray.wait([reference], timeout=0)
    return bool(ready)


class Sent:
    """A function in Ray's object store: a controller can start workers with it without unpickling it."""

    def __init__(self, function: Callable[[], Any]):
        self._reference = ray.put(function)

    def get(self) -> Callable[[], Any]:
        return ray.get(self._reference)
