"""The command line of a job: two help pages, one sentence for what cannot be."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from elastic import Job
from elastic.command import run
from elastic.config import BatchOptions, RunOptions, TrainConfig
from elastic.errors import ConfigError
from elastic.options import help_text, list_options, parse
from elastic.worker.__main__ import main as worker
from tests.tiny_jobs import CONFIG, Plain

COMMON = [
    "--run.name",
    "--run.storage",
    "--run.duration",
    "--run.stop-after",
    "--run.seed",
    "--run.exactness",
    "--batch.global-size",
    "--batch.microbatches",
    "--precision.autocast",
    "--scaling.min-workers",
    "--scaling.max-workers",
    "--scaling.accelerator",
    "--parallel.strategy",
    "--eval.every",
    "--checkpoint.every",
    "--dry-run",
]


def _options_shown(page: str) -> list[str]:
    return [line.split()[0] for line in page.splitlines() if line.startswith("  --")]


# ---- help ------------------------------------------------------------------------------------------------------


def test_the_short_help_has_the_job_s_own_options_and_sixteen_of_every_job():
    own = [f"--job.{f.name}".replace("_", "-") for f in dataclasses.fields(Plain)]

    shown = _options_shown(help_text(Plain, CONFIG, everything=False))

    assert len(COMMON) == 16
    assert shown == [*own, *COMMON, "--config", "--help-all"]


def test_the_long_help_has_every_option_of_every_part():
    shown = _options_shown(help_text(Plain, CONFIG, everything=True))

    for part in dataclasses.fields(TrainConfig):
        section = getattr(CONFIG, part.name)
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                assert f"--{part.name}.{field.name}".replace("_", "-") in shown
    assert {"--dry-run", "--config"} <= set(shown)
    assert len(shown) == len(set(shown)) == len(list(list_options(Plain, CONFIG))) + 1


def test_help_says_what_an_option_does_what_it_takes_and_the_job_s_own_default():
    page = help_text(Plain, CONFIG, everything=False)

    assert "Plain: A small network, the same in every mode." in page
    assert "  --job.lr NUMBER" in page
    assert "learning rate [0.01]" in page
    assert "  --run.exactness fast|bitwise" in page
    assert "[30]" in next(line for line in page.splitlines() if "--batch.global-size" in line)
    assert "[64]" not in page


@pytest.mark.parametrize(("flag", "missing"), [("--help", "--run.on-nonfinite"), ("-h", "--data.workers")])
def test_help_is_printed_and_ends_well(capsys, flag, missing):
    with pytest.raises(SystemExit) as ended:
        parse(Plain, CONFIG, [flag])

    page = capsys.readouterr().out
    assert ended.value.code == 0
    assert "--run.name" in page
    assert missing not in page


def test_the_long_help_is_printed_and_ends_well(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Plain, CONFIG, ["--help-all"])

    assert ended.value.code == 0
    assert "--run.on-nonfinite stop|skip" in capsys.readouterr().out


# ---- values ----------------------------------------------------------------------------------------------------


def test_without_options_the_job_s_configuration_stands():
    assert parse(Plain, CONFIG, []) == (Plain(), CONFIG)


def test_options_of_the_job_and_of_every_part_are_taken():
    line = (
        "--job.lr 0.5 --run.name a1 --run.stop-after 3min --run.take-over --run.allow-change run.seed job.lr "
        "--batch.global-size 64 --batch.microbatches 16 --optim.clip-norm None --eval.every=2ep --data.workers 2 "
        "--scaling.workers-per-node 4 --no-observe.tensorboard --dry-run"
    )

    job, config = parse(Plain, CONFIG, line.replace("--no-observe.tensorboard", "--observe.no-tensorboard").split())

    assert job == Plain(lr=0.5)
    assert config.run == replace(
        CONFIG.run, name="a1", stop_after="3min", take_over=True, allow_change=("run.seed", "job.lr")
    )
    assert config.batch == BatchOptions(global_size=64, microbatches=16)
    assert config.optim == replace(CONFIG.optim, clip_norm=None)
    assert (config.eval.every, config.data.workers, config.scaling.workers_per_node) == ("2ep", 2, 4)
    assert config.observe.tensorboard is False
    assert config.dry_run is True


def test_underscores_are_as_good_as_dashes():
    assert parse(Plain, CONFIG, ["--batch.global_size", "60"])[1].batch.global_size == 60


def test_a_job_that_is_no_dataclass_has_no_options_of_its_own():
    class Bare(Job):
        """Nothing to set."""

    job, config = parse(Bare, TrainConfig(), ["--run.seed", "3"])

    assert type(job) is Bare
    assert config == TrainConfig(run=RunOptions(seed=3))
    assert "--job." not in help_text(Bare, TrainConfig(), everything=True)


# ---- what cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--run.sed", "3"], "--run.seed"),
        (["--seed", "3"], "--run.seed"),
        (["--job.widht", "3"], "--job.width"),
        (["--checkpoint.evry", "3st"], "--checkpoint.every"),
        (["--scaling.max-worker", "3"], "--scaling.max-workers"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_that_there_is(argv, nearest):
    with pytest.raises(ConfigError, match=f"^{argv[0]} is no option; did you mean {nearest}( or |\\?)"):
        parse(Plain, CONFIG, argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--run.seed", "x"], "--run.seed is 'x'; give a whole number"),
        (["--batch.microbatches=1.5"], "--batch.microbatches is '1.5'; give a whole number or None"),
        (["--job.lr", "fast"], "--job.lr is 'fast'; give a number"),
        (["--run.exactness", "exact"], "--run.exactness is 'exact'; give one of fast, bitwise"),
        (["--run.name"], "--run.name has no value; give a text or None"),
        (["--run.name", "--dry-run"], "--run.name has no value; give a text or None"),
        (["junk"], "'junk' belongs to no option; options begin with --"),
        (["--run.seed", "3", "4"], "'4' belongs to no option; --run.seed takes one value; options begin with --"),
        (
            ["--parallel.compile", "true"],
            "--parallel.compile takes no value, and was given 'true'; --parallel.no-compile turns it off",
        ),
        (["--dry-run=1"], "--dry-run takes no value, and was given '1'; --no-dry-run turns it off"),
        (["--epochs", "5"], "--epochs is no option; give --run.duration 5ep"),
        (["--batch_size=8"], "--batch-size is no option; give --batch.global-size 8, that of all workers"),
        (["--resume"], "--resume is no option; give --run.name NAME, which resumes the run of that name"),
        (["--lr", "0.1"], "--lr is no option; did you mean --job.lr?"),
        (["--weight-decay", "0.1"], "--weight-decay is no option; it is the job's own: a field of its class, such as"),
        (["--nothing.like-it", "1"], "--nothing.like-it is no option; --help-all shows all options"),
        (["--config"], "--config has no value; give a file of options, .yaml or .toml"),
        (["--config", "nowhere.yaml"], "--config is 'nowhere.yaml', which cannot be read"),
    ],
)
def test_a_line_that_cannot_be_read_is_one_sentence_on_standard_error_and_exit_code_2(capsys, argv, said):
    code = run(Plain, CONFIG, argv)

    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {said}")
    assert shown.err.count("\n") == 1


@dataclasses.dataclass
class Sizes:
    """Options inside an option."""

    wide: int = 3
    deep: int = 2


@dataclasses.dataclass
class Nested(Plain):
    """A job whose options are of other types than most."""

    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    pair: tuple[int, int] = (1, 2)
    names: list[str] = dataclasses.field(default_factory=list)


def test_options_inside_options_and_of_several_values_are_read():
    line = ["--job.sizes.wide", "9", "--job.pair", "4", "5", "--job.names", "a", "b", "--run.seed", "3"]

    job, config = parse(Nested, CONFIG, line)

    assert (job.sizes, job.pair, job.names, config.run.seed) == (Sizes(9, 2), (4, 5), ["a", "b"], 3)
    with pytest.raises(ConfigError, match=r"^--run\.sed is no option"):
        parse(Nested, CONFIG, [*line, "--run.sed", "3"])


# ---- files of options --------------------------------------------------------------------------------------------

FILES = {
    "a.yaml": "run: {duration: 7st, take_over: true}\nbatch.global-size: 60\njob:\n  lr: 1.0e-3\n"
    "scaling: {exclude: [a, b]}\nobserve: {tensorboard: false}\n",
    "a.toml": "batch.global-size = 60\nrun = {duration = '7st', take-over = true}\nscaling.exclude = ['a', 'b']\n"
    "[job]\nlr = 1e-3\n[observe]\ntensorboard = false\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_options_is_read_before_the_line(name, tmp_path, capsys):
    file = tmp_path / name
    file.write_text(FILES[name])
    argv = ["--run.storage", str(tmp_path / "runs"), "--batch.global-size", "90", "--config", str(file), "--dry-run"]

    assert run(Plain, CONFIG, argv) == 0

    shown = capsys.readouterr().out
    assert f"options of {file}" in shown
    for line in (
        "--run.duration 7st",
        "--run.take-over",
        "--job.lr 0.001",
        "--batch.global-size 90",
        "--observe.no-tensorboard",
        "--scaling.exclude ['a', 'b']",
    ):
        assert f"  {line}\n" in shown


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "epochs: 5", "--epochs is no option; give --run.duration 5ep"),
        ("a.yaml", "run: {seed: x}", "--run.seed is 'x'; give a whole number"),
        ("a.yaml", "run: {seed: [[1]]}", "run.seed in --config"),
        ("a.yaml", "- 1", "which holds a list; write options by name in it"),
        ("a.yaml", "run: {", "which is no YAML"),
        ("a.toml", "run: 1", "which is no TOML"),
        ("a.txt", "", "give a file that ends in .yaml or .toml"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(name, text, said, tmp_path, capsys):
    (tmp_path / name).write_text(text)

    assert run(Plain, CONFIG, ["--config", str(tmp_path / name), "--dry-run"]) == 2

    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_a_value_that_cannot_be_is_our_own_error():
    with pytest.raises(ConfigError, match=r"--batch\.microbatches is 7; give a divisor of --batch\.global-size 30"):
        parse(Plain, CONFIG, ["--batch.microbatches", "7"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--run.name", "../up"], "--run.name is '../up'; use 1 to 100 letters"),
        (["--batch.global-size", "300"], "fewer than --batch.global-size 300; give at most 100"),
        (["--scaling.max-workers", "11"], "--batch.microbatches is 10, less than --scaling.max-workers 11"),
        (["--run.storage", "ftp://x/y"], "--run.storage is 'ftp://x/y'"),
        (["--run.duration", "500tok"], "tokens_per_sample"),
    ],
)
def test_bad_input_is_one_sentence_on_standard_error_and_exit_code_2(capsys, tmp_path, argv, said):
    code = run(Plain, CONFIG, ["--run.storage", str(tmp_path), "--dry-run", *argv])

    shown = capsys.readouterr()
    assert code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_a_dry_run_prints_every_option_and_the_table_of_world_sizes_and_starts_nothing(capsys, tmp_path):
    code = run(Plain, CONFIG, ["--run.storage", str(tmp_path / "runs"), "--run.name", "try", "--dry-run"])

    shown = capsys.readouterr().out
    assert code == 0
    assert "global 30 = 10 microbatches x 3; 4 workers -> 3 rounds" in shown
    assert "100 samples, 12 steps" in shown
    assert "  --run.seed 0" in shown
    assert "      3       4        83%" in shown
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_tries_out_the_storage_and_leaves_nothing_there(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for storage in ("/proc/runs", "/dev/null", str(tmp_path / "file" / "runs")):
        assert run(Plain, CONFIG, ["--run.storage", storage, "--dry-run"]) == 2

        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"error: --run.storage is '{storage}/tiny-jobs-")
        assert "which cannot write" in shown.err
        assert shown.err.count("\n") == 1
    assert run(Plain, CONFIG, ["--run.storage", str(tmp_path / "a" / "b"), "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--workers 0", "--workers is 0; give a number of processes from 1 to 1024"),
        ("--workers -1", "--workers is -1; give a number"),
        ("--cluster.address auto", "--cluster.address and --cluster.local-nodes are for runs on Ray; leave them out"),
        (
            "--scaling.accelerator gpu",
            "--scaling.accelerator is 'gpu', but torch finds no GPU on this machine",
        ),
    ],
)
def test_plain_processes_refuse_what_has_no_meaning_there(words, said, tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = ["--run.storage", str(tmp_path)]
    argv = ["elastic.worker", "--module", "tests.tiny_jobs", "--class", "Plain", *place, *words.split()]
    monkeypatch.setattr("sys.argv", argv)

    assert worker() == 2

    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_help_of_plain_processes_needs_no_job(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["elastic.worker", "--help"])

    assert worker() == 0
    assert "--workers WORKERS" in capsys.readouterr().out
