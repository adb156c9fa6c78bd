"""The garbage collector of a process: what was imported is frozen, so no collection looks at it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_after: list[object] = [object()]  # not frozen, unless objects were frozen after what was imported
_lock = threading.Lock()
_imports, _was_enabled = 0, True  # imports under way, and whether there were collections before the first of them


@contextmanager
def importing() -> Iterator[None]:
    """Inside, modules are imported without the garbage collector, which would look at all objects again and again: a
    sixth of the time that torch takes to import. Objects that exist at the end are frozen: a later collection, which
    would hold up a training step for 0.15 s, does not look at them, nor does `referrers`."""
    global _imports, _was_enabled
    with _lock:
        if not _imports:
            _was_enabled = gc.isenabled()
        _imports += 1
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _imports -= 1
            freeze_imported()
            if not _imports and _was_enabled:
                gc.enable()


def freeze_imported() -> None:
    """Freeze all objects that exist: those of the modules that were imported."""
    global _after
    gc.freeze()
    _after = [object()]


def referrers(objects: list[Any]) -> list[Any]:
    """The objects that refer to any of these, except this list. What `importing` froze is not asked; what the job has
    frozen, as one does before processes are forked, is."""
    asked = (*objects, *_after)  # from Python 3.13 on, the arguments of the call are found too
    found = gc.get_referrers(*asked)
    if not any(holder is _after for holder in found):
        found.clear()
        gc.unfreeze()
        found = gc.get_referrers(*asked)
        gc.freeze()
    ours = {id(asked), id(_after), id(objects)}
    return [holder for holder in found if id(holder) not in ours]
