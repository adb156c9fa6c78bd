"""Looks at Ray's object references without waiting."""

from __future__ import annotations

from typing import Any

import ray


def is_ready(reference: Any) -> bool:
    """Whether the reference's value or error is available."""
    ready, _ = ray.wait([reference], timeout=0)
    return bool(ready)
