"""The decisions of a running sweep: which trial is next, which waits for which, and what is recorded.

Every decision is in trials.jsonl before anything acts on it, so a new judge goes on where the last one ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import asdict
from typing import Any, Literal

from elastic.sweep.config import SweepConfig
from elastic.sweep.decide import Hyperband, Missing, NoRule, OrderedAsha, Population, Results, Rule, Verdict
from elastic.sweep.folder import SweepFolder
from elastic.sweep.suggest import Suggester, suggester

Wait = Literal["", "hold", "rest"]


def rule_of(config: SweepConfig, total: int) -> Rule:
    """The rule by which trials of `total` evaluations go on or end early."""
    if config.scheduler == "asha":
        return OrderedAsha(config.grace_period, config.reduction_factor, total)
    if config.scheduler == "hyperband":
        return Hyperband(config.grace_period, config.reduction_factor, total, config.total)
    if config.scheduler == "pbt":
        return Population(
            config.space,
            config.perturbation_interval,
            total,
            config.total,
            quantile=config.quantile,
            resample=config.resample,
            seed=config.seed,
        )
    return NoRule(total)


class Judge:
    """All methods are for one thread.

    Args:
        total: the number of evaluations of a complete trial.
        print_line: prints a line on the console.
    """

    def __init__(self, config: SweepConfig, folder: SweepFolder, total: int, print_line: Callable[[str], None]):
        self._config, self._folder, self._print = config, folder, print_line
        self._results = Results(total)
        self._rule = rule_of(config, total)
        self._suggester: Suggester = suggester(config)
        self._values: dict[int, float | None] = {}
        self._names: dict[int, str] = {}
        self._waiting: dict[int, int] = {}  # trials that wait for a verdict, with their gate
        self._held: set[int] = set()  # waiting trials that keep their state in memory
        self._resting: set[int] = set()  # waiting trials that saved their state and freed their workers
        self._made: list[tuple[int, Verdict]] = []
        self._costs: dict[int, float] = {}
        self._to_start = list(range(config.total))
        self.refused = ""  # why no trial can be judged
        self.no_more = False  # no further trial is started
        self.closing = False  # nor does a resting trial go on
        for trial in folder.trials(config.metric, config.mode):
            self._names[trial.number] = trial.run
            for report in trial.reports:
                value = report["metrics"].get(config.metric)
                self._results.report(trial.number, report["evaluation"], value, config.mode)
            if any(v["do"] == "stop" for v in trial.verdicts):
                self._results.end(trial.number)
            if trial.status != "running":
                self._results.end(trial.number)
                self._values[trial.number] = None if trial.status == "failed" else trial.value
                self._to_start.remove(trial.number)
            self._costs[trial.number] = trial.cost or 0.0

    # ---- trials ----------------------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """The number of trials that have not ended."""
        return self._config.total - len(self._values)

    @property
    def cost(self) -> float:
        """The cost of all trials so far, as far as they have reported it."""
        return sum(self._costs.values())

    def start_next(self) -> int | None:
        """The number of the next trial to start, or to resume after an interruption; None: not now, or no more."""
        if not self._to_start or self.closing:
            self.no_more = True
            return None
        number = self._to_start[0]
        if any(needed not in self._values for needed in self._suggester.needs(number)):
            return None
        self._to_start.pop(0)
        if number not in self._names:
            options = self._suggester.options(number, self._values)
            self._names[number] = name = f"{self._config.name}-{number:04d}"
            self._folder.note(number, "started", run=name, options=options, until=self._rule.first(number))
            self._print(f"{name} starts with {options_text(options)}")
        return number

    def report(self, number: int, reported: dict[str, Any], running: Set[int], places: int) -> Wait:
        """A trial reports an evaluation.

        Args:
            running: the trials that run now, of which there may be `places`.

        Returns:
            whether it has to wait for a verdict: "hold", with its state in memory, if all trials that it waits for run
            or can be started; "rest" if another trial needs its workers.
        """
        evaluation, value = reported["evaluation"], reported["metrics"].get(self._config.metric)
        self._refuse_unknown(reported["metrics"])
        if self._results.score(number, evaluation) is None:
            self._results.report(number, evaluation, value, self._config.mode)
            self._folder.note(
                number,
                "report",
                evaluation=evaluation,
                step=reported["step"],
                metrics=reported["metrics"],
                cost=reported["cost"],
            )
        if reported["cost"] is not None:
            self._costs[number] = reported["cost"]
        if reported["waits"]:
            self._waiting[number] = evaluation
        self._judge_all()
        if number not in self._waiting:
            return ""
        verdict = self._rule.judge(self._results, number, evaluation)
        assert isinstance(verdict, Missing)
        if len(verdict.trials - running) > places - len(running):
            return "rest"
        self._held.add(number)
        return "hold"

    def _refuse_unknown(self, metrics: Mapping[str, Any]) -> None:
        """Refuse metrics that evaluations do not have. A value that is not finite is None, but it is there."""
        rules = ((rule.metric, f"--stop is '{rule}'") for rule in self._config.stop_rules)
        for name, given in ((self._config.metric, f"--metric is {self._config.metric!r}"), *rules):
            if name not in metrics:
                known = ", ".join(sorted(metrics))
                self.refused = (
                    self.refused
                    or f"{given}, but evaluations have {known}; give one of these, with another --sweep.name"
                )

    def release(self, number: int) -> bool:
        """End the hold of a trial; returns whether it was held."""
        held = number in self._held
        self._held.discard(number)
        return held

    def rests(self, number: int) -> None:
        """A waiting trial has saved its state and ended its run."""
        self._resting.add(number)

    def ended(self, number: int, outcome: dict[str, Any]) -> None:
        """A trial has ended by itself."""
        self._results.end(number)
        self._waiting.pop(number, None)
        self._held.discard(number)
        self._resting.discard(number)
        value = outcome["metrics"].get(self._config.metric)
        self._values[number] = None if outcome["status"] == "failed" else value
        self._costs[number] = outcome["cost"] or self._costs.get(number, 0.0)
        self._folder.note(number, "ended", **{k: v for k, v in outcome.items() if k != "what"})
        shown = "" if value is None else f", {self._config.metric} {value:.6g}"
        why = f": {outcome['message'].splitlines()[-1]}" if outcome["message"] else ""
        self._print(f"{self._names[number]} {outcome['status']} after step {outcome['step']}{shown}{why}")
        self._judge_all()

    def broke(self, number: int, message: str) -> None:
        """A trial could not be completed."""
        nothing: dict[str, Any] = {"step": 0, "metrics": {}, "weights_sha256": None, "seconds": 0.0, "cost": None}
        self.ended(number, {"status": "failed", "message": message, **nothing})

    def give_up(self, why: str) -> None:
        """The sweep ends early: end the resting trials, whose state is saved, and those that were never started."""
        for trial in self._folder.trials(self._config.metric, self._config.mode):
            number = trial.number
            if number in self._values:
                continue
            metrics = trial.reports[-1]["metrics"] if trial.reports else {}
            figures = {
                "step": trial.step,
                "metrics": metrics,
                "weights_sha256": None,
                "seconds": 0.0,
                "cost": trial.cost,
            }
            self.ended(number, {"status": "stopped", "message": why, **figures})

    # ---- verdicts --------------------------------------------------------------------------------------------------

    def _judge_all(self) -> None:
        """Judge waiting trials until no verdict is new: one verdict may be what another one waits for."""
        changed = True
        while changed:
            changed = False
            for number in sorted(self._waiting):
                gate = self._waiting[number]
                verdict = self._rule.judge(self._results, number, gate)
                if isinstance(verdict, Missing):
                    continue
                del self._waiting[number]
                changed = True
                self._folder.note(number, "verdict", evaluation=gate, **asdict(verdict))
                if verdict.do == "stop":
                    self._results.end(number)
                if verdict.do == "exploit":
                    self._print(
                        f"{self._names[number]} takes over {self._names[verdict.source]}, with "
                        f"{options_text(verdict.options)}"
                    )
                self._made.append((number, verdict))

    def verdicts(self) -> list[tuple[int, Verdict]]:
        """The verdicts since the last call."""
        made, self._made = self._made, []
        return made

    def ready(self) -> list[int]:
        """Resting trials that have their verdict and may go on."""
        return [] if self.closing else sorted(n for n in self._resting if n not in self._waiting)

    def resumed(self, number: int) -> None:
        """A resting trial was started again."""
        self._resting.discard(number)


def options_text(options: Any) -> str:
    """Options as one would type them."""
    return " ".join(f"--{name} {value}" for name, value in options.items())
