"""The folder of runs that is used unless the user names another."""

from __future__ import annotations

import os

USUAL = "runs"


def find_run(text: str) -> str:
    """Return the URL or folder of a run that the user gave as such, or as the name of a run in the usual folder."""
    if "/" in text or os.path.exists(text) or not os.path.isdir(os.path.join(USUAL, text)):
        return text
    return f"{USUAL}/{text}"
