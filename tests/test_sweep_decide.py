"""Verdicts on trials: functions of what was reported, whatever the order in which that came and who was killed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.sweep.config import SweepConfig
from elastic.sweep.decide import Hyperband, Missing, NoRule, OrderedAsha, Population, Results, Rule, Verdict, percentile
from elastic.sweep.judge import rule_of
from elastic.sweep.space import parse_search
from elastic.sweep.trial import next_leg

SPACE = parse_search(["job.lr=loguniform(1e-4,1e-1)", "job.width=choice(8,16,32)"])
TOTAL = 9


def simulate(
    rule: Rule,
    trials: int,
    value: Callable[[int, int], float],
    choose: random.Random,
    slots: int,
    kill_share: float = 0.0,
) -> dict[int, list[object]]:
    """Run trials with so many at a time, in an order of events that is chosen at random; a killed one reports again.

    Returns:
        for each trial the evaluations that it had, and its verdicts.
    """
    results, story = Results(TOTAL), {t: [] for t in range(trials)}
    at, until, waiting, running, left = {}, {}, {}, [], list(range(trials))
    while left or running or waiting:
        ready = [t for t in waiting if t not in running and not isinstance(rule.judge(results, t, waiting[t]), Missing)]
        while len(running) < slots and (ready or left):
            t = ready.pop(0) if ready else left.pop(0)
            if t not in at:
                at[t], until[t] = 0, rule.first(t)
            running.append(t)
        able = [t for t in running if t not in waiting or not isinstance(rule.judge(results, t, waiting[t]), Missing)]
        if not able:  # all hold: one that waits gives its place to another
            running.remove(choose.choice(running))
            continue
        t = choose.choice(able)
        if t in waiting:
            gate = waiting.pop(t)
            verdict = rule.judge(results, t, gate)
            assert isinstance(verdict, Verdict)
            story[t].append(verdict)
            if verdict.do == "stop":
                results.end(t)
                running.remove(t)
            else:
                until[t] = verdict.until
            continue
        if choose.random() < kill_share:
            at[t] = max(0, at[t] - choose.randrange(3))  # it resumes from an older checkpoint
            continue
        at[t] += 1
        results.report(t, at[t], value(t, at[t]), "max")
        if at[t] not in story[t]:
            story[t].append(at[t])
        if at[t] == TOTAL:
            results.end(t)
            running.remove(t)
        elif at[t] >= until[t]:
            waiting[t] = at[t]
    return story


def value_of(seed: int) -> Callable[[int, int], float]:
    return lambda trial, evaluation: random.Random(f"{seed}/{trial}/{evaluation}").random() + evaluation


def rules(trials: int) -> list[Rule]:
    return [
        NoRule(TOTAL),
        OrderedAsha(1, 3, TOTAL),
        OrderedAsha(2, 2, TOTAL),
        Hyperband(1, 3, TOTAL, trials),
        Population(SPACE, 2, TOTAL, trials, quantile=0.25, resample=0.25, seed=3),
    ]


@settings(max_examples=40)
@given(st.integers(1, 14), st.integers(0, 4), st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([0.0, 0.3]))
def test_verdicts_do_not_depend_on_the_order_of_events_on_places_or_on_kills(trials, which, seed, slots, kills):
    value = value_of(seed)

    alone = simulate(rules(trials)[which], trials, value, random.Random(0), 1)
    story = simulate(rules(trials)[which], trials, value, random.Random(seed), slots, kills)

    assert story == alone


def test_without_a_rule_all_go_to_their_end():
    story = simulate(NoRule(TOTAL), 3, value_of(1), random.Random(0), 2)

    assert story == {t: list(range(1, TOTAL + 1)) for t in range(3)}


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_asha_decides_as_ray_tunes_does_with_one_trial_at_a_time(trials, seed):
    from ray.tune.schedulers.async_hyperband import _Bracket  # takes seconds

    value, bracket = value_of(seed), _Bracket(1, TOTAL, 3, 0)

    class Named:
        def __init__(self, trial_id: int):
            self.trial_id = trial_id

    theirs = {}
    for t in range(trials):
        theirs[t] = TOTAL
        for evaluation in range(1, TOTAL):  # Ray's also looks at the last one, where nothing is left to be stopped
            if bracket.on_result(Named(t), evaluation, value(t, evaluation)) == "STOP":
                theirs[t] = evaluation
                break

    story = simulate(OrderedAsha(1, 3, TOTAL), trials, value, random.Random(seed), 3)

    assert {t: max(e for e in events if isinstance(e, int)) for t, events in story.items()} == theirs


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_the_percentile_is_numpys(values, share):
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), rel=1e-9, abs=1e-9)


def test_a_trial_without_a_number_is_stopped_where_others_have_one():
    results = Results(TOTAL)
    results.report(0, 1, 0.5, "min")
    results.report(1, 1, float("nan"), "min")

    assert OrderedAsha(1, 3, TOTAL).judge(results, 1, 1).do == "stop"


def test_hyperband_fills_brackets_and_keeps_the_best_of_each():
    rule, value = Hyperband(1, 3, TOTAL, 22), value_of(5)

    story = simulate(rule, 22, value, random.Random(5), 4)

    length = {t: max(e for e in events if isinstance(e, int)) for t, events in story.items()}
    counts = {e: sum(n == e for n in length.values()) for e in set(length.values())}
    # brackets of 9, 5 and 3 trials from rungs (1, 3), (3) and none; then one of 5 again with rungs (1, 3)
    assert [rule.first(t) for t in (0, 8, 9, 13, 14, 16, 17, 21)] == [1, 1, 3, 3, 9, 9, 1, 1]
    assert counts == {1: 6 + 4, 3: 2 + 4, 9: 1 + 1 + 3 + 1}
    survivors = [t for t in range(9) if length[t] > 1]
    assert survivors == sorted(sorted(range(9), key=lambda t: value(t, 1))[-3:])


def test_a_population_replaces_its_worst_by_its_best_with_options_near_theirs():
    rule = Population(SPACE, 3, TOTAL, 8, quantile=0.25, resample=0.0, seed=1)

    story = simulate(rule, 8, lambda trial, evaluation: float(trial), random.Random(1), 3)

    takes = {t: [e for e in events if isinstance(e, Verdict) and e.do == "exploit"] for t, events in story.items()}
    assert [len(takes[t]) for t in range(8)] == [2, 2, 0, 0, 0, 0, 0, 0]
    assert {v.source for found in takes.values() for v in found} <= {6, 7}
    results = Results(TOTAL)
    for take in takes[0]:
        theirs = rule.options(results, take.source, 0)
        lr, width = take.options["job.lr"], take.options["job.width"]
        assert any(lr == pytest.approx(min(theirs["job.lr"] * f, 0.1), rel=1e-4) for f in (0.8, 1.2))
        widths = SPACE["job.width"].values
        assert abs(widths.index(width) - widths.index(theirs["job.width"])) <= 1


def test_a_population_of_which_some_failed_goes_on_without_them():
    results, rule = Results(TOTAL), Population(SPACE, 1, TOTAL, 4, quantile=0.5, resample=0.0, seed=0)
    for trial in (0, 1, 2):
        results.report(trial, 1, float(trial), "max")
    assert rule.judge(results, 0, 1) == Missing(frozenset({3}))

    results.end(3)

    found = [rule.judge(results, trial, 1) for trial in (0, 1, 2)]
    assert [v.do for v in found] == ["exploit", "go", "go"]
    assert found[0].source == 2


def test_a_trial_goes_on_where_its_lines_say_it_stands():
    started = {"kind": "started", "options": {"job.lr": 1.0}, "until": 1}

    def verdict(evaluation: int, do: str, until: int = 0, **more: object) -> dict[str, object]:
        known = {"kind": "verdict", "evaluation": evaluation, "do": do, "until": until, "why": "", "source": 5}
        return {**known, "options": {}, **more}

    def yes(line: object) -> bool:
        return True

    assert next_leg([started], yes).until == 1
    assert next_leg([started, verdict(1, "go", 3)], yes).until == 3
    stopped = next_leg([started, verdict(1, "go", 3), verdict(3, "stop")], yes)
    assert (stopped.until, stopped.gate, stopped.then.do) == (3, 3, "stop")
    lines = [started, verdict(1, "exploit", 3, options={"job.lr": 2.0})]
    before, after = next_leg(lines, lambda line: False), next_leg(lines, yes)
    assert (before.options, before.until, before.gate, before.then.source) == ({"job.lr": 1.0}, 1, 1, 5)
    assert (after.options, after.until, after.then) == ({"job.lr": 2.0}, 3, None)
    assert next_leg([*lines, verdict(1, "exploit", 3, options={"job.lr": 9.0})], yes).options == {"job.lr": 2.0}


def test_the_rule_is_what_the_options_say():
    def rule(**options: object) -> Rule:
        return rule_of(SweepConfig(search={"job.lr": "uniform(0,1)"}, **options), TOTAL)

    assert isinstance(rule(), NoRule)
    assert rule(scheduler="asha", grace_period=2, reduction_factor=2).first(0) == 2
    assert rule(scheduler="hyperband", trials=20).first(9) == 3
    assert rule(scheduler="pbt", perturbation_interval=4).first(0) == 4
