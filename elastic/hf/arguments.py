"""From transformers' `TrainingArguments` to a job and its configuration; what cannot be kept is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from elastic import config as cfg
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.hf.job import Pretrained

_KEPT = """
    activation_checkpointing adam_beta1 adam_beta2 adam_epsilon bf16 dataloader_num_workers
    dataloader_prefetch_factor eval_steps eval_strategy fp16 fsdp full_determinism gradient_accumulation_steps
    gradient_checkpointing learning_rate lr_scheduler_type max_grad_norm max_steps num_train_epochs optim
    output_dir per_device_train_batch_size run_name save_steps save_strategy save_total_limit seed
    torch_compile use_cpu warmup_steps weight_decay
""".split()  # noqa: SIM905 - a list of words reads better
#: These say nothing of what is trained: how it is shown, or what Elastic does by itself.
_NEEDLESS = """
    average_tokens_across_devices dataloader_persistent_workers dataloader_pin_memory ddp_backend
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout disable_tqdm do_eval do_predict do_train
    gradient_checkpointing_kwargs ignore_data_skip include_num_input_tokens_seen local_rank log_level
    log_level_replica log_on_each_node logging_first_step logging_steps logging_strategy
    per_device_eval_batch_size prediction_loss_only project remove_unused_columns save_on_each_node
    skip_memory_metrics
""".split()  # noqa: SIM905 - a list of words reads better
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def from_arguments(job_class: type[Pretrained], arguments: Any, **options: Any) -> tuple[Pretrained, TrainConfig]:
    """A job and its configuration, for `ElasticTrainer(job, config).fit()`.

    The global batch is `per_device_train_batch_size * gradient_accumulation_steps`, at every number of workers. Of
    checkpoints those that `save_total_limit` says are kept, else the newest three.

    Args:
        job_class: a subclass of `CausalLM` or `Classifier`.
        arguments: `transformers.TrainingArguments`.
        options: of the job, such as `pretrained`.

    Raises:
        ConfigError: an argument that is not its default and that Elastic cannot keep.
    """
    usual = type(arguments)(arguments.output_dir, fsdp=arguments.fsdp)
    for name in sorted({f.name for f in dataclasses.fields(usual)} - {*_KEPT, *_NEEDLESS}):
        if getattr(arguments, name) != getattr(usual, name):
            raise ConfigError(
                f"TrainingArguments has {name}={getattr(arguments, name)!r}, which Elastic does not do; leave it out"
            )
    values = {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "beta1": arguments.adam_beta1,
        "beta2": arguments.adam_beta2,
        "epsilon": arguments.adam_epsilon,
        "lr_schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "warmup": float(arguments.warmup_steps),
    }
    return job_class(**{**values, **options}), _config(arguments)


def _config(arguments: Any) -> TrainConfig:
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer not in _OPTIMIZERS:
        raise ConfigError(
            f"TrainingArguments has optim={optimizer!r}; give {_OPTIMIZERS[0]!r}, or override the job's optimizer()"
        )
    each = arguments.per_device_train_batch_size
    steps = arguments.max_steps
    return TrainConfig(
        run=cfg.RunOptions(
            storage=arguments.output_dir,
            name=arguments.run_name,
            duration=f"{steps}st" if steps > 0 else f"{arguments.num_train_epochs:g}ep",
            seed=arguments.seed,
            exactness="bitwise" if arguments.full_determinism else "fast",
        ),
        batch=cfg.BatchOptions(global_size=each * arguments.gradient_accumulation_steps, pass_size=each),
        optim=cfg.OptimOptions(clip_norm=arguments.max_grad_norm or None),
        precision=cfg.PrecisionOptions(autocast="bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "off"),
        data=cfg.DataOptions(
            workers=arguments.dataloader_num_workers, prefetch=arguments.dataloader_prefetch_factor or 2
        ),
        scaling=cfg.ScalingOptions(accelerator="cpu") if arguments.use_cpu else cfg.ScalingOptions(),
        parallel=cfg.ParallelOptions(
            strategy="fsdp" if arguments.fsdp else "ddp",
            activation_checkpointing=_any(arguments, "gradient_checkpointing", "activation_checkpointing"),
            compile=bool(arguments.torch_compile),
        ),
        eval=cfg.EvalOptions(every=_every("eval", arguments)),
        checkpoint=cfg.CheckpointOptions(every=_every("save", arguments), keep_last=arguments.save_total_limit or 3),
    )


def _any(arguments: Any, *names: str) -> bool:
    return any(getattr(arguments, name, False) for name in names)


def _every(what: str, arguments: Any) -> str | None:
    strategy = getattr(arguments, f"{what}_strategy")
    name = str(getattr(strategy, "value", strategy))
    if name == "no":
        return None
    if name == "epoch":
        return "1ep"
    steps = getattr(arguments, f"{what}_steps")
    if what == "eval" and steps is None:
        steps = arguments.logging_steps
    if name != "steps" or steps < 1:
        raise ConfigError(
            f"TrainingArguments has {what}_strategy={name!r} and {what}_steps={steps!r}; give no, epoch, or steps and "
            "a whole number of them"
        )
    return f"{int(steps)}st"
