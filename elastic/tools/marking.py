"""Marking damaged checkpoints that a check found. From then on no listing, resume, retention or restore counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.checkpoint.patience import is_from_storage
from elastic.checkpoint.reader import Committed, mark, marked, unmark
from elastic.errors import ElasticError
from elastic.membership.protocol import Damaged
from elastic.run.folder import RunFolder
from elastic.tools.inspecting import Verified
from elastic.tools.live import connect
from elastic.tools.target import hold


@dataclass(frozen=True)
class Marked:
    """The steps whose checkpoints were marked, those whose marks were removed, and the reason if neither was
    possible."""

    marked: tuple[int, ...] = ()
    unmarked: tuple[int, ...] = ()
    problem: str | None = None


def mark_found(folder: RunFolder, checked: Sequence[Committed], found: Verified) -> Marked:
    """Mark the checkpoints in `checked` that are damaged, and remove the marks of those that are whole. If the run is
    live, its driver is asked to mark them; it is not asked to remove marks."""
    marks, bad = marked(folder.storage), dict[Committed, str]()
    for damage in found.damages:
        bad.setdefault(Committed(damage.step, damage.attempt), f"{damage.object}: {damage.problem}")
    new = [c for c in checked if c in bad and c not in marks]
    whole = [c for c in checked if c in marks and c not in bad]
    if not new and not whole:
        return Marked()
    try:
        live = folder.live_driver() is not None
        if live and new:
            run = connect(folder, "mark")
            for c in new:
                run.ask(Damaged(c.step, c.attempt, bad[c]))
        elif not live:
            with hold(folder, "mark") as held:
                for c in new:
                    mark(folder.storage, c, bad[c])
                held.check()
                for c in whole:
                    unmark(folder.storage, c)
    except Exception as error:  # someone who may only read the storage gets the findings nevertheless
        if not isinstance(error, ElasticError) and not is_from_storage(error):
            raise
        return Marked(problem=f"{type(error).__name__}: {error}")
    return Marked(_steps(new), () if live else _steps(whole))


def _steps(checkpoints: Sequence[Committed]) -> tuple[int, ...]:
    return tuple(sorted({c.step for c in checkpoints}))
