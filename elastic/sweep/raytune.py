"""Ray Tune's controller with our searcher, our scheduler and our trial actors.

Tune starts trials, waits for their reports, restarts a trial whose process died, and pauses trials. `judge.Judge`
decides what a trial does; nothing in it depends on the order in which reports arrive.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.tune import PlacementGroupFactory, Trainable
from ray.tune.experiment import Experiment, Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import SearchGenerator
from ray.tune.search.searcher import Searcher

from elastic.compat.ray import HEAD_RESOURCE
from elastic.compat.ray_tune import (
    FixedResourceManager,
    TuneController,
    controller_of,
    make_actors_with,
    print_no_errors,
    step_again,
)
from elastic.observe.ledger import read_records
from elastic.run.host import import_store
from elastic.storage import Storage
from elastic.sweep.decide import Verdict
from elastic.sweep.judge import Judge
from elastic.sweep.trial import TrialPlan, TrialRun
from elastic.tools.sweeps import TRIALS

#: The share of the head's resource that an actor takes; it limits how many trials run at a time. Losing the head ends
#: all.
SLOT = 0.001
MAX_FAILURES = 20
REPORT = "report"  # the key of a trial's report in Tune's result
_NEVER = 10**9


class TrialActor(Trainable):
    """Drives a trial's run. `step` returns the trial's next report; the other methods may be called meanwhile."""

    plan: ClassVar[TrialPlan]

    def __init__(self, config: dict[str, Any], storage: Any = None):
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in the job are relative to the driver's folder
        super().__init__(config, storage)

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        return PlacementGroupFactory([{HEAD_RESOURCE: SLOT}])

    def setup(self, config: dict[str, Any]) -> None:
        threading.Thread(target=import_store, name="import-torch", daemon=True).start()
        self._trial = self._new_trial(config)

    def _new_trial(self, config: dict[str, Any]) -> TrialRun:
        lines = read_records(Storage(self.plan.folder_url), TRIALS)
        return TrialRun(self.plan, config["trial"], lines)

    def step(self) -> dict[str, Any]:
        report = self._trial.next()
        return {REPORT: json.dumps(report), "done": report["what"] == "ended"}  # as text, since Tune flattens dicts

    def obey(self, verdict: Verdict) -> None:
        self._trial.obey(verdict)

    def rest(self) -> None:
        self._trial.rest()

    def cleanup(self) -> None:
        self._trial.end()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Drive another trial in this process, which has imported everything."""
        self._trial.end()
        self._trial = self._new_trial(new_config)
        return True


class LeanClasses:
    """Makes actor classes without a runtime environment, with which Ray could not use processes that it started ahead,
    and which everything that a trial starts would inherit; and with threads, so that methods can be called at any
    time."""

    def __init__(self) -> None:
        self._known: dict[type, Any] = {}

    def get(self, trainable: type) -> Any:
        if trainable not in self._known:
            remote: Any = ray.remote  # its types know only some of its options
            self._known[trainable] = remote(max_concurrency=4)(trainable)
        return self._known[trainable]


class Numbers(Searcher):
    """Suggests trials to start, by their numbers."""

    def __init__(self, judge: Judge, gates: Gates):
        super().__init__()
        self._judge, self._gates = judge, gates
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        number = self._judge.start_next()
        if number is None:
            return Searcher.FINISHED if self._judge.no_more else None
        self._numbers[trial_id] = number
        return {"trial": number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            number = self._numbers[trial_id]
            why = f"its process ended more than {MAX_FAILURES} times, at last with: {self._gates.last_error(number)}"
            self._judge.broke(number, why)


class Gates(FIFOScheduler):
    """Makes trials wait at their gates until there is a verdict."""

    def __init__(self, judge: Judge, places: int):
        super().__init__()
        self._judge, self._places = judge, places
        self._trials: dict[int, Trial] = {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._trials[trial.config["trial"]] = trial

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """The trial is restarted, or the searcher is told that it failed."""

    def last_error(self, number: int) -> str:
        """The last line of the error with which a trial's process ended."""
        file = self._trials[number].error_file  # on this machine; it is copied to the sweep's storage later
        lines = Path(file).read_text().strip().splitlines() if file is not None else []
        return lines[-1].strip() if lines else "nothing"

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Does nothing: no data of the trial is kept here."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number, report = trial.config["trial"], json.loads(result[REPORT])
        if report["what"] == "resting":
            self._judge.rests(number)
            tune_controller.pause_trial(trial, should_checkpoint=False)
            return TrialScheduler.NOOP
        self._judge.resumed(number)
        running = {n for n, t in self._trials.items() if t.status == Trial.RUNNING}
        wait = self._judge.report(number, report, running, self._places)
        self._deliver(tune_controller, number)
        if wait == "hold":
            return TrialScheduler.NOOP
        if wait == "rest":
            self._notify(trial, "rest")
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._judge.ended(trial.config["trial"], json.loads(result[REPORT]))
        self._deliver(tune_controller)

    def _deliver(self, tune_controller: Any, reporting: int = -1) -> None:
        """Send new verdicts to trials that wait in memory. A trial that rests, or will, reads its verdict when
        resumed."""
        for number, verdict in self._judge.verdicts():
            trial = self._trials[number]
            if number == reporting:
                self._notify(trial, "obey", verdict)  # Tune lets it take its next step by itself
            elif self._judge.release(number):
                self._notify(trial, "obey", verdict)
                step_again(controller_of(tune_controller), trial)

    def _notify(self, trial: Trial, what: str, *arguments: Any) -> None:
        """Call a method of a trial's actor. If its process has died, the restarted trial reads what was decided."""
        getattr(trial.temporary_state.ray_actor, what).remote(*arguments)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A resting trial that has its verdict, otherwise the next new trial."""
        for number in self._judge.ready():
            if self._trials[number].status in (Trial.PENDING, Trial.PAUSED):
                return self._trials[number]
        waiting = [t for t in tune_controller.get_trials() if t.status == Trial.PENDING]
        return next(iter(waiting), None)

    def notify_all(self, controller: TuneController, what: str, *arguments: Any) -> None:
        """Call a method of every running trial; held ones take their next step, so that they act on it."""
        for number, trial in self._trials.items():
            if trial.status == Trial.RUNNING:
                self._notify(trial, what, *arguments)
                if self._judge.release(number):
                    step_again(controller, trial)


class Tuning:
    """Ray Tune's controller over our trials. `turn` it until `finished`, then `close` it.

    Args:
        places: how many trials run at a time.
        scratch: a folder on this machine for Tune's own files, which are never read again.
    """

    def __init__(self, plan: TrialPlan, judge: Judge, places: int, scratch: str):
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)  # the sweep's own folder has everything that matters
        self._judge = judge
        actor = type("TrialActor", (TrialActor,), {"plan": plan, "__module__": "__main__"})
        experiment = Experiment(
            "sweep",
            actor,
            num_samples=_NEVER,
            storage_path=scratch,
            max_failures=MAX_FAILURES,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
        )
        self._gates = Gates(judge, places)
        search = SearchGenerator(Numbers(judge, self._gates))
        self._controller = TuneController(
            search_alg=search,
            scheduler=self._gates,
            storage=experiment.storage,
            callbacks=[],
            reuse_actors=True,
            resource_manager_factory=lambda: FixedResourceManager({HEAD_RESOURCE: SLOT * (places + 0.5)}),
            checkpoint_period=_NEVER,
        )
        make_actors_with(self._controller, LeanClasses())
        print_no_errors(self._controller)
        search.add_configurations([experiment])

    @property
    def finished(self) -> bool:
        return self._controller.is_finished()

    @property
    def running(self) -> int:
        """The number of running trials."""
        return sum(t.status == Trial.RUNNING for t in self._controller.get_trials())

    def turn(self) -> None:
        """Take one turn: start trials that can be started, and take in one report; waits for it up to 0.1 s."""
        self._controller.step()

    def stop_all(self, why: str) -> None:
        """Have all running trials save and end, as stopped."""
        self._gates.notify_all(self._controller, "obey", Verdict("stop", why=why))

    def rest_all(self) -> None:
        """Have all running trials save and end, to be resumed later."""
        self._gates.notify_all(self._controller, "rest")

    def close(self) -> None:
        """End the actors."""
        self._controller.cleanup()
