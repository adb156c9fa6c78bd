"""The job's own code, where the command calls it before any worker: a sentence, then lines of the user's files."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import pytest

import elastic
from elastic.command import run
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job_file import load_job
from elastic.options import parse
from elastic.run.prepare import prepare
from tests.forked import configure
from tests.tiny_jobs import Plain

JOB = """
import dataclasses, json, elastic
class Data:
    def __init__(self, how): self.how = how
    def __getitem__(self, i): return i
    def __len__(self): return int("many") if self.how == "length" else 100
@dataclasses.dataclass
class Mine(elastic.Job):
    how: str = ""
    lr: float = 0.0
    def __post_init__(self): assert self.how != "made" or self.lr > 0, "lr must be above 0"
    def model(self): pass
    def optimizer(self, model): pass
    def loss(self, model, batch): pass
    def train_data(self):
        if self.how == "library": json.loads("{")
        if self.how == "cause":
            try: {}["a"]
            except KeyError as error: raise ValueError("no a") from error
        if self.how == "interrupted": raise KeyboardInterrupt
        return Data(self.how)
    def eval_data(self): return nothing if self.how == "held out" else None
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The class of a job in a file of its own, which is in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(JOB)
    specification = importlib.util.spec_from_file_location("mine", "mine.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "mine", module)
    specification.loader.exec_module(module)
    return module.Mine


@pytest.mark.parametrize(
    ("how", "code", "sentence"),
    [
        (
            "library",
            2,
            "error: train_data() failed, JSONDecodeError: Expecting property name enclosed in double quotes",
        ),
        ("cause", 2, "error: train_data() failed, ValueError: no a (mine.py, line 19)"),
        ("interrupted", 130, "train_data() was interrupted, before anything was started"),
        ("held out", 2, "error: eval_data() failed, NameError: name 'nothing' is not defined (mine.py, line 22)"),
        ("made", 2, "error: Mine() failed, AssertionError: lr must be above 0 (mine.py, line 11)"),
        ("length", 2, "error: the length of what train_data() returned failed, ValueError: invalid literal for int()"),
    ],
)
def test_what_a_job_raises_in_the_command_is_one_sentence_and_the_user_s_own_lines(how, code, sentence, mine, capsys):
    assert run(mine, TrainConfig(), ["--job.how", how, "--dry-run"]) == code

    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith(sentence)
    frames = [line for line in rest if line.startswith("  File ")]
    assert len(frames) == {"interrupted": 0, "cause": 2}.get(how, 1)
    assert all("mine.py" in line for line in frames), "nothing of this package, of Python or of a library"
    if how == "cause":
        assert "The above exception was the direct cause of the following exception:" in rest


def test_a_job_checks_the_options_that_were_given_and_not_its_defaults(mine):
    job, _ = parse(mine, TrainConfig(), ["--job.how", "made", "--job.lr", "0.5"])

    assert (job.how, job.lr) == ("made", 0.5)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "late.py",
            "import elastic\n1 / 0",
            r"^running late.py, the file of --job, failed, ZeroDivisionError: .* \(late",
        ),
        (
            "late",
            "import no_such_thing",
            r"^importing late, the module of --job, failed, ModuleNotFoundError: .*line 1\)",
        ),
        (
            "late",
            "import broken",
            r"^importing late, the module of --job, failed, SyntaxError: .* \(broken.py, line 2\)",
        ),
        ("nowhere", "", r"^--job is 'nowhere', which cannot be imported \(there is no such module\)"),
        ("a.b", "", r"^--job is 'a.b', which cannot be imported \(No module named 'a'\)"),
        ("late.py", "import elastic\nelastic.main(3)", r"^elastic.main was given an instance of int, which is no job"),
    ],
)
def test_a_file_or_module_that_fails_when_it_is_read_is_named(name, text, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    (tmp_path / "late.py").write_text(text)
    (tmp_path / "broken.py").write_text("\ndef\n")

    with pytest.raises(ConfigError, match=sentence):
        load_job(name)
    sys.modules.pop("late", None)


@dataclasses.dataclass
class Unset(Plain):
    needed: int = dataclasses.field(kw_only=True)


class Unknown(Plain):
    extra: Nowhere = 3  # noqa: F821 - nobody knows it


class Lossless(elastic.Job):
    model = optimizer = train_data = Plain.model


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (Unset, "Unset needs a default for every option, and 'needed' has none"),
        (Unknown, "reading the annotations of Unknown failed, NameError: name 'Nowhere' is not defined"),
        (Lossless, "Lossless needs a loss(model, batch) method"),
        (Plain(), "elastic.main was given an instance of Plain; give the class: elastic.main(Plain)"),
        (dict, "elastic.main was given the class dict, which is no job; give a class derived from elastic.Job"),
    ],
)
def test_what_is_no_job_is_refused_by_the_command(job, sentence, capsys):
    assert run(job, TrainConfig(), ["--dry-run"]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda config: prepare(object(), config), "an instance of object was given as the job; give an instance of a"),
        (lambda config: prepare(Plain, config), "the class Plain was given as the job; give an instance: Plain()"),
        (lambda config: prepare(Plain(), {}), "a dict was given as the configuration; give an elastic.TrainConfig"),
        (lambda config: TrainConfig(run={"seed": 3}), "run is a dict; give elastic.RunOptions(...)"),
        (lambda config: elastic.SweepConfig({"job.lr": [1, 2]}), "search has a list for 'job.lr'; give KIND(values)"),
        (lambda config: elastic.SweepConfig(3), "search is 3; give KIND(values) by the name of the option"),
        (
            lambda config: elastic.SweepConfig({"job.lr": "choice(1,2)"}, stop="eval/loss<=1"),
            "stop is 'eval/loss<=1'; give a tuple of rules: ('eval/loss<=1',)",
        ),
    ],
)
def test_what_python_s_callers_get_wrong_is_one_sentence(call, sentence, tmp_path):
    with pytest.raises(ConfigError) as refused:
        call(configure(tmp_path, "run"))
    assert str(refused.value).startswith(sentence)
