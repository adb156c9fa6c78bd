"""What goes wrong again and again: errors, worlds that break, processes that die. When a worker is left out for it, and
when it ends the run. Pure functions of what was counted.

    an error          the same at one step and microbatch, `max_failures` times replayed: the job's, it ends the run
                      of one worker only, twice at one step: others try that step; if another one fails at the same
                      microbatch, it is the job's, else it was the worker's
    a broken world    whose members all live and join again: `ALIKE` times at one step without any error, or `MOST`
                      times in `WINDOW` steps whatever the reason: the last error ends the run
    a dead process    `DEATHS` worlds one after another that lose a member to it at the same step: it ends the run
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elastic.membership.failure import Failure
from elastic.membership.world import Generation

ALIKE, MOST, WINDOW, DEATHS = 3, 10, 30, 5
TRIES = 2  # of one worker at one step


@dataclass(frozen=True)
class Break:
    """A world that broke at a step (updates that its members held) although all of them live."""

    step: int
    generation: Generation
    why: str
    error: bool  # one of its members said which error of its own made it leave


@dataclass(frozen=True)
class Death:
    """A world that lost a member because its process ended: the newest step that is recorded then."""

    step: int
    generation: Generation
    member_id: str
    how: str


@dataclass(frozen=True)
class Faults:
    """What was counted in this claim."""

    errors: tuple[tuple[str, Failure], ...] = ()  # by whom
    breaks: tuple[Break, ...] = ()
    deaths: tuple[Death, ...] = ()
    step: int = 0  # the newest that is recorded
    sick: frozenset[str] = field(default_factory=frozenset)  # left out where others are enough

    # ---- errors ------------------------------------------------------------------------------------------------

    def failed(self, member_id: str, failure: Failure) -> Faults:
        """One more error."""
        near = tuple((i, f) for i, f in self.errors if abs(f.step - failure.step) < WINDOW)
        return replace(self, errors=(*near, (member_id, failure)))

    def is_the_jobs(self, failure: Failure, max_failures: int) -> bool:
        """Whether an error that was just counted came too often, or to too many, to be anything but the job's."""
        here = [(i, f) for i, f in self.errors if (f.step, f.microbatch) == (failure.step, failure.microbatch)]
        if sum(f.kind == failure.kind for _, f in here) > max_failures:
            return True
        by = [i for i, _ in here]
        return len(set(by)) > 1 and max(map(by.count, by)) >= TRIES

    def first_like(self, failure: Failure) -> Failure:
        """Of all errors at the place of this one, the first of its type."""
        place = (failure.kind, failure.step, failure.microbatch)
        return next((f for _, f in self.errors if (f.kind, f.step, f.microbatch) == place), failure)

    def is_the_workers(self, member_id: str, failure: Failure) -> bool:
        """Whether only this one fails at the step, and again."""
        by = [i for i, f in self.errors if f.step == failure.step]
        return set(by) == {member_id} and len(by) >= TRIES

    # ---- worlds that break -------------------------------------------------------------------------------------

    def broke(self, broken: Break) -> Faults:
        """A world broke while all its members live; it may be said again."""
        if any(b.generation == broken.generation for b in self.breaks):
            return self
        near = tuple(b for b in self.breaks if abs(b.step - broken.step) < WINDOW)
        return replace(self, breaks=(*near, broken))

    def too_many_breaks(self, max_failures: int) -> str | None:
        """Why the newest break is one too many, if it is."""
        if not self.breaks:
            return None
        newest = self.breaks[-1]
        alike = sum(b.step == newest.step and not b.error for b in self.breaks)
        if not newest.error and alike >= ALIKE:
            many = f"{alike} worlds in a row broke at step {newest.step + 1}"
        elif len(self.breaks) >= max(MOST, max_failures + 1):
            many = f"{len(self.breaks)} worlds broke within {WINDOW} steps, the last at step {newest.step + 1}"
        else:
            return None
        return f"{many} although all their workers live; the last time: {newest.why}"

    # ---- processes that die ------------------------------------------------------------------------------------

    def recorded(self, step: int) -> Faults:
        """Rows up to this step are known: who died before it did so by chance."""
        deaths = tuple(d for d in self.deaths if d.step >= step)
        return replace(self, step=step, deaths=deaths)

    def died(self, generation: Generation, member_id: str, how: str) -> Faults:
        """A member of a world was lost, since its process ended. Of each world the first counts."""
        if any(d.generation == generation for d in self.deaths):
            return self
        return replace(self, deaths=(*self.deaths, Death(self.step, generation, member_id, how)))

    def explained(self, member_id: str, how: str) -> Faults:
        """It has become known how the process of a lost member ended."""
        known = tuple(replace(d, how=how) if d.member_id == member_id else d for d in self.deaths)
        return self if known == self.deaths else replace(self, deaths=known)

    def too_many_deaths(self, max_failures: int) -> str | None:
        """Why the newest death is one too many, if it is."""
        if not self.deaths:
            return None
        same = [d for d in self.deaths if d.step == self.deaths[-1].step]
        if len(same) < max(DEATHS, max_failures + 2):
            return None
        how = "; ".join(f"worker {d.member_id}: {d.how}" for d in same)
        return (
            f"{len(same)} worlds one after another lost a worker at step {same[-1].step + 1}, since its process ended, "
            f"and no step was recorded in between ({how})"
        )
