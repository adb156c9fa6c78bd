"""Fine-tunes a classifier of texts from a pretrained model of Hugging Face, whole or by LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import elastic
from elastic import hf
from jobs.hf import CONFIG, Rows


@dataclass
class Classes(Rows, hf.Classifier):
    """Fine-tune a classifier of texts: rows of text (and text_pair) and label."""


if __name__ == "__main__":
    elastic.main(Classes, CONFIG)
