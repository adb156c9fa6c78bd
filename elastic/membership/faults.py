"""Counts repeated faults: errors, worlds that break, processes that die. Decides when a worker is left out because of
them, and when they end the run. Pure functions of the counts.

    an error          the same at one step and microbatch after `max_failures` replays: it is the job's, and ends the
    run
                      of one worker only, twice at one step: other workers try that step; if another one fails at the
                      same microbatch, the error is the job's, otherwise it is that worker's
    a broken world    whose members all live and join again: `AT_ONE_STEP` times at one step without any error, or
                      `MOST` times within `WINDOW` steps for whatever reason: the last error ends the run
    a dead process    `DEATHS` worlds in a row that lose a member to it at the same step: it ends the run
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elastic.membership.failure import Failure
from elastic.membership.world import Generation

AT_ONE_STEP, MOST, WINDOW, DEATHS = 3, 10, 30, 5
TRIES = 2  # failures of one worker at one step until others try that step


@dataclass(frozen=True)
class Break:
    """A world that broke although all its members live. `step`: number of updates that they hold."""

    step: int
    generation: Generation
    why: str
    error: bool  # a member reported an error of its own as the reason


@dataclass(frozen=True)
class Death:
    """A world that lost a member because its process ended. `step`: the newest recorded step at that time."""

    step: int
    generation: Generation
    member_id: str
    how: str


@dataclass(frozen=True)
class Faults:
    """What was counted since this claim began."""

    errors: tuple[tuple[str, Failure], ...] = ()  # with the id of the worker that failed
    breaks: tuple[Break, ...] = ()
    deaths: tuple[Death, ...] = ()
    step: int = 0  # the newest recorded step
    sick: frozenset[str] = field(default_factory=frozenset)  # workers to leave out if there are enough others

    # ---- errors ------------------------------------------------------------------------------------------------

    def failed(self, member_id: str, failure: Failure) -> Faults:
        """Count one more error of this worker."""
        near = tuple((i, f) for i, f in self.errors if abs(f.step - failure.step) < WINDOW)
        return replace(self, errors=(*near, (member_id, failure)))

    def is_the_jobs(self, failure: Failure, max_failures: int) -> bool:
        """Whether an error that was just counted came too often, or to too many workers, to be a worker's own."""
        here = [(i, f) for i, f in self.errors if (f.step, f.microbatch) == (failure.step, failure.microbatch)]
        if sum(f.kind == failure.kind for _, f in here) > max_failures:
            return True
        by = [i for i, _ in here]
        return len(set(by)) > 1 and max(map(by.count, by)) >= TRIES

    def first_like(self, failure: Failure) -> Failure:
        """The first error of the same type at the same step and microbatch."""
        place = (failure.kind, failure.step, failure.microbatch)
        return next((f for _, f in self.errors if (f.kind, f.step, f.microbatch) == place), failure)

    def is_the_workers(self, member_id: str, failure: Failure) -> bool:
        """Whether this worker alone fails at that step, and has done so repeatedly."""
        by = [i for i, f in self.errors if f.step == failure.step]
        return set(by) == {member_id} and len(by) >= TRIES

    # ---- worlds that break -------------------------------------------------------------------------------------

    def broke(self, broken: Break) -> Faults:
        """Count a world that broke while all its members live. The same world counts once."""
        if any(b.generation == broken.generation for b in self.breaks):
            return self
        near = tuple(b for b in self.breaks if abs(b.step - broken.step) < WINDOW)
        return replace(self, breaks=(*near, broken))

    def too_many_breaks(self, max_failures: int) -> str | None:
        """The message that ends the run, if the newest break is one too many."""
        if not self.breaks:
            return None
        newest = self.breaks[-1]
        same_step = sum(b.step == newest.step and not b.error for b in self.breaks)
        if not newest.error and same_step >= AT_ONE_STEP:
            many = f"{same_step} worlds in a row broke at step {newest.step + 1}"
        elif len(self.breaks) >= max(MOST, max_failures + 1):
            many = f"{len(self.breaks)} worlds broke within {WINDOW} steps, the last at step {newest.step + 1}"
        else:
            return None
        return f"{many} although all their workers live; the last time: {newest.why}"

    # ---- processes that die ------------------------------------------------------------------------------------

    def recorded(self, step: int) -> Faults:
        """The ledger has rows up to this step: deaths before it do not count, since training got past them."""
        deaths = tuple(d for d in self.deaths if d.step >= step)
        return replace(self, step=step, deaths=deaths)

    def died(self, generation: Generation, member_id: str, how: str) -> Faults:
        """Count a member that was lost because its process ended. Only the first of each world counts."""
        if any(d.generation == generation for d in self.deaths):
            return self
        return replace(self, deaths=(*self.deaths, Death(self.step, generation, member_id, how)))

    def explained(self, member_id: str, how: str) -> Faults:
        """Add how the process of a lost member ended, which became known later."""
        known = tuple(replace(d, how=how) if d.member_id == member_id else d for d in self.deaths)
        return self if known == self.deaths else replace(self, deaths=known)

    def too_many_deaths(self, max_failures: int) -> str | None:
        """The message that ends the run, if the newest death is one too many."""
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
