"""Where runs lie unless somebody says otherwise."""

from __future__ import annotations

import os

USUAL = "runs"


def find_run(text: str) -> str:
    """A run as people write it: its URL or folder, or the name of one in the usual place."""
    if "/" in text or os.path.exists(text) or not os.path.isdir(os.path.join(USUAL, text)):
        return text
    return f"{USUAL}/{text}"
