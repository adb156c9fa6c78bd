"""The numbers of a run, resolved once: everything that the options leave open until the data is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.config import TrainConfig
from elastic.data.deal import check_microbatches, choose_microbatches
from elastic.errors import ConfigError
from elastic.job import Plan
from elastic.phases import Cycle
from elastic.units import Amount, parse_amount


@dataclass(frozen=True)
class RunPlan:
    """Steps, microbatches and cadences. All counts are in steps; None means never.

    `checkpoint_every_s`: seconds between checkpoints, if they go by the clock; 0 for the interval that costs least.
    `snapshot_every` may be 0 in the same sense.
    """

    total_steps: int
    dataset_size: int
    global_size: int
    microbatches: int
    warmup_steps: int
    eval_every: int | None
    checkpoint_every: int | None
    stop_after_steps: int | None
    stop_after_s: float | None
    tokens_per_sample: int | None
    checkpoint_every_s: float | None = None
    keep_every: int | None = None
    snapshot_every: int | None = None
    check_every: int | None = None
    sample_every: int | None = None
    eval_batch: int | None = None
    seed: int = 0
    phases: tuple[str, ...] = ()

    @property
    def cycle(self) -> Cycle:
        """How phases take turns."""
        return Cycle(tuple(self.phases))  # a list, where it was JSON

    def samples(self, steps: int) -> int:
        """Samples of the data that were taken in the first steps, once for all phases."""
        return (self.cycle.batch(steps - 1) + 1) * self.global_size if steps else 0

    @property
    def for_job(self) -> Plan:
        """The part of this plan that the job gets, as `job.plan`."""
        microbatch = self.global_size // self.microbatches
        sizes = (self.total_steps, self.global_size, self.dataset_size, microbatch)
        return Plan(*sizes, self.seed, self.cycle.names)

    @property
    def eval_size(self) -> int:
        """Samples of one pass of an evaluation, the same in every world."""
        return evaluation_size(self.global_size, self.microbatches, self.eval_batch)


def evaluation_size(global_size: int, microbatches: int, given: int | None) -> int:
    """Samples of one pass of an evaluation: it does not depend on the world. `given`: what the user asked for."""
    return given or min(4 * (global_size // microbatches), global_size)


def resolve(
    config: TrainConfig,
    *,
    dataset_size: int,
    tokens_per_sample: int | None,
    stored_microbatches: int | None = None,
    phases: Sequence[str] = (),
) -> RunPlan:
    """Resolve a configuration against the data.

    Args:
        stored_microbatches: V of the run that is resumed, which stays unless the user gives another.
        phases: of the job.

    Raises:
        ConfigError: the data and the options do not fit.
    """
    batch, scaling = config.batch, config.scaling
    if dataset_size < batch.global_size:
        raise ConfigError(
            f"train_data() has {dataset_size} samples, fewer than --batch.global-size {batch.global_size}; "
            f"give at most {dataset_size}"
        )
    microbatches = batch.microbatches or stored_microbatches
    stages = config.most_cells if config.parallel.pipeline == "auto" else config.parallel.stages
    most = scaling.max_workers, config.parallel.tensor, stages
    if microbatches is None:
        microbatches = choose_microbatches(batch.global_size, *most)
    check_microbatches(microbatches, *most)

    cycle = Cycle(tuple(phases))

    def steps(name: str, text: str | None) -> int | None:
        if text is None:
            return None
        amount = parse_amount(name, text, clock=False)
        return amount.steps(name, batch.global_size, dataset_size, tokens_per_sample, cycle)

    total = steps("--run.duration", config.run.duration)
    assert total is not None
    every, every_s = config.checkpoint.every, None
    if every == "auto":
        every, every_s = None, 0.0
    elif every is not None and (amount := parse_amount("--checkpoint.every", every, clock=True)).is_clock:
        every, every_s = None, amount.seconds
    snapshots: int | None = 0
    if config.recovery.snapshot_every != "auto":
        wish = config.recovery.snapshot_every
        snapshots = steps("--recovery.snapshot-every", None if wish == "off" else wish)
    stop: Amount | None = None
    if config.run.stop_after is not None:
        stop = parse_amount("--run.stop-after", config.run.stop_after, clock=True)
    return RunPlan(
        total_steps=total,
        dataset_size=dataset_size,
        global_size=batch.global_size,
        microbatches=microbatches,
        warmup_steps=steps("--optim.warmup", config.optim.warmup) or 0,
        eval_every=steps("--eval.every", config.eval.every),
        checkpoint_every=steps("--checkpoint.every", every),
        stop_after_steps=(
            stop.steps("--run.stop-after", batch.global_size, dataset_size, tokens_per_sample, cycle)
            if stop and not stop.is_clock
            else None
        ),
        stop_after_s=stop.seconds if stop and stop.is_clock else None,
        tokens_per_sample=tokens_per_sample,
        checkpoint_every_s=every_s,
        keep_every=steps("--checkpoint.keep-every", config.checkpoint.keep_every),
        snapshot_every=snapshots,
        check_every=steps("--run.check-every", config.run.check_every),
        sample_every=steps("--eval.sample-every", config.eval.sample_every),
        eval_batch=config.eval.batch_size,
        seed=config.run.seed,
        phases=cycle.names,
    )
