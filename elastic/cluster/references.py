"""What is known of Ray's references without waiting."""

from __future__ import annotations

from typing import Any

import ray


def is_ready(reference: Any) -> bool:
    """Whether its value, or its error, is there."""
    ready, _ = ray.wait([reference], timeout=0)
    return bool(ready)
