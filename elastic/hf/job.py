"""Fine-tuning a pretrained model of Hugging Face, whole or by LoRA, as a job.

The model is made from its config, without memory; each worker then reads its own part of the weights from the
safetensors they lie in.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elastic.errors import ConfigError
from elastic.hf import source, text
from elastic.hf.files import ADAPTER_CONFIG, CONFIG, FILES, GENERATION_CONFIG
from elastic.job import Job, LossResult, MapDataset

if TYPE_CHECKING:
    import torch


@dataclass
class Pretrained(Job):
    """What language models and classifiers have in common. Subclass one of those, and say what `rows()` are."""

    pretrained: str = field(default="", metadata={"help": "folder of the model, or its name on the hub"})
    revision: str | None = field(default=None, metadata={"help": "of the name on the hub, such as a commit"})
    scratch: bool = field(
        default=False, metadata={"help": "make the weights here; take the config and tokenizer alone"}
    )
    length: int = field(default=512, metadata={"help": "most tokens of a sample"})
    lr: float = field(default=5e-5, metadata={"help": "learning rate of AdamW; 2e-4 suits LoRA"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay of matrices"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta"})
    beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta"})
    epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    lr_schedule: str = field(
        default="", metadata={"help": "schedule of transformers, such as linear, for --optim.schedule"}
    )
    warmup: float = field(default=0.0, metadata={"help": "warm-up of lr-schedule: steps, or a share of all if below 1"})
    lora_rank: int = field(default=0, metadata={"help": "train adapters of this rank, and nothing else but a new head"})
    lora_alpha: float = field(default=16.0, metadata={"help": "adapters count alpha / rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout of what goes into adapters"})
    lora_targets: tuple[str, ...] = field(
        default=(), metadata={"help": "modules with adapters (default: peft's choice)"}
    )

    def __post_init__(self) -> None:
        self._prefix, self._files = "", dict[str, str]()  # of the model, when it is made
        if self.length < 2:
            raise ConfigError(f"--job.length is {self.length}; give at least 2")
        if self.lora_rank < 0:
            raise ConfigError(f"--job.lora-rank is {self.lora_rank}; give 0 for none, or more")

    # ---- to be overridden ------------------------------------------------------------------------------------------

    def rows(self) -> MapDataset:
        """Return the training data as rows by name, such as a `datasets.Dataset` or a list of dictionaries."""
        raise NotImplementedError(f"{type(self).__name__} needs a rows() method that returns rows by index")

    def held_out(self) -> MapDataset | None:
        """Return the held-out data, like `rows`; or None."""
        return None

    def tokenizer(self) -> Any:
        """The tokenizer; called often, so keep what takes long to make."""
        return source.load_tokenizer(self.folder)

    def config(self) -> Any:
        """The config that the model is made from."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder)

    # ---- the job ---------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str:
        """The folder of the model's files on this machine."""
        return source.local_folder(self.pretrained, self.revision)

    def model(self) -> torch.nn.Module:
        import torch

        config = self.config()
        made = self._kind().from_config(config, dtype=torch.float32)
        config.architectures, config.dtype = [type(made).__name__], "float32"
        self._prefix = made.base_model_prefix
        self._files = {CONFIG: config.to_json_string()}
        if made.can_generate():
            self._files[GENERATION_CONFIG] = made.generation_config.to_json_string()
        if not self.lora_rank:
            return made
        from peft import LoraConfig, get_peft_model

        made = get_peft_model(
            made,
            LoraConfig(
                task_type=self._task,
                r=self.lora_rank,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                target_modules=list(self.lora_targets) or None,
            ),
        )
        fields = {
            **made.peft_config["default"].to_dict(),
            "base_model_name_or_path": self.pretrained,
            "inference_mode": True,
        }
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
        self._files[ADAPTER_CONFIG] = json.dumps(plain, indent=2, sort_keys=True)
        return made

    def initial_weights(self) -> str | None:
        return None if self.scratch else self.folder

    def weight_name(self, name: str) -> str | None:
        plain = super().weight_name(name)
        if plain is None or self.scratch:
            return plain
        there = source.name_there(plain, source.weight_names(self.folder), self._prefix)
        return plain if there is None and not self._may_be_new(plain) else there

    def has_source(self, name: str) -> bool:
        """Return whether a weight is part of the base of adapters, which each worker reads from its files."""
        return bool(self.lora_rank) and not self.scratch and self.weight_name(name) is not None

    def _may_be_new(self, name: str) -> bool:
        """Whether a weight that the source lacks is made here."""
        return False

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        matrices, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
        )

    def schedule(self, step: int, total_steps: int) -> float | None:
        return factors(self.lr_schedule, self.warmup, total_steps)(step) if self.lr_schedule else None

    def train_data(self) -> MapDataset:
        return self._data(self.rows())

    def eval_data(self) -> MapDataset | None:
        rows = self.held_out()
        return None if rows is None else self._data(rows)

    def extra_state(self) -> Mapping[str, Any]:
        return {FILES: dict(self._files)}

    def load_extra_state(self, values: Mapping[str, Any]) -> None:
        """Nothing: these files are made with the model."""

    def collate_fn(self, samples: Sequence[Any]) -> Any:
        tokenizer = self.tokenizer()
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        return text.padded(samples, pad)

    def _kind(self) -> Any:
        raise NotImplementedError

    def _data(self, rows: MapDataset) -> MapDataset:
        raise NotImplementedError

    _task = ""


@dataclass
class CausalLM(Pretrained):
    """Fine-tune a causal language model: rows of text, of prompt and completion, or of messages."""

    packing: bool = field(
        default=False, metadata={"help": "join rows, and cut them into samples of exactly length tokens"}
    )
    _task = "CAUSAL_LM"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens_per_sample = self.length if self.packing else None

    def _kind(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def _data(self, rows: MapDataset) -> MapDataset:
        most = None if self.packing else self.length
        samples = text.Encoded(rows, functools.partial(text.language_sample, self.tokenizer(), length=most))
        return text.Packed(samples, self.length) if self.packing else samples

    def loss(self, model: torch.nn.Module, batch: Any) -> LossResult:
        """Cross entropy in nats summed over the trained tokens, whose number is the weight; and how many were right."""
        from torch.nn import functional

        labels = batch["labels"][:, 1:]
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        logits = found.logits[:, :-1]
        nats = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=text.IGNORED, reduction="sum"
        )
        trained = labels != text.IGNORED
        right = ((logits.argmax(-1) == labels) & trained).sum()
        return nats, trained.sum(), {"accuracy": right}

    def evaluated(self, sums: Mapping[str, float], name: str) -> Mapping[str, float]:
        """The perplexity of a token."""
        return {"perplexity": math.exp(min(sums["loss"] / sums["weight"], 700.0))} if sums["weight"] else {}


@dataclass
class Classifier(Pretrained):
    """Fine-tune a classifier of texts: rows of text (and text_pair) and label."""

    labels: int = field(default=2, metadata={"help": "number of classes"})
    new_head: bool = field(default=False, metadata={"help": "make the head anew, although the model has one"})
    _task = "SEQ_CLS"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels < 2:
            raise ConfigError(f"--job.labels is {self.labels}; give at least 2")

    def config(self) -> Any:
        config = super().config()
        config.num_labels = self.labels
        if config.pad_token_id is None:  # by which causal models find the last token
            config.pad_token_id = self.tokenizer().pad_token_id
        return config

    def _kind(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def weight_name(self, name: str) -> str | None:
        plain = Job.weight_name(self, name)
        head = plain is not None and self._may_be_new(plain)
        return None if self.new_head and head else super().weight_name(name)

    def _may_be_new(self, name: str) -> bool:
        return not name.startswith(f"{self._prefix}.")

    def _data(self, rows: MapDataset) -> MapDataset:
        return text.Encoded(rows, functools.partial(text.class_sample, self.tokenizer(), length=self.length))

    def collate_fn(self, samples: Sequence[Any]) -> Any:
        import torch

        labels = torch.tensor([sample["label"] for sample in samples])
        return {"inputs": super().collate_fn(samples), "labels": labels}

    def loss(self, model: torch.nn.Module, batch: Any) -> LossResult:
        """Cross entropy in nats summed over the texts, whose number is the weight; and how many were right."""
        from torch.nn import functional

        labels = batch["labels"]
        logits = model(**batch["inputs"]).logits.float()
        right = (logits.argmax(-1) == labels).sum()
        return functional.cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": right}


@functools.cache
def factors(name: str, warmup: float, total_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at a step (from 0), as `transformers.get_scheduler` has it.

    Args:
        warmup: steps, or a share of all if below 1.

    Raises:
        ConfigError: there is no such schedule, or it is no function of the step.
    """
    import torch
    from transformers import get_scheduler

    steps = int(warmup) if warmup >= 1 else -int(-warmup * total_steps // 1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        made = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=total_steps)
    except ValueError as error:
        raise ConfigError(f"--job.lr-schedule is {name!r}, which transformers does not have: {error}") from error
    lambdas = getattr(made, "lr_lambdas", None)
    if not lambdas:
        raise ConfigError(f"--job.lr-schedule is {name!r}, which is no function of the step; give linear or cosine")
    return lambdas[0]
