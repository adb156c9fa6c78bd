"""Search spaces and options of a sweep: what is read, drawn and refused."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.sweep.config import SweepConfig, parse_stop
from elastic.sweep.space import Domain, apply, check_names, draw, grid_size, parse_domain, parse_search


@dataclass
class Toy(elastic.Job):
    lr: float = 0.1
    width: int = 8
    kind: str = "plain"
    deep: bool = False
    block: int | None = None


numbers = st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.4g}"))


def test_every_kind_is_read_and_nothing_is_evaluated():
    found = parse_search(
        [
            "job.lr=loguniform(1e-4, 1e-2)",
            "--batch.global_size = choice(32,64)",
            "job.kind=grid(plain, 'two words')",
            "job.width=randint(4, 1_000)",
            "optim.final-lr=quniform(0,1,0.25)",
            "job.deep=choice(True, False)",
            "job.block=choice(None, -3)",
        ]
    )

    assert found == {
        "job.lr": Domain("loguniform", (1e-4, 1e-2)),
        "batch.global-size": Domain("choice", (32, 64)),
        "job.kind": Domain("grid", ("plain", "two words")),
        "job.width": Domain("randint", (4, 1000)),
        "optim.final-lr": Domain("quniform", (0, 1, 0.25)),
        "job.deep": Domain("choice", (True, False)),
        "job.block": Domain("choice", (None, -3)),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("job.lr", "give NAME=KIND"),
        ("=uniform(0,1)", "give NAME=KIND"),
        ("job.lr=1e-3", "is no KIND"),
        ("job.lr=gauss(0,1)", "give a kind of"),
        ("job.lr=uniform(0,1", "cannot be read"),
        ("job.lr=uniform(0)", "has 1 values"),
        ("job.lr=uniform(1,0)", "low below high"),
        ("job.lr=uniform(1,1)", "low below high"),
        ("job.lr=loguniform(0,1)", "above 0"),
        ("job.lr=uniform(0,1e999)", "finite"),
        ("job.lr=uniform(a,b)", "finite number"),
        ("job.lr=randint(1,2.5)", "whole number"),
        ("job.lr=quniform(0,1,0)", "step above 0"),
        ("job.lr=quniform(0,1,2)", "step above 0"),
        ("job.lr=choice()", "no values"),
        ("job.lr=choice(1,1)", "twice"),
        ("job.lr=choice(__import__('os'))", "give numbers, words"),
        ("job.lr=uniform(low=0,high=1)", "is no KIND"),
        ("job.lr=choice([1,2])", "give numbers, words"),
        ("job.lr=uniform(0,1)+uniform(0,1)", "is no KIND"),
    ],
)
def test_what_has_no_values_is_refused_in_one_sentence(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_search([text])

    assert "\n" not in str(caught.value)


def test_an_empty_space_and_a_name_that_comes_twice_are_refused():
    with pytest.raises(ConfigError, match="something to search"):
        parse_search([])
    with pytest.raises(ConfigError, match="twice"):
        parse_search(["job.lr=uniform(0,1)", "--job.lr=choice(1,2)"])


@given(st.sampled_from(["uniform", "loguniform", "quniform", "randint"]), numbers, numbers, st.integers(0, 2**40))
def test_what_is_drawn_lies_in_its_domain_and_so_does_its_neighbour(kind, one, other, seed):
    low, high = min(one, other), max(one, other)
    if kind == "loguniform":
        low, high = abs(low) + 1e-6, abs(low) + 1e-6 + abs(high - low)
    if kind == "randint":
        low, high = int(low), int(high)
    if not low < high:
        return
    domain = Domain(kind, (low, high, (high - low) / 7) if kind == "quniform" else (low, high))

    value = domain.draw(random.Random(seed))

    assert domain.low <= value <= domain.high
    assert domain.low <= domain.perturb(value, random.Random(seed)) <= domain.high
    if kind == "randint":
        assert isinstance(value, int)
        assert value < high


def test_listed_values_have_the_ones_beside_them_as_neighbours():
    domain = Domain("choice", (1, 2, 3))

    assert {domain.perturb(2, random.Random(n)) for n in range(20)} == {1, 3}
    assert {domain.perturb(1, random.Random(n)) for n in range(20)} == {1, 2}


def test_a_trial_is_a_function_of_seed_and_number_and_other_options_change_nothing():
    space = parse_search(["job.lr=loguniform(1e-4,1e-2)", "job.width=randint(1,100)"])
    more = {"job.kind": Domain("choice", ("a", "b")), **space}

    trials = [draw(space, 7, n) for n in range(20)]

    assert trials == [draw(space, 7, n) for n in range(20)]
    assert len({t["job.lr"] for t in trials}) == 20
    assert trials != [draw(space, 8, n) for n in range(20)]
    assert [{k: v for k, v in draw(more, 7, n).items() if k in space} for n in range(20)] == trials


def test_grids_are_gone_through_and_the_rest_is_drawn_for_each_combination():
    config = SweepConfig(
        search={"job.width": "grid(4,8,16)", "job.deep": "grid(True,False)", "job.lr": "uniform(0,1)"}, trials=2
    )

    trials = [draw(config.space, 0, n) for n in range(config.total)]

    assert config.total == 12
    assert grid_size(config.space) == 6
    pairs = [(t["job.width"], t["job.deep"]) for t in trials]
    assert pairs[:6] == [(4, True), (4, False), (8, True), (8, False), (16, True), (16, False)] == pairs[6:]
    assert len({t["job.lr"] for t in trials}) == 12


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("job.rl=uniform(0,1)", "did you mean 'job.lr'"),
        ("lr=uniform(0,1)", "no option of this job"),
        ("scaling.max-workers=choice(1,2)", "does not change what a run computes"),
        ("run.duration=choice('1ep','2ep')", "cut short themselves"),
        ("job.width=uniform(1,9)", "a whole number"),
        ("job.width=choice(1, wide)", "'wide', but --job.width is a whole number"),
        ("job.lr=choice(high)", "a number"),
        ("job.deep=choice(1,0)", "True or False"),
        ("job.kind=choice(1)", "a text"),
        ("optim.schedule=choice(cosine,linear)", "one of constant, cosine"),
        ("batch.global-size=choice(True)", "whole"),
    ],
)
def test_unknown_and_wrongly_typed_options_are_refused(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        check_names(parse_search([text]), Toy(), TrainConfig())

    assert "\n" not in str(caught.value)


def test_options_are_applied_to_job_and_configuration():
    space = parse_search(
        [
            "job.lr=choice(1)",
            "job.block=choice(None,3)",
            "batch.global-size=choice(32)",
            "optim.clip-norm=choice(2)",
            "job.deep=choice(True)",
        ]
    )
    check_names(space, Toy(), TrainConfig())

    job, config = apply(draw(space, 0, 0), Toy(), TrainConfig())

    assert (job.lr, job.deep, job.width) == (1.0, True, 8)
    assert isinstance(job.lr, float)
    assert config.batch.global_size == 32
    assert config.optim.clip_norm == 2.0
    with pytest.raises(ConfigError, match=r"--batch\.global-size is 0"):
        apply({"batch.global-size": 0}, Toy(), TrainConfig())


@pytest.mark.parametrize("text", ["eval/loss", "eval/loss>1", "eval/loss>=", "eval/loss>=low", ">=1", "eval/loss>=nan"])
def test_a_stop_rule_that_says_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="--stop is"):
        parse_stop(text)


def test_stop_rules_are_met_by_what_is_good_enough():
    most, least = parse_stop("eval/accuracy >= 0.9"), parse_stop("eval/loss<=1e-3")

    assert [most.met({"eval/accuracy": v}) for v in (0.89, 0.9, 1)] == [False, True, True]
    assert [least.met({"eval/loss": v}) for v in (1e-3, 0.1, None)] == [True, False, False]
    assert not most.met({})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "most"}, "--mode"),
        ({"scheduler": "bohb"}, "--scheduler"),
        ({"searcher": "grid"}, "--searcher"),
        ({"metric": "loss"}, "--metric"),
        ({"trials": 0}, "--trials"),
        ({"grace_period": 0}, "--grace-period"),
        ({"reduction_factor": 1}, "--reduction-factor"),
        ({"max_concurrent": 0}, "--max-concurrent"),
        ({"quantile": 0.6}, "--quantile"),
        ({"resample": -0.1}, "--resample"),
        ({"cost_budget": 0}, "--cost-budget"),
        ({"time_budget": "10st"}, "--time-budget"),
        ({"time_budget": "soon"}, "--time-budget"),
        ({"name": "a/b"}, "--sweep"),
        ({"seed": -1}, "--sweep.seed"),
        ({"stop": ("eval/loss",)}, "--stop"),
        ({"stop": ("loss<=1",)}, "--stop is 'loss<=1'; give a metric of the evaluation's"),
        ({"trials": 99_999_999_999}, "make 99999999999 trials; give at most 10000"),
        ({"search": {f"job.{n}": f"grid({','.join(map(str, range(99)))})" for n in "abcdefgh"}}, "at most 10000"),
        ({"search": {}}, "something to search"),
        ({"search": {"job.lr": "grid(1,2)"}, "searcher": "tpe"}, "cannot go through"),
        ({"scheduler": "pbt", "searcher": "tpe"}, "changes options itself"),
        ({"scheduler": "pbt", "trials": 1}, "population"),
        ({"scheduler": "pbt", "search": {"batch.global-size": "choice(1,2)"}}, "in the midst of a run"),
    ],
)
def test_what_cannot_work_together_is_refused_in_one_sentence(options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        SweepConfig(**{"search": {"job.lr": "uniform(0,1)"}, **options})

    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_sentence(text):
    try:
        parse_domain("job.lr", text)
    except ConfigError as error:
        assert "job.lr" in str(error)  # noqa: PT017
