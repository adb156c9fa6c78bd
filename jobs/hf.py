"""Fine-tunes a causal language model of Hugging Face, whole or by LoRA, on rows of text, prompts or conversations."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import elastic
from elastic import BatchOptions, EvalOptions, OptimOptions, RunOptions, TrainConfig, hf
from elastic.errors import ConfigError

CONFIG = TrainConfig(
    run=RunOptions(duration="3ep"),
    batch=BatchOptions(global_size=16, microbatches=8),
    optim=OptimOptions(schedule="cosine", warmup="20st", clip_norm=1.0),
    eval=EvalOptions(every="1ep"),
)
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_rows(data: str, split: str):
    """Rows of a file (jsonl, csv, parquet, txt), of a folder that `save_to_disk` or people made, or of the hub."""
    import datasets

    if not data:
        raise ConfigError("--job.data is needed: a file, a folder, or the name of a data set on the hub")
    ending = os.path.splitext(data)[1]
    if ending in _READERS:
        return datasets.load_dataset(_READERS[ending], data_files=data, split=split)
    if os.path.exists(os.path.join(data, "state.json")):
        return datasets.load_from_disk(data)
    if os.path.exists(os.path.join(data, "dataset_dict.json")):
        return datasets.load_from_disk(data)[split]
    return datasets.load_dataset(data, split=split)


@dataclass
class Rows:
    """Where a job's rows come from."""

    data: str = field(default="", metadata={"help": "file, folder, or name on the hub of the rows"})
    split: str = field(default="train", metadata={"help": "split to train on, such as train[:95%]"})
    eval_split: str = field(default="", metadata={"help": "split to evaluate on, if any"})

    def rows(self):
        return load_rows(self.data, self.split)

    def held_out(self):
        return load_rows(self.data, self.eval_split) if self.eval_split else None


@dataclass
class Language(Rows, hf.CausalLM):
    """Fine-tune a causal language model: rows of text, of prompt and completion, or of messages."""


if __name__ == "__main__":
    elastic.main(Language, CONFIG)
