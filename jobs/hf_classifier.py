"""Fine-tunes a classifier of texts from a pretrained model of Hugging Face, whole or by LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field

import elastic
from elastic import hf
from jobs.hf import CONFIG, load_rows


@dataclass
class Classes(hf.Classifier):
    """Fine-tune a classifier of texts: rows of text (and text_pair) and label."""

    data: str = field(default="", metadata={"help": "file, folder, or name on the hub of the rows"})
    split: str = field(default="train", metadata={"help": "split to train on, such as train[:95%]"})
    eval_split: str = field(default="", metadata={"help": "split to evaluate on, if any"})

    def rows(self):
        return load_rows(self.data, self.split)

    def held_out(self):
        return load_rows(self.data, self.eval_split) if self.eval_split else None


if __name__ == "__main__":
    elastic.main(Classes, CONFIG)
