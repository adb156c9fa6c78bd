"""The configuration of a run: all sections of options, to and from JSON, and which options are part of the result.

Every field carries its help text, whether it is one of the common options shown by `--help`, and whether it is a
*result* option (part of what the run computes, fixed for the run's life) or an operational one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from elastic.checks import option
from elastic.combinations import check_together
from elastic.errors import ConfigError
from elastic.redact import clean
from elastic.sections.operation import (
    CheckpointOptions,
    ClusterOptions,
    ObserveOptions,
    RecoveryOptions,
    ScalingOptions,
)
from elastic.sections.training import (
    BatchOptions,
    DataOptions,
    EvalOptions,
    OptimOptions,
    ParallelOptions,
    PrecisionOptions,
    RunOptions,
)
from elastic.values import decode, describe, encode


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run.

    Raises:
        ConfigError: an option, or a combination of options, that cannot work.
    """

    run: RunOptions = field(default_factory=RunOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    data: DataOptions = field(default_factory=DataOptions)
    scaling: ScalingOptions = field(default_factory=ScalingOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    observe: ObserveOptions = field(default_factory=ObserveOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    dry_run: bool = option(False, "print the resolved configuration and the batch table, start nothing", common=True)
    debug: bool = option(False, "train in this process alone, without Ray: breakpoints and prints work")

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            section, made_by = getattr(self, part.name), part.default_factory
            if isinstance(made_by, type) and not isinstance(section, made_by):
                raise ConfigError(
                    f"{part.name} is a {type(section).__name__}; give elastic.{made_by.__name__}(...) in "
                    f"elastic.TrainConfig({part.name}=...)"
                )
        check_together(self)

    @property
    def least_workers(self) -> int:
        """The fewest workers to train with: whole cells."""
        return -(-self.scaling.min_workers // self.parallel.tensor) * self.parallel.tensor

    @property
    def most_cells(self) -> int:
        """The most cells of a world: what runs a microbatch is one worker, or several with tensor parallelism."""
        return self.scaling.max_workers // self.parallel.tensor


def check_kind(config: object) -> None:
    """Refuse an object that is no configuration.

    Raises:
        ConfigError: with the type of the object.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"a {type(config).__name__} was given as the configuration; give an elastic.TrainConfig, such as "
            'elastic.TrainConfig(run=elastic.RunOptions(duration="5ep"))'
        )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values; see `elastic.values` for those that JSON does not have."""
    return encode(_listed(dataclasses.asdict(config)), "the configuration")


def _listed(value: Any) -> Any:
    """Options with several values are written as lists; `from_dict` turns them into tuples again."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Rebuild a configuration from `to_dict`.

    Raises:
        ConfigError: an option that this version does not have.
    """
    parts: dict[str, Any] = {}
    for part in dataclasses.fields(TrainConfig):
        if part.name not in values:
            continue
        stored = decode(values[part.name])
        if not isinstance(stored, dict):
            parts[part.name] = stored
            continue
        part_type: Any = part.default_factory
        known = {f.name for f in dataclasses.fields(part_type)}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise ConfigError(f"stored option {part.name}.{unknown[0]} is not known to this version")
        parts[part.name] = part_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    return TrainConfig(**parts)


def result_options(config: TrainConfig, job_options: dict[str, Any]) -> dict[str, Any]:
    """Every option that is part of what the run computes, by dotted name, coded by `elastic.values`. A value that
    cannot be coded is described; secrets in URLs are left out."""
    found: dict[str, Any] = {}
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        if not dataclasses.is_dataclass(section):
            continue
        for f in dataclasses.fields(section):
            if f.metadata.get("result"):
                found[f"{part.name}.{f.name}".replace("_", "-")] = encode(_listed(getattr(section, f.name)))
    found.update({f"job.{k}".replace("_", "-"): describe(v, f"--job.{k}") for k, v in job_options.items()})
    return clean(found)


def digest(result: dict[str, Any]) -> str:
    """sha256 of the result options: two runs with equal digests compute the same thing."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
