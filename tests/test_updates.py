"""Which updates in hand a new world applies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastic.worker.updates import Standing, applies

NOBODY = Standing(-1, 0, -1, -1)


def ready(applied: int, n: int = 1) -> Standing:
    return Standing(applied, 1, 1, n)


def passed(applied: int, n: int = 1) -> Standing:
    return Standing(applied, 0, 1, n)


def test_one_who_passed_the_fence_takes_all_of_its_world_along_and_nobody_else() -> None:
    everyone = [passed(6), ready(5), ready(5, n=3), NOBODY]
    assert [applies(s, everyone) for s in everyone] == [False, True, False, False]


def test_it_is_applied_where_all_who_hold_the_newest_state_have_it() -> None:
    everyone = [ready(5), ready(5), NOBODY, passed(3)]
    assert [applies(s, everyone) for s in everyone] == [True, True, False, False]


def test_it_is_not_where_one_of_them_lacks_it_and_that_of_an_older_world_never_is() -> None:
    assert not applies(ready(5), [ready(5), passed(5)])
    for old in (passed(5), ready(5)):
        everyone = [ready(5, n=2), ready(5, n=2), old]
        assert [applies(s, everyone) for s in everyone] == [True, True, False]
    assert not applies(ready(5, n=2), [ready(5, n=2), passed(5, n=2), ready(5)])


STANDINGS = st.builds(Standing, st.integers(-1, 3), st.integers(0, 1), st.just(1), st.integers(1, 2))


@given(st.lists(STANDINGS, min_size=1, max_size=5))
def test_who_holds_the_newest_state_applies_it_together_and_nobody_gets_ahead(everyone: list[Standing]) -> None:
    after = [s.applied + applies(s, everyone) for s in everyone]
    newest = max(s.applied for s in everyone)
    world = max(s.n for s in everyone if s.applied == newest)
    assert len({a for a, s in zip(after, everyone) if (s.applied, s.n) == (newest, world)}) == 1
    assert max(after) <= newest + 1
    assert all(a <= newest for a, s in zip(after, everyone) if s.applied < newest)
