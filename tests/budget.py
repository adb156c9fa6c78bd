"""What a run of the tests cost, by mark, beside what it may cost: tests/budget.toml."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "budget.toml"
MARKS = ("ray", "processes")


class Budget:
    """A plugin of the process that gathers the reports. Where the variable CI is set, what is over fails the run."""

    def __init__(self) -> None:
        allowed = tomllib.loads(FILE.read_text())
        self._allowed: dict[str, float] = allowed["seconds"]
        self._may_skip: dict[str, str] = allowed["skips"]
        self._spent = dict.fromkeys(self._allowed, 0.0)
        self._skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kind = next((mark for mark in MARKS if mark in report.keywords), "fast")
        self._spent[kind] += report.duration
        if report.skipped and not hasattr(report, "wasxfail") and report.nodeid not in self._may_skip:
            self._skipped.append(report.nodeid)

    def over(self) -> list[str]:
        """One sentence for each thing that is over the budget."""
        dear = [k for k, seconds in self._spent.items() if seconds > self._allowed[k]]
        found = [f"tests of kind {k} took {self._spent[k]:.0f} s, and may take {self._allowed[k]:.0f} s" for k in dear]
        return found + [f"{test} was skipped, and is not among those that may be" for test in self._skipped]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over() and "CI" in os.environ and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not any(self._spent.values()):
            return
        spent = ", ".join(f"{k} {seconds:.0f} of {self._allowed[k]:.0f} s" for k, seconds in self._spent.items())
        terminalreporter.write_line(f"spent: {spent}")
        for sentence in self.over():
            terminalreporter.write_line(f"over budget: {sentence}", red="CI" in os.environ)
