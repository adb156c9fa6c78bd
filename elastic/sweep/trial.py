"""One trial: an elastic run that goes on from gate to gate. It does not use Ray Tune.

The sweep's folder has everything that a trial is to do: its first options, and the verdicts so far. So a trial whose
process died goes on when it is created again, as a run does when it is started again by its name.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from elastic.checkpoint.reader import newest_first
from elastic.cluster.control import RunControl
from elastic.cluster.trainer import run_prepared
from elastic.config import TrainConfig
from elastic.errors import ElasticError
from elastic.job import Job
from elastic.observe.account import account
from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.run.folder import RunFolder
from elastic.run.prepare import PreparedRun, prepare
from elastic.storage import Storage
from elastic.sweep.config import StopRule
from elastic.sweep.decide import Verdict
from elastic.sweep.space import Options, apply

ADOPT_S = 600.0
END_S = 600.0


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep have in common: the job, and the configuration without the options of each trial."""

    job: Job
    config: TrainConfig
    folder_url: str
    searched: tuple[str, ...]
    stop: tuple[StopRule, ...]


@dataclass(frozen=True)
class Leg:
    """A stretch of a trial: its options, and how far it goes. `then` is a known verdict at the evaluation `gate`."""

    options: Options
    until: int
    gate: int = 0
    then: Verdict | None = None


def verdict_of(line: Mapping[str, Any]) -> Verdict:
    """The verdict in a line of trials.jsonl."""
    return Verdict(line["do"], line["until"], line["why"], line["source"], line["options"])


def next_leg(lines: list[dict[str, Any]], is_adopted: Callable[[dict[str, Any]], bool]) -> Leg:
    """The present leg of a trial, found from its lines in trials.jsonl.

    Args:
        is_adopted: whether the state that this verdict names has been taken over.
    """
    started = next(line for line in lines if line["kind"] == "started")
    leg = Leg(started["options"], started["until"])
    for line in lines:
        if line["kind"] != "verdict" or line["evaluation"] < leg.until:
            continue  # repeats an earlier verdict
        verdict = verdict_of(line)
        if verdict.do == "stop" or (verdict.do == "exploit" and not is_adopted(line)):
            return replace(leg, until=line["evaluation"], gate=line["evaluation"], then=verdict)
        leg = Leg(dict(verdict.options) if verdict.do == "exploit" else leg.options, verdict.until)  # type: ignore[arg-type]
    return leg


class TrialRun:
    """Drives the run of one trial. `next` is for one thread, all other methods for any.

    Args:
        number: of the trial; trials.jsonl has its line `started`.
    """

    def __init__(self, plan: TrialPlan, number: int, lines: list[dict[str, Any]]):
        self._plan = plan
        self._lines = [line for line in lines if line["trial"] == number]
        self._started = next(line for line in self._lines if line["kind"] == "started")
        self._names = {line["trial"]: line["run"] for line in lines if line["kind"] == "started"}
        self._name: str = self._started["run"]
        self._folder = RunFolder(self._run_storage(self._name))
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._steps = {line["evaluation"]: line["step"] for line in self._lines if line["kind"] == "report"}
        self._reported = set(self._steps)  # evaluations
        self._thread: threading.Thread | None = None
        self._control: RunControl | None = None
        self._run: PreparedRun | None = None
        self._resting = False
        self._wants: Verdict | None = None
        self._at = 0
        self._leg = Leg(self._started["options"], self._started["until"])  # replaced when `_begin` has read the folder

    def _run_storage(self, name: str) -> Storage:
        return Storage(f"{self._plan.folder_url}/{name}")

    # ---- instructions ----------------------------------------------------------------------------------------------

    def obey(self, verdict: Verdict) -> None:
        """Carry out a verdict: at the gate where the trial waits, or at any time if it is to stop."""
        with self._lock:
            if verdict.do == "go":
                self._leg = replace(self._leg, until=verdict.until)
                self._allow()
            else:
                self._wants = verdict
                if self._control is not None:
                    self._control.stop(verdict.why or verdict.do)

    def rest(self) -> None:
        """Save and end the run at its next step boundary; it will be resumed later."""
        with self._lock:
            self._resting = True
            if self._control is not None:
                self._control.stop("the trial rests")

    def end(self) -> None:
        """Rest, and wait until the run has ended."""
        self.rest()
        if self._thread is not None:
            self._thread.join(END_S)

    # ---- reports ---------------------------------------------------------------------------------------------------

    def next(self) -> dict[str, Any]:
        """Wait for the next report: of an evaluation, of resting, or of the trial's end."""
        try:
            if self._run is None and (over := self._begin()) is not None:
                return self._over(over)
            while True:
                event = self._events.get()
                if event["what"] == "evaluated":
                    report = self._on_evaluation(event)
                    if report is not None:
                        return report
                    continue
                assert self._thread is not None
                self._thread.join()
                wants = self._wants
                if wants is not None and wants.do == "exploit" and "error" not in event and not self._resting:
                    self._take_over(wants, self._at)
                    continue
                return self._over(event)
        except ElasticError as error:
            return self._over({"what": "ended", "error": str(error)})

    def _on_evaluation(self, event: dict[str, Any]) -> dict[str, Any] | None:
        evaluation = event["evaluation"]
        with self._lock:
            self._at = evaluation
            self._steps[evaluation] = event["step"]
            known = self._leg.then if evaluation == self._leg.gate else None
        if known is not None:
            self.obey(known)
        elif evaluation < self._total and any(rule.met(event["metrics"]) for rule in self._plan.stop):
            rule = next(rule for rule in self._plan.stop if rule.met(event["metrics"]))
            self.obey(Verdict("stop", why=f"good enough: {rule}"))
        else:
            with self._lock:
                self._allow()
        waits = self._wants is None and self._leg.until <= evaluation < self._total
        if evaluation in self._reported and not waits:
            return None
        self._reported.add(evaluation)
        figures = {key: event[key] for key in ("evaluation", "step", "metrics")}
        return {"what": "report", **figures, "waits": waits, "cost": self._cost()}

    def _over(self, event: dict[str, Any]) -> dict[str, Any]:
        if "error" in event:
            return {"what": "ended", "status": "failed", "message": event["error"], **self._figures({})}
        result = event["result"]
        rests = self._resting and (self._wants is None or self._wants.do == "exploit")
        if rests and result["status"] != "finished":
            return {"what": "resting"}
        why = self._wants.why if self._wants is not None and result["status"] != "finished" else ""
        return {"what": "ended", "status": result["status"], "message": why, **self._figures(result)}

    def _figures(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The result of a trial, over all its legs and commands."""
        ends = [e for e in self._ledger() if e["kind"] in ("run_finished", "run_failed")]
        metrics = {k: v for k, v in result.get("metrics", {}).items() if k.startswith("eval/")}
        return {
            "step": result.get("steps", self._steps.get(self._at, 0)),
            "metrics": metrics,
            "weights_sha256": result.get("weights_sha256"),
            "seconds": round(sum(e.get("seconds") or 0.0 for e in ends), 3),
            "cost": self._cost(),
        }

    def _cost(self) -> float | None:
        """The cost so far, by the prices in the ledger; None without a price."""
        cost = account((), self._ledger()).cost
        return None if cost is None else round(cost, 6)

    def _ledger(self) -> list[dict[str, Any]]:
        return read_records(self._folder.storage, EVENTS)

    # ---- legs ------------------------------------------------------------------------------------------------------

    def _begin(self) -> dict[str, Any] | None:
        """Go on where the trial stands; returns its end if only that was left to report."""
        from elastic.tools.adopting import adopted

        def is_adopted(line: dict[str, Any]) -> bool:
            step = self._steps[line["evaluation"]]
            return adopted(self._folder.storage, step, f"{self._plan.folder_url}/{self._names[line['source']]}")

        self._leg = next_leg(self._lines, is_adopted)
        then, newest = self._leg.then, next(newest_first(self._folder.storage), None)
        reached = newest is not None and newest.step >= self._steps.get(self._leg.gate, 1 << 62)
        if then is not None and then.do == "exploit" and reached:  # it is at the gate, but has not taken over the state
            self._take_over(then, self._leg.gate)
            return None
        result = self._folder.result()
        if then is not None and then.do == "stop" and result is not None and result["status"] == "stopped" and reached:
            self._wants = then
            return {"what": "ended", "result": result}
        self._go()
        return None

    def _take_over(self, verdict: Verdict, gate: int) -> None:
        """Begin the next leg from another trial's state."""
        from elastic.tools.adopting import adopt  # it imports torch, which the sweep's driver does without

        source = RunFolder(self._run_storage(self._names_of(verdict.source)))
        adopt(self._folder, source, self._steps[gate], timeout_s=ADOPT_S)
        with self._lock:
            self._wants = None
            self._leg = Leg(dict(verdict.options), verdict.until)  # type: ignore[arg-type]
        self._go()

    def _names_of(self, number: int) -> str:
        return self._names.get(number) or f"{self._name.rpartition('-')[0]}-{number:04d}"

    def _prepared(self) -> PreparedRun:
        plan = self._plan
        job, config = apply(self._leg.options, plan.job, plan.config)
        run = replace(config.run, name=self._name, storage=plan.folder_url, take_over=True, allow_change=plan.searched)
        return prepare(job, replace(config, run=run))

    def _go(self) -> None:
        self._run = run = self._prepared()
        every, total_steps = run.plan.eval_every or run.plan.total_steps, run.plan.total_steps
        self._every, self._total = every, (total_steps - 1) // every + 1
        newest = next(newest_first(self._folder.storage), None)
        done = 0 if newest is None else newest.step // every
        self._send_history(done, 0 if newest is None else newest.step)
        control = RunControl(self._on_record)
        with self._lock:
            self._control = control
            self._allow()
            if self._resting or self._wants is not None:
                control.stop("the trial rests" if self._wants is None else self._wants.why)
        self._thread = threading.Thread(target=self._drive, args=(run, control), name="trial-run", daemon=True)
        self._thread.start()

    def _send_history(self, done: int, step: int) -> None:
        """Report the last evaluation again if the run waits after it; earlier ones are not repeated."""
        if not done or step % self._every or done >= self._total:
            return
        rows = read_records(self._folder.storage, METRICS)
        found = next((r for r in reversed(rows) if r["step"] == step and "sample_hash" not in r), None)
        if found is not None:
            self._on_record(found)

    def _allow(self) -> None:
        """Let the run go on to the end of its leg; with stop rules, only to its next evaluation."""
        if self._control is None or self._run is None:
            return
        until = min(self._leg.until, self._at + 1) if self._plan.stop else self._leg.until
        self._control.allow(self._run.plan.total_steps if until >= self._total else until * self._every)

    def _drive(self, run: PreparedRun, control: RunControl) -> None:
        try:
            result = run_prepared(run, control)
            self._events.put({"what": "ended", "result": result})
        except ElasticError as error:
            self._events.put({"what": "ended", "error": str(error)})
        except BaseException:  # the trial has failed, and `next` waits for its end
            self._events.put({"what": "ended", "error": traceback.format_exc()})

    def _on_record(self, record: dict[str, Any]) -> None:
        """Called on a thread of the run."""
        if "kind" in record or "sample_hash" in record:
            return
        step = record["step"]
        metrics = {k: v for k, v in record.items() if k.startswith("eval/")}
        if not metrics or (step % self._every and step != self._run_total):
            return
        evaluation = self._total if step == self._run_total else step // self._every
        self._events.put({"what": "evaluated", "evaluation": evaluation, "step": step, "metrics": metrics})

    @property
    def _run_total(self) -> int:
        assert self._run is not None
        return self._run.plan.total_steps
