"""Amounts with units and the options of a run: what is refused, how, and what makes two runs comparable."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import config as cfg
from elastic.config import (
    BatchOptions,
    CheckpointOptions,
    ClusterOptions,
    DataOptions,
    EvalOptions,
    ObserveOptions,
    OptimOptions,
    ParallelOptions,
    PrecisionOptions,
    RecoveryOptions,
    RunOptions,
    ScalingOptions,
    TrainConfig,
)
from elastic.errors import ConfigError
from elastic.run.plan import resolve
from elastic.units import Amount, parse_amount

# ---- amounts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10ep", 10, "ep"),
        ("0.5ep", 0.5, "ep"),
        ("500st", 500, "st"),
        ("2_000_000tok", 2e6, "tok"),
        ("1e9tok", 1e9, "tok"),
        (" 30 min ", 30, "min"),
        ("2h", 2, "h"),
        ("1.5s", 1.5, "s"),
    ],
)
def test_an_amount_is_a_number_and_a_unit(text, value, unit):
    assert parse_amount("--x", text, clock=True) == Amount(value, unit)


@pytest.mark.parametrize(
    "text", ["", "10", "ep", "10 epochs", "-1ep", "0st", "0.0h", "1.5st", "nanep", "infst", "1ep 2", "٣ep", "1e400ep"]
)
def test_what_is_no_amount_is_refused_with_the_option_and_the_value(text):
    with pytest.raises(ConfigError, match=r"--run\.duration is") as caught:
        parse_amount("--run.duration", text, clock=False)

    assert repr(text) in str(caught.value)
    assert ";" in str(caught.value)


def test_wall_clock_units_are_refused_where_only_progress_counts():
    with pytest.raises(ConfigError, match="'2h'; give a number and a unit of ep, st, tok"):
        parse_amount("--eval.every", "2h", clock=False)


@given(st.integers(1, 10**6), st.integers(1, 4096), st.integers(1, 10**6))
def test_epochs_in_steps_cover_every_sample_and_no_step_is_needless(epochs, batch, samples):
    steps = Amount(epochs, "ep").steps("--run.duration", batch, samples, None)

    assert steps * batch >= epochs * samples
    assert steps == 1 or (steps - 1) * batch < epochs * samples


@given(st.integers(1, 10**12), st.integers(1, 4096), st.integers(1, 4096))
def test_tokens_in_steps_cover_every_token_and_no_step_is_needless(tokens, batch, per_sample):
    steps = Amount(tokens, "tok").steps("--run.duration", batch, 10**6, per_sample)

    assert steps * batch * per_sample >= tokens
    assert steps == 1 or (steps - 1) * batch * per_sample < tokens


def test_tokens_need_a_job_that_says_how_many_a_sample_has():
    with pytest.raises(ConfigError, match="tokens_per_sample"):
        Amount(1000, "tok").steps("--run.duration", 8, 100, None)


def test_wall_clock_amounts_are_seconds():
    assert [Amount(2, u).seconds for u in ("s", "min", "h")] == [2, 120, 7200]
    assert [Amount(2, u).is_clock for u in ("s", "ep", "st", "tok")] == [True, False, False, False]


# ---- what is refused -------------------------------------------------------------------------------------------


def _hsdp(workers: int, each: int | None) -> TrainConfig:
    return TrainConfig(
        parallel=ParallelOptions(strategy="hsdp"), scaling=ScalingOptions(max_workers=workers, workers_per_node=each)
    )


REFUSED = [
    (lambda: RunOptions(name="../x"), "--run.name", "'../x'", "letters"),
    (lambda: RunOptions(name="a..b"), "--run.name", "'a..b'", "letters"),
    (lambda: RunOptions(name="a/b"), "--run.name", "'a/b'", "letters"),
    (lambda: RunOptions(name="s3://a"), "--run.name", "'s3://a'", "letters"),
    (lambda: RunOptions(name=".hidden"), "--run.name", "'.hidden'", "letters"),
    (lambda: RunOptions(name=""), "--run.name", "''", "1 to 100"),
    (lambda: RunOptions(name="x" * 101), "--run.name", "xxx", "1 to 100"),
    (lambda: RunOptions(name="a\nb"), "--run.name", r"'a\nb'", "letters"),
    (lambda: RunOptions(name="line\n"), "--run.name", r"'line\n'", "letters"),
    (lambda: RunOptions(name="a b"), "--run.name", "'a b'", "letters"),
    (lambda: RunOptions(storage=" "), "--run.storage", "' '", "folder"),
    (lambda: RunOptions(duration="10"), "--run.duration", "'10'", "unit"),
    (lambda: RunOptions(duration="10min"), "--run.duration", "'10min'", "unit"),
    (lambda: RunOptions(stop_after="soon"), "--run.stop-after", "'soon'", "unit"),
    (lambda: RunOptions(seed=-1), "--run.seed", "-1", "0 to"),
    (lambda: RunOptions(seed=2**63), "--run.seed", str(2**63), "0 to"),
    (lambda: RunOptions(exactness="exact"), "--run.exactness", "'exact'", "fast, bitwise"),
    (lambda: RunOptions(on_nonfinite="ignore"), "--run.on-nonfinite", "'ignore'", "stop, skip"),
    (lambda: RunOptions(check_every="5min"), "--run.check-every", "'5min'", "unit"),
    (lambda: RunOptions(max_failures=-1), "--run.max-failures", "-1", "at least 0"),
    (lambda: BatchOptions(global_size=0), "--batch.global-size", "0", "at least 1"),
    (lambda: BatchOptions(global_size=8.0), "--batch.global-size", "8.0", "whole"),
    (lambda: BatchOptions(global_size=True), "--batch.global-size", "True", "whole"),
    (lambda: BatchOptions(microbatches=0), "--batch.microbatches", "0", "at least 1"),
    (lambda: BatchOptions(global_size=10, microbatches=4), "--batch.microbatches", "4", "divisor of --batch.global-s"),
    (lambda: BatchOptions(pass_size=0), "--batch.pass-size", "0", "at least 1"),
    (lambda: OptimOptions(schedule="linear"), "--optim.schedule", "'linear'", "constant, cosine"),
    (lambda: OptimOptions(warmup="3"), "--optim.warmup", "'3'", "unit"),
    (lambda: OptimOptions(final_lr=1.5), "--optim.final-lr", "1.5", "0 to 1"),
    (lambda: OptimOptions(final_lr=math.nan), "--optim.final-lr", "nan", "0 to 1"),
    (lambda: OptimOptions(clip_norm=0.0), "--optim.clip-norm", "0.0", "above 0"),
    (lambda: PrecisionOptions(autocast="fp8"), "--precision.autocast", "'fp8'", "off, bf16, fp16"),
    (lambda: PrecisionOptions(param_dtype="fp8"), "--precision.param-dtype", "'fp8'", "off, bf16, fp16"),
    (lambda: PrecisionOptions("bf16", "bf16"), "--precision.param-dtype", "'bf16'", "--precision.autocast bf16"),
    (lambda: PrecisionOptions(loss_scale=3.0), "--precision.loss-scale", "3.0", "power of two"),
    (lambda: PrecisionOptions(loss_scale=0.5), "--precision.loss-scale", "0.5", "at least 1"),
    (lambda: PrecisionOptions(grad_compression="int8"), "--precision.grad-compression", "'int8'", "off, bf16"),
    (lambda: DataOptions(workers=-1), "--data.workers", "-1", "at least 0"),
    (lambda: DataOptions(prefetch=0), "--data.prefetch", "0", "at least 1"),
    (lambda: DataOptions(prepare_timeout="3ep"), "--data.prepare-timeout", "3ep", "give a time of at least 1s"),
    (lambda: ScalingOptions(min_workers=0), "--scaling.min-workers", "0", "at least 1"),
    (lambda: ScalingOptions(max_workers=0), "--scaling.max-workers", "0", "at least 1"),
    (lambda: ScalingOptions(min_workers=3), "--scaling.min-workers", "3", "at most --scaling.max-workers 2"),
    (lambda: ScalingOptions(spares=-1), "--scaling.spares", "-1", "at least 0"),
    (lambda: ScalingOptions(accelerator="tpu"), "--scaling.accelerator", "'tpu'", "auto, cpu, gpu"),
    (lambda: ScalingOptions(cpus_per_worker=0), "--scaling.cpus-per-worker", "0", "at least 1"),
    (lambda: ScalingOptions(workers_per_node=0), "--scaling.workers-per-node", "0", "at least 1"),
    (lambda: ScalingOptions(memory_per_worker=0.0), "--scaling.memory-per-worker", "0.0", "a finite number above 0"),
    (lambda: ScalingOptions(exclude=("a", " ")), "--scaling.exclude", "' '", "give host names"),
    (lambda: ParallelOptions(strategy="zero"), "--parallel.strategy", "'zero'", "ddp, fsdp, hsdp"),
    (lambda: ParallelOptions(prefetch=-1), "--parallel.prefetch", "-1", "at least 0"),
    (lambda: ParallelOptions(offload=True), "--parallel.offload", "True", "leave it out"),
    (lambda: ParallelOptions(prefetch=2), "--parallel.prefetch", "2", "leave it out"),
    (lambda: ParallelOptions(reshard_after_forward=False), "--parallel.reshard-after-forward", "False", "leave it out"),
    (lambda: ParallelOptions(tensor=0), "--parallel.tensor", "0", "at least 1"),
    (lambda: ParallelOptions(pipeline=0), "--parallel.pipeline", "0", "at least 1"),
    (lambda: _hsdp(4, None), "--parallel.strategy", "'hsdp'", "--scaling.workers-per-node"),
    (lambda: _hsdp(2, 2), "--parallel.strategy", "'hsdp'", "fsdp, or at least 4 workers"),
    (lambda: _hsdp(5, 2), "--parallel.strategy", "'hsdp'", "multiple of 2"),
    (
        lambda: TrainConfig(
            run=RunOptions(exactness="bitwise"),
            precision=PrecisionOptions(param_dtype="bf16"),
            parallel=ParallelOptions(strategy="fsdp"),
        ),
        "--precision.param-dtype",
        "'bf16'",
        "--run.exactness fast",
    ),
    (
        lambda: TrainConfig(
            parallel=ParallelOptions(strategy="fsdp", offload=True), scaling=ScalingOptions(accelerator="cpu")
        ),
        "--parallel.offload",
        "'cpu'",
        "leave it out",
    ),
    (
        lambda: TrainConfig(
            parallel=ParallelOptions(strategy="fsdp", offload=True), run=RunOptions(exactness="bitwise")
        ),
        "--parallel.offload",
        "bitwise",
        "--run.exactness fast",
    ),
    (lambda: ScalingOptions(priority=1.5), "--scaling.priority", "1.5", "whole number"),
    (lambda: ScalingOptions(request_timeout="9st"), "--scaling.request-timeout", "'9st'", "s, min or h"),
    (lambda: ParallelOptions(bucket_mb=0), "--parallel.bucket-mb", "0", "at least 1"),
    (lambda: EvalOptions(every="1h"), "--eval.every", "'1h'", "unit"),
    (lambda: CheckpointOptions(every="often"), "--checkpoint.every", "'often'", "unit"),
    (lambda: CheckpointOptions(when_busy="stop"), "--checkpoint.when-busy", "'stop'", "wait, delay, skip"),
    (lambda: CheckpointOptions(keep_every="1h"), "--checkpoint.keep-every", "'1h'", "unit"),
    (lambda: CheckpointOptions(keep_best=-1), "--checkpoint.keep-best", "-1", "at least 0"),
    (lambda: EvalOptions(sample_every="1h"), "--eval.sample-every", "'1h'", "unit"),
    (lambda: EvalOptions(batch_size=0), "--eval.batch-size", "0", "1"),
    (lambda: EvalOptions(patience=2), "--eval.patience", "2", "give --eval.every too"),
    (lambda: EvalOptions(min_delta=-1.0), "--eval.min-delta", "-1.0", "0"),
    (lambda: EvalOptions(hold=True), "--eval.hold", "True", "give --eval.every too"),
    (lambda: CheckpointOptions(best_metric="loss"), "--checkpoint.best-metric", "'loss'", "eval/loss"),
    (lambda: CheckpointOptions(init_from=" "), "--checkpoint.init-from", "' '", "leave it out"),
    (lambda: CheckpointOptions(init_partial=True), "--checkpoint.init-partial", "True", "init-from too"),
    (lambda: CheckpointOptions(best_mode="most"), "--checkpoint.best-mode", "'most'", "min, max"),
    (lambda: CheckpointOptions(keep_last=0), "--checkpoint.keep-last", "0", "at least 1"),
    (lambda: RecoveryOptions(snapshot_every="5min"), "--recovery.snapshot-every", "'5min'", "unit of ep, st, tok"),
    (
        lambda: TrainConfig(recovery=RecoveryOptions(snapshot_every="5st")),
        "--recovery.snapshot-every",
        "'5st'",
        "leave it off, or use fsdp or hsdp",
    ),
    (lambda: RecoveryOptions(hang_timeout="5ep"), "--recovery.hang-timeout", "'5ep'", "s, min or h"),
    (lambda: RecoveryOptions(lease="auto"), "--recovery.lease", "'auto'", "unit"),
    (lambda: RecoveryOptions(max_wait="2ep"), "--recovery.max-wait", "'2ep'", "s, min or h"),
    (lambda: ObserveOptions(log_every=0), "--observe.log-every", "0", "above 0"),
    (lambda: ObserveOptions(price=("-1.0",)), "--observe.price", "-1.0", "from 0 on"),
    (lambda: ObserveOptions(port=0), "--observe.port", "0", "at least 1"),
    (lambda: ObserveOptions(notify="ftp://host/secret"), "--observe.notify", "'ftp://...'", "http(s) URL"),
    (lambda: ObserveOptions(notify="'"), "--observe.notify", "which is no command", "give an http(s) URL"),
    (lambda: RunOptions(max_cost=0.0), "--run.max-cost", "0.0", "above 0"),
    (lambda: TrainConfig(run=RunOptions(max_cost=5.0)), "--run.max-cost", "5", "give --observe.price"),
    (lambda: ClusterOptions(local_nodes=0), "--cluster.local-nodes", "0", "at least 1"),
    (lambda: ClusterOptions(keep_warm="0.5s"), "--cluster.keep-warm", "0.5s", "at least 1s"),
    (lambda: ClusterOptions(address="a:1", local_nodes=2), "--cluster.local-nodes", "2", "--cluster.address a:1"),
    (
        lambda: TrainConfig(run=RunOptions(exactness="bitwise"), precision=PrecisionOptions(grad_compression="bf16")),
        "--precision.grad-compression",
        "'bf16'",
        "--run.exactness fast",
    ),
]


@pytest.mark.parametrize(("make", "option", "value", "fix"), REFUSED, ids=[f"{r[1][2:]}={r[2]}" for r in REFUSED])
def test_a_refusal_names_the_option_its_value_and_the_fix(make, option, value, fix):
    with pytest.raises(ConfigError) as caught:
        make()

    text = str(caught.value)
    assert text.startswith(f"{option} is ")
    assert value in text
    assert fix in text.split(";", 1)[1]
    assert "\n" not in text


def test_every_option_that_can_be_wrong_has_a_refusal_above():
    free = {
        "run.take-over",
        "run.allow-change",
        "parallel.find-unused",
        "observe.tensorboard",
        "observe.quiet",
        "cluster.address",
        "parallel.compile",
        "parallel.activation-checkpointing",
        "parallel.blocks",  # refused when the model is known
        "checkpoint.convert",
    }
    refused = {option.removeprefix("--") for _, option, _, _ in REFUSED}

    missing = {name for name, _ in _all_options()} - refused - free

    # Found one? A new option needs a row in REFUSED, or to be named as one that takes any value.
    assert missing == set()


@pytest.mark.parametrize("name", ["a", "A-1", "run.2024_01", "0", "x" * 100])
def test_good_names_are_taken(name):
    assert RunOptions(name=name).name == name


def test_a_batch_larger_than_the_data_is_refused():
    config = TrainConfig(batch=BatchOptions(global_size=64))

    with pytest.raises(ConfigError, match=r"63 samples, fewer than --batch\.global-size 64; give at most 63"):
        resolve(config, dataset_size=63, tokens_per_sample=None)


# ---- round trip and digest -------------------------------------------------------------------------------------


def _all_options(config: TrainConfig | None = None):
    """(dotted name, dataclass field) of every option inside a section."""
    for part in dataclasses.fields(TrainConfig):
        section = getattr(config or TrainConfig(), part.name)
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                yield f"{part.name}.{field.name}".replace("_", "-"), field


whole = st.integers(1, 10**6)
progress = st.builds(lambda n, u: f"{n}{u}", whole, st.sampled_from(["ep", "st", "tok"]))
clock = st.builds(lambda n, u: f"{n}{u}", st.integers(1, 10**4), st.sampled_from(["s", "min", "h"]))


def _maybe(strategy):
    return st.none() | strategy


patience = st.builds(lambda n, u: f"{n}{u}", st.integers(1, 168), st.sampled_from(["s", "min", "h"]))
configs = st.builds(
    TrainConfig,
    run=st.builds(
        RunOptions,
        name=_maybe(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)),
        storage=st.sampled_from(["runs", "s3://bucket/runs"]),
        duration=progress,
        stop_after=_maybe(progress | clock),
        seed=st.integers(0, 2**63 - 1),
        exactness=st.sampled_from(["fast", "bitwise"]),
        on_nonfinite=st.sampled_from(["stop", "skip"]),
        take_over=st.booleans(),
        max_failures=st.integers(0, 9),
        allow_change=st.lists(st.sampled_from(["run.seed", "job.lr"]), max_size=2).map(tuple),
    ),
    batch=st.builds(
        lambda v, size, p: BatchOptions(global_size=v * size, microbatches=v, pass_size=p),
        st.integers(1, 64),
        st.integers(1, 64),
        _maybe(whole),
    ),
    optim=st.builds(
        OptimOptions,
        schedule=st.sampled_from(["constant", "cosine"]),
        warmup=_maybe(progress),
        final_lr=st.floats(0, 1),
        clip_norm=_maybe(st.floats(1e-6, 1e6)),
    ),
    precision=st.builds(PrecisionOptions, autocast=st.sampled_from(["off", "bf16"])),
    data=st.builds(DataOptions, workers=st.integers(0, 9), prefetch=st.integers(1, 9)),
    scaling=st.builds(
        lambda low, more, **rest: ScalingOptions(min_workers=low, max_workers=low + more, **rest),
        st.integers(1, 9),
        st.integers(0, 9),
        accelerator=st.sampled_from(["auto", "cpu", "gpu"]),
        cpus_per_worker=st.integers(1, 9),
        workers_per_node=_maybe(st.integers(1, 9)),
        spares=st.integers(0, 3),
    ),
    parallel=st.builds(ParallelOptions, bucket_mb=st.integers(1, 1 << 20), find_unused=st.booleans()),
    eval=st.builds(EvalOptions, every=_maybe(progress)),
    checkpoint=st.builds(CheckpointOptions, every=_maybe(progress), keep_last=whole),
    recovery=st.builds(
        RecoveryOptions, hang_timeout=patience | st.just("auto"), lease=patience, max_wait=_maybe(clock)
    ),
    observe=st.builds(
        ObserveOptions, log_every=st.floats(0.01, 100), tensorboard=st.booleans(), price=_maybe(st.floats(0, 100))
    ),
    cluster=st.builds(ClusterOptions, local_nodes=_maybe(st.integers(1, 9))),
    dry_run=st.booleans(),
)


@given(configs)
def test_a_configuration_survives_storage(config):
    stored = json.loads(json.dumps(cfg.to_dict(config)))

    assert cfg.from_dict(stored) == config


def test_a_stored_option_of_a_newer_version_is_refused_by_name():
    stored = cfg.to_dict(TrainConfig())
    stored["run"]["warp"] = 9

    with pytest.raises(ConfigError, match=r"stored option run\.warp is not known"):
        cfg.from_dict(stored)


# Another valid value for every option, to change one at a time.
OTHER_VALUES = {
    "run.name": "other",
    "run.storage": "elsewhere",
    "run.duration": "11ep",
    "run.stop-after": "3st",
    "run.seed": 1,
    "run.exactness": "bitwise",
    "run.on-nonfinite": "skip",
    "run.allow-change": ("run.seed",),
    "run.take-over": True,
    "run.check-every": "7st",
    "run.max-failures": 4,
    "batch.global-size": 128,
    "batch.microbatches": 32,
    "batch.pass-size": 2,
    "optim.schedule": "cosine",
    "optim.warmup": "5st",
    "optim.final-lr": 0.2,
    "optim.clip-norm": 1.0,
    "precision.autocast": "bf16",
    "precision.grad-compression": "bf16",
    "data.workers": 1,
    "data.prefetch": 3,
    "data.prepare-timeout": "5min",
    "scaling.min-workers": 2,
    "scaling.max-workers": 3,
    "scaling.accelerator": "cpu",
    "scaling.cpus-per-worker": 2,
    "scaling.workers-per-node": 1,
    "scaling.memory-per-worker": 40.0,
    "scaling.spares": 1,
    "scaling.priority": -2,
    "scaling.request-timeout": "5min",
    "parallel.strategy": "fsdp",
    "parallel.tensor": 2,
    "parallel.pipeline": 2,
    "parallel.bucket-mb": 1,
    "parallel.find-unused": True,
    "parallel.blocks": ("Block",),
    "parallel.prefetch": 1,
    "parallel.offload": True,
    "parallel.reshard-after-forward": False,
    "parallel.activation-checkpointing": True,
    "parallel.compile": True,
    "precision.param-dtype": "bf16",
    "precision.loss-scale": 2.0,
    "eval.every": "1ep",
    "eval.sample-every": "1ep",
    "eval.batch-size": 64,
    "eval.min-delta": 0.5,
    "checkpoint.every": "1ep",
    "checkpoint.keep-last": 1,
    "checkpoint.when-busy": "skip",
    "checkpoint.keep-every": "1ep",
    "checkpoint.keep-best": 1,
    "checkpoint.best-metric": "eval/accuracy",
    "checkpoint.best-mode": "max",
    "checkpoint.convert": True,
    "checkpoint.init-from": "w.safetensors",
    "recovery.hang-timeout": "1min",
    "recovery.lease": "1min",
    "recovery.max-wait": "1h",
    "recovery.snapshot-every": "5st",
    "observe.log-every": 1.0,
    "observe.tensorboard": False,
    "observe.quiet": True,
    "observe.price": ("1.0",),
    "observe.notify": "true",
    "observe.port": 9400,
    "cluster.address": "auto",
    "cluster.local-nodes": 2,
    "cluster.keep-warm": "5min",
    "scaling.exclude": ("broken",),
}
ONE_VALUE = {
    "checkpoint.init-partial",
    "eval.hold",
    "eval.patience",
    "run.max-cost",
}  # valid only beside another option
SHARDED_ONLY = {
    "parallel.offload",
    "parallel.prefetch",
    "parallel.reshard-after-forward",
    "recovery.snapshot-every",
}
RESULT = {
    "run.duration",
    "run.seed",
    "run.exactness",
    "run.on-nonfinite",
    "batch.global-size",
    "batch.microbatches",
    "optim.schedule",
    "optim.warmup",
    "optim.final-lr",
    "eval.batch-size",
    "eval.min-delta",
    "optim.clip-norm",
    "precision.autocast",
    "precision.grad-compression",
    "precision.param-dtype",
    "precision.loss-scale",
    "parallel.compile",
    "parallel.tensor",
    "checkpoint.init-from",
}


def _changed(name: str, value: object) -> TrainConfig:
    part, _, field = name.replace("-", "_").partition(".")
    config = TrainConfig(parallel=ParallelOptions(strategy="fsdp")) if name in SHARDED_ONLY else TrainConfig()
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})


def test_the_table_of_other_values_has_every_option():
    assert {name for name, _ in _all_options()} == set(OTHER_VALUES) | ONE_VALUE


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_the_digest_changes_if_and_only_if_the_result_can(name):
    plain = cfg.digest(cfg.result_options(TrainConfig(), {"lr": 0.1}))

    changed = cfg.digest(cfg.result_options(_changed(name, OTHER_VALUES[name]), {"lr": 0.1}))

    assert (changed != plain) == (name in RESULT)


def test_the_job_s_own_options_are_part_of_the_result():
    plain = cfg.result_options(TrainConfig(), {"hidden_size": 8})

    assert plain["job.hidden-size"] == 8
    assert cfg.digest(plain) == cfg.digest(cfg.result_options(TrainConfig(), {"hidden_size": 8}))
    assert cfg.digest(plain) != cfg.digest(cfg.result_options(TrainConfig(), {"hidden_size": 9}))


def test_every_option_has_a_help_text():
    assert [name for name, field in _all_options() if not field.metadata["help"].strip()] == []
