"""The garbage collector of a process: what was imported is frozen, so no collection looks at it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_after: list[object] = [object()]  # not frozen, unless objects were frozen after what was imported


@contextmanager
def importing() -> Iterator[None]:
    """Inside, modules are imported without the garbage collector, which would look at all objects again and again: a
    sixth of the time that torch takes to import. Objects that exist at the end are frozen: a later collection, which
    would hold up a training step for a third of a second, does not look at them, nor does `referrers`."""
    gc.disable()
    try:
        yield
    finally:
        freeze_imported()
        gc.enable()


def freeze_imported() -> None:
    """Freeze the objects of modules that were imported; `gc.get_freeze_count()` is 0 no more."""
    global _after
    gc.freeze()
    _after = [object()]


def referrers(objects: list[Any]) -> list[Any]:
    """The objects that refer to any of these, except this list. What `importing` froze is not asked; what the job has
    frozen, as one does before processes are forked, is."""
    found = gc.get_referrers(*objects, *_after)
    if not any(holder is _after for holder in found):
        gc.unfreeze()
        found = gc.get_referrers(*objects, *_after)
        gc.freeze()
    return [holder for holder in found if holder is not _after and holder is not objects]
