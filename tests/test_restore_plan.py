"""How the members of a new world come to one state: over all histories, in which workers die at any moment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from elastic.worker.flags import Flags, Stop
from elastic.worker.restore_plan import Standing, decide

NOBODY = Standing(-1, 0, -1, -1)


def ready(applied: int, n: int = 1) -> Standing:
    return Standing(applied, 1, 1, n)


def passed(applied: int, n: int = 1) -> Standing:
    return Standing(applied, 0, 1, n)


def applies(*everyone: Standing) -> list[bool]:
    return list(decide(everyone, -1, fenced=True).applies)


def test_one_who_passed_the_fence_takes_all_of_its_world_along_and_nobody_else() -> None:
    assert applies(passed(6), ready(5), ready(5, n=3), NOBODY) == [False, True, False, False]


def test_it_is_applied_where_all_who_hold_the_newest_state_have_it() -> None:
    assert applies(ready(5), ready(5), NOBODY, passed(3)) == [True, True, False, False]


def test_it_is_not_where_one_of_them_lacks_it_and_that_of_an_older_world_never_is() -> None:
    assert applies(ready(5), passed(5)) == [False, False]
    for old in (passed(5), ready(5)):
        assert applies(ready(5, n=2), ready(5, n=2), old) == [True, True, False]
    assert applies(ready(5, n=2), passed(5, n=2), ready(5)) == [False, False, False]


def test_states_older_than_the_newest_checkpoint_count_for_nothing() -> None:
    plan = decide([passed(5), ready(5), NOBODY], 9, fenced=True)
    assert (plan.applied, plan.newest, plan.moves) == ((-1, -1, -1), -1, True)
    assert [plan.is_newcomer(rank) for rank in range(3)] == [False, False, True]
    plan = decide([passed(5), ready(5), NOBODY], 5, fenced=True)
    assert (plan.applied, plan.newest, plan.moves) == ((5, 5, -1), 5, True)
    assert not decide([passed(5), passed(5)], 5, fenced=False).moves
    assert decide([NOBODY], -1, fenced=False).moves, "a fresh start is compared, too"


def test_of_a_step_that_two_worlds_made_the_newer_worlds_counts() -> None:
    """Without a fence one member may have applied it, while the others left without it and made it again."""
    plan = decide([passed(6), passed(6, n=2), passed(5, n=2)], -1, fenced=False)
    assert plan.held == (-1, 6, 5)
    plan = decide([passed(7), passed(6, n=2)], -1, fenced=False)
    assert plan.held == (7, 6)


STANDINGS = st.builds(Standing, st.integers(-1, 3), st.integers(0, 1), st.just(1), st.integers(1, 2))


@given(st.lists(STANDINGS, min_size=1, max_size=5), st.integers(-1, 4))
def test_who_holds_the_newest_state_applies_it_together_and_nobody_gets_ahead(
    everyone: list[Standing], committed: int
) -> None:
    plan = decide(everyone, committed, fenced=True)
    newest = max(s.applied for s in everyone)
    world = max(s.n for s in everyone if s.applied == newest)
    assert len({a for a, s in zip(plan.held, everyone) if (s.applied, s.n) == (newest, world)}) == 1
    assert max(plan.held) <= newest + 1
    assert all(a <= newest for a, s in zip(plan.held, everyone) if s.applied < newest)
    assert plan.newest == -1 or plan.newest >= committed
    assert plan.newest in plan.applied


# ---- histories ------------------------------------------------------------------------------------------------------


@dataclass
class Holder:
    """A worker: the worlds in which each update of its state was made, and the update that it has in hand."""

    lineage: list[int] | None = None
    in_hand: bool = False
    agreed_in: int = -1

    @property
    def applied(self) -> int:
        return -1 if self.lineage is None else len(self.lineage)

    @property
    def standing(self) -> Standing:
        return Standing(self.applied, int(self.in_hand), 1, self.agreed_in)

    def apply(self) -> None:
        assert self.lineage is not None
        self.lineage, self.in_hand = [*self.lineage, self.agreed_in], False


@dataclass
class History:
    """One world after another. `recorded` is what the ledger may have: an update whose row was posted is never lost."""

    workers: list[Holder] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    worlds: int = 0
    saved: list[int] = field(default_factory=list)
    committed: int = -1

    def form(self, members: list[Holder], *, fenced: bool, reach: int | None = None) -> None:
        """A world is formed and restored, and must go on from one state that has every recorded update; without fences,
        every update that a member applied. It may break before all members (but the first `reach`) know of it."""
        self.worlds += 1
        before = max((m.applied for m in members), default=0)
        plan = decide([m.standing for m in members], self.committed, fenced=fenced)
        for member, does in zip(members, plan.applies, strict=True):
            if does:
                member.apply()
            member.in_hand = False
        holders = [m.lineage for m, a in zip(members, plan.applied, strict=True) if a == plan.newest and m.lineage]
        state = holders[0] if holders else self.saved
        assert all(lineage == state for lineage in holders), "who is to have one state has several"
        assert len(state) >= max(before, self.committed, 0), "a step was lost"
        if fenced:
            assert state[: len(self.recorded)] == self.recorded, "an update that the ledger has was lost, or made again"
        for member in members[:reach]:
            member.lineage, member.agreed_in = list(state), self.worlds

    def step(self, members: list[Holder], prepared: int, passed: int, posted: int) -> bool:
        """Begin a step: so many prepare it, and if all did, so many pass the fence, and some of those post the row.
        Returns whether all went well."""
        for member in members[:prepared]:
            member.in_hand = True
        if prepared < len(members):
            return False
        for number, member in enumerate(members[:passed]):
            member.apply()
            if number < posted:
                self.recorded = max(self.recorded, member.lineage or [], key=len)
        return passed == len(members)

    def unfenced_step(self, members: list[Holder], came: int, summed: int) -> bool:
        """Begin a step without a fence: so many give their gradients, and if all did, so many have the sum of all, and
        apply it at once. Returns whether all went well."""
        if came < len(members):
            return False
        for member in members[:summed]:
            member.apply()
        return summed == len(members)

    def save(self, members: list[Holder]) -> None:
        """A checkpoint, to which all members give their share."""
        if all(m.applied == members[0].applied for m in members):
            self.saved = list(members[0].lineage or [])
            self.committed = len(self.saved)


def live(data: st.DataObject, *, fenced: bool) -> None:
    """Where a member of the newest world survives. Those who were left behind come back with what they held."""
    history = History([Holder() for _ in range(data.draw(st.integers(1, 4)))])
    members = history.workers
    history.form(members, fenced=fenced)
    for _ in range(data.draw(st.integers(1, 5))):
        some = st.sampled_from([0, 1, len(members) - 1, len(members), len(members)])

        def step(members: list[Holder] = members, some: st.SearchStrategy[int] = some) -> bool:
            order = members if fenced else data.draw(st.permutations(members))
            if fenced or data.draw(st.integers(0, 3)) == 0:  # some step is to be the last of its world
                return history.step(order, data.draw(some), data.draw(some), data.draw(some))
            return history.unfenced_step(order, data.draw(some), data.draw(some))

        while step() and data.draw(st.booleans()):
            if data.draw(st.booleans()):
                history.save(members)
        survivors = data.draw(st.lists(st.sampled_from(range(len(members))), min_size=1, unique=True))
        kept = [members[i] for i in survivors]
        back = [w for w in history.workers if w not in members and data.draw(st.booleans())]
        left = [w for w in members if w not in kept]
        new = [Holder() for _ in range(data.draw(st.integers(0, 1)))]
        order = data.draw(st.permutations([*kept, *back, *new]))
        history.workers = [*order, *(w for w in left if data.draw(st.booleans()))]
        members = list(order)
        if not fenced and data.draw(st.booleans()):
            history.form(members, fenced=fenced, reach=data.draw(st.integers(0, len(members))))
        history.form(members, fenced=fenced)


@given(st.data())
def test_in_all_histories_a_world_goes_on_from_one_state_that_has_every_recorded_update(data: st.DataObject) -> None:
    live(data, fenced=True)


@given(st.data())
def test_without_fences_too_it_goes_on_from_one_state_that_has_every_update_of_its_members(data: st.DataObject) -> None:
    """Who alone applied an update may die, or come back when others have made it again."""
    live(data, fenced=False)


# ---- what members agree on -------------------------------------------------------------------------------------------

FLAGS = st.builds(
    Flags,
    st.tuples(st.integers(-(1 << 62), 1 << 62), st.integers(-(1 << 62), 1 << 62)),
    st.sampled_from(Stop),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(0, 2), st.integers(0, 99)),
)


@given(st.lists(FLAGS, min_size=1, max_size=4))
def test_members_agree_on_the_largest_of_each_flag(everyone: list[Flags]) -> None:
    agreed = Flags.unpack([max(numbers) for numbers in zip(*(flags.pack() for flags in everyone), strict=True)])
    assert agreed.stop == max(flags.stop for flags in everyone)
    for name in ("save", "leave", "busy"):
        assert getattr(agreed, name) == any(getattr(flags, name) for flags in everyone)
    for flags in everyone:
        assert Flags.unpack(flags.pack()) == flags


def test_flags_without_snapshots_are_six_numbers() -> None:
    assert len(Flags().pack()) == 6
    assert list(itertools.islice(Flags(stop=Stop.AT_ONCE).pack(), 2, 3)) == [2]
