"""The options of a sweep: its search space, how trials are chosen and ended early, and when the sweep ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic.errors import ConfigError
from elastic.sections.training import RUN_NAME
from elastic.sweep.space import Domain, grid_size, parse_search
from elastic.units import parse_amount

SCHEDULERS = ("none", "asha", "hyperband", "pbt")
SEARCHERS = ("random", "tpe")
_STOP = re.compile(r"^\s*([A-Za-z][\w./-]*)\s*(>=|<=)\s*(\S+)\s*\Z")
DEFAULT_TRIALS, MOST_TRIALS = 10, 10_000


@dataclass(frozen=True)
class StopRule:
    """A trial is good enough when `metric` is at least (`>=`) or at most (`<=`) `value`."""

    metric: str
    sign: Literal[">=", "<="]
    value: float

    def met(self, metrics: Mapping[str, Any]) -> bool:
        found = metrics.get(self.metric)
        if not isinstance(found, (int, float)):
            return False
        return found >= self.value if self.sign == ">=" else found <= self.value

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.value:g}"


def parse_stop(text: str) -> StopRule:
    """Parse `metric>=value` or `metric<=value`.

    Raises:
        ConfigError: the text has neither form.
    """
    match = _STOP.match(text)
    try:
        value = float(match[3]) if match else float("nan")
    except ValueError:
        value = float("nan")
    if match is None or value != value:
        raise ConfigError(f"--stop is {text!r}; give METRIC>=NUMBER or METRIC<=NUMBER, such as eval/accuracy>=0.99")
    return StopRule(match[1], ">=" if match[2] == ">=" else "<=", value)


@dataclass(frozen=True)
class SweepConfig:
    """All options of a sweep.

    Args:
        search: the space: a `Domain` or the text `KIND(values)` for each option, by its name.
        metric: a metric of the evaluation, such as `eval/loss`; `mode` says whether less or more is better.
        trials: their number; with grids, that for each combination. None: 10, or 1 for each combination.
        scheduler: none, asha, hyperband or pbt.
        searcher: random (which includes grids), or tpe.
        grace_period: evaluations that every trial gets (asha, hyperband).
        reduction_factor: at a rung one of so many trials goes on (asha, hyperband).
        perturbation_interval: evaluations between two comparisons of the population (pbt).
        quantile: share of the population that is replaced by copies of the same share of the best (pbt).
        resample: share of values that are drawn again instead of changed a little (pbt).
        batch: number of trials that are suggested from the same results (tpe).
        stop: rules that end a trial when it is good enough.
        max_concurrent: trials at a time; None for as many as the cluster has resources for.
        time_budget: after it no trial is started, and running ones are saved and ended (s, min, h).
        cost_budget: the same for the cost of all trials, by --observe.price.
        seed: of everything that is drawn.
        name: of the sweep; an explicit name resumes a sweep that was interrupted.
        plots: write PNGs if matplotlib is installed.
        take_over: resume a sweep although another driver seems alive.

    Raises:
        ConfigError: an option, or a combination of options, that cannot work.
    """

    search: Mapping[str, Domain | str]
    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"
    trials: int | None = None
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = "none"
    searcher: Literal["random", "tpe"] = "random"
    grace_period: int = 1
    reduction_factor: int = 3
    perturbation_interval: int = 1
    quantile: float = 0.25
    resample: float = 0.25
    batch: int = 4
    stop: tuple[str, ...] = ()
    max_concurrent: int | None = None
    time_budget: str | None = None
    cost_budget: float | None = None
    seed: int = 0
    name: str | None = None
    plots: bool = True
    take_over: bool = False
    space: dict[str, Domain] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.search, Mapping):
            raise ConfigError(f"search is {self.search!r}; give KIND(values) by the name of the option")
        for name, domain in self.search.items():
            if not isinstance(domain, (str, Domain)):
                raise ConfigError(
                    f"search has a {type(domain).__name__} for {name!r}; give KIND(values), such as 'choice(1, 2)'"
                )
        if isinstance(self.stop, str):
            raise ConfigError(f"stop is {self.stop!r}; give a tuple of rules: ({self.stop!r},)")
        texts = {name: domain for name, domain in self.search.items() if isinstance(domain, str)}
        parsed = parse_search(texts) if texts or not self.search else {}
        space = {name: parsed[_plain(name)] if name in texts else domain for name, domain in self.search.items()}
        object.__setattr__(self, "space", {_plain(name): domain for name, domain in space.items()})
        self._check_choices()
        self._check_numbers()
        self._check_together()

    def _check_choices(self) -> None:
        for name, value, choices in (
            ("--mode", self.mode, ("min", "max")),
            ("--scheduler", self.scheduler, SCHEDULERS),
            ("--searcher", self.searcher, SEARCHERS),
        ):
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if not self.metric.startswith("eval/"):
            raise ConfigError(f"--metric is {self.metric!r}; give one of the evaluation's, such as eval/loss")
        if self.name is not None and (not RUN_NAME.match(self.name) or ".." in self.name):
            raise ConfigError(
                f"--sweep.name is {self.name!r}; use 1 to 100 letters, digits, dots, dashes and underscores, starting "
                "with a letter or digit"
            )

    def _check_numbers(self) -> None:
        for name, whole, least in (
            ("--trials", self.trials, 1),
            ("--grace-period", self.grace_period, 1),
            ("--reduction-factor", self.reduction_factor, 2),
            ("--max-concurrent", self.max_concurrent, 1),
            ("--perturbation-interval", self.perturbation_interval, 1),
            ("--tpe-batch", self.batch, 1),
            ("--sweep.seed", self.seed, 0),
        ):
            if whole is not None and (not isinstance(whole, int) or isinstance(whole, bool) or whole < least):
                raise ConfigError(f"{name} is {whole!r}; give a whole number of at least {least}")
        for name, share, most in (("--quantile", self.quantile, 0.5), ("--resample", self.resample, 1.0)):
            if not 0 <= share <= most:
                raise ConfigError(f"{name} is {share!r}; give a share from 0 to {most:g}")
        if self.cost_budget is not None and not self.cost_budget > 0:
            raise ConfigError(f"--cost-budget is {self.cost_budget!r}; give an amount above 0")
        if self.time_budget is not None and not parse_amount("--time-budget", self.time_budget, clock=True).is_clock:
            raise ConfigError(f"--time-budget is {self.time_budget!r}; give a time in s, min or h")
        for text in self.stop:
            if not parse_stop(text).metric.startswith("eval/"):
                raise ConfigError(f"--stop is {text!r}; give a metric of the evaluation's, such as eval/loss<=0.1")
        if self.total > MOST_TRIALS:
            raise ConfigError(
                f"--trials and grids make {self.total} trials; give at most {MOST_TRIALS}, with fewer or shorter grids"
            )

    def _check_together(self) -> None:
        grids = [name for name, domain in self.space.items() if domain.kind == "grid"]
        if self.searcher == "tpe" and grids:
            raise ConfigError(f"--search {grids[0]} is a grid, which --searcher tpe cannot go through; use choice")
        if self.scheduler != "pbt":
            return
        if self.searcher == "tpe":
            raise ConfigError("--searcher is 'tpe', but --scheduler pbt changes options itself; use random")
        if self.total < 2:
            raise ConfigError(f"--trials is {self.total}, but --scheduler pbt needs a population; give at least 2")
        for name in self.space:
            if not name.startswith(("job.", "optim.")):
                raise ConfigError(
                    f"--search names {name!r}, but --scheduler pbt changes options in the midst of a run, which must "
                    "then be of job.* or optim.*; use another scheduler"
                )

    @property
    def total(self) -> int:
        """The number of trials."""
        points = grid_size(self.space)
        per_point = self.trials if self.trials is not None else (1 if points > 1 else DEFAULT_TRIALS)
        return points * per_point

    @property
    def stop_rules(self) -> tuple[StopRule, ...]:
        return tuple(parse_stop(text) for text in self.stop)

    @property
    def time_budget_s(self) -> float | None:
        budget = self.time_budget
        return None if budget is None else parse_amount("--time-budget", budget, clock=True).seconds

    def fixed(self) -> dict[str, Any]:
        """Options that decide which trials there are and how far they go, as JSON values; they never change."""
        return {
            "search": {name: str(domain) for name, domain in self.space.items()},
            "metric": self.metric,
            "mode": self.mode,
            "trials": self.total,
            "scheduler": self.scheduler,
            "searcher": self.searcher,
            "grace-period": self.grace_period,
            "reduction-factor": self.reduction_factor,
            "perturbation-interval": self.perturbation_interval,
            "quantile": self.quantile,
            "resample": self.resample,
            "tpe-batch": self.batch,
            "stop": list(map(str, self.stop_rules)),
            "seed": self.seed,
        }


def _plain(name: str) -> str:
    return name.strip().removeprefix("--").replace("_", "-")
