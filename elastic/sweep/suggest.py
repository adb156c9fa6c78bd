"""Chooses each trial's options: drawn by seed and number, or suggested by Optuna's TPE from a fixed set of results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from elastic.errors import ConfigError
from elastic.sweep.config import SweepConfig
from elastic.sweep.space import Domain, Options, draw


class Suggester(Protocol):
    """Suggests trials in the order of their numbers."""

    def needs(self, number: int) -> range:
        """The trials that must have ended before `number` is suggested."""
        ...

    def options(self, number: int, values: Mapping[int, float | None]) -> Options:
        """The options of a trial, given the last values of the trials that it needs (None: it failed)."""
        ...


class Draws:
    """Random and grid search: no trial needs the result of another."""

    def __init__(self, config: SweepConfig):
        self._config = config

    def needs(self, number: int) -> range:
        return range(0)

    def options(self, number: int, values: Mapping[int, float | None]) -> Options:
        return draw(self._config.space, self._config.seed, number)


class Tpe:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), asked in batches.

    All trials of a batch are suggested from the results of earlier batches. So suggestions do not depend on how many
    trials run at a time, nor on which of them ends first.
    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, config: SweepConfig):
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "--searcher is 'tpe', which needs Optuna; pip install 'elastic-train[sweep]', or use random"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._config = optuna, config
        self._distributions = {name: self._distribution(domain) for name, domain in config.space.items()}
        self._study = optuna.create_study(
            direction="minimize" if config.mode == "min" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=config.seed),
        )
        self._asked: list[Any] = []
        self._reported = 0  # trials whose results Optuna has

    def _distribution(self, domain: Domain) -> Any:
        kinds = self._optuna.distributions
        if domain.listed:
            return kinds.CategoricalDistribution(domain.values)
        if domain.kind == "randint":
            return kinds.IntDistribution(int(domain.low), int(domain.high))
        step = domain.values[2] if domain.kind == "quniform" else None
        return kinds.FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform", step=step)

    def needs(self, number: int) -> range:
        return range(number - number % self._config.batch)

    def options(self, number: int, values: Mapping[int, float | None]) -> Options:
        while len(self._asked) <= number:
            for trial in range(self._reported, self.needs(len(self._asked)).stop):
                self._report(trial, values[trial])
            self._asked.append(self._study.ask(self._distributions))
        found: dict[str, Any] = self._asked[number].params
        space = self._config.space
        return {
            name: d.values[d.values.index(found[name])] if d.listed else d.clip(found[name])
            for name, d in space.items()
        }

    def _report(self, trial: int, value: float | None) -> None:
        states = self._optuna.trial.TrialState
        bad = value is None or value != value
        self._study.tell(self._asked[trial], None if bad else value, state=states.FAIL if bad else states.COMPLETE)
        self._reported = trial + 1


def suggester(config: SweepConfig) -> Suggester:
    """The suggester that the options choose."""
    return Tpe(config) if config.searcher == "tpe" else Draws(config)
