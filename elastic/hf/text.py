"""From rows of text to samples and batches: tokens, which of them are trained, and padding."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic.errors import ConfigError
from elastic.job import MapDataset

IGNORED = -100  # the label of a token that is not trained, as everywhere in transformers
_MARKED = re.compile(r"\{%-?\s*generation\b")
Sample = dict[str, Any]


class Encoded:
    """Rows that are tokenised when they are fetched, so that nobody tokenises what others train on."""

    def __init__(self, rows: MapDataset, encode: Callable[[Mapping[str, Any]], Sample]):
        self._rows, self._encode = rows, encode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self._encode(self._rows[int(index)])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        fetch = getattr(self._rows, "__getitems__", None)
        wanted = [int(i) for i in indices]
        return [self._encode(row) for row in (fetch(wanted) if fetch else [self._rows[i] for i in wanted])]


class Packed:
    """All samples one after another, cut into blocks of `length` tokens; the last tokens, fewer than that, are left
    out. Every process holds all tokens: 16 bytes each."""

    def __init__(self, samples: Encoded, length: int):
        import numpy as np

        found = [samples[i] for i in range(len(samples))]
        self._length = length
        self._ids, self._labels = (
            np.concatenate([sample[key] for sample in found] or [np.zeros(0, np.int64)])
            for key in ("input_ids", "labels")
        )
        if len(self._ids) < length:
            raise ConfigError(f"--job.length is {length}, but all rows together have {len(self._ids)} tokens")

    def __len__(self) -> int:
        return len(self._ids) // self._length

    def __getitem__(self, index: int) -> Sample:
        here = slice(index * self._length, (index + 1) * self._length)
        return {"input_ids": self._ids[here], "labels": self._labels[here]}


def language_sample(tokenizer: Any, row: Mapping[str, Any], length: int | None) -> Sample:
    """A row to learn to write: `input_ids` and `labels`, int64 (tokens,); labels are IGNORED where nothing is trained.

    Args:
        row: `text`; `prompt` and `completion`, of which the second is trained; `messages`, of which those of the
            assistant are; or `input_ids`, with `labels` if not all are trained.
        length: most tokens.

    Raises:
        ConfigError: it has none of them.
    """
    import numpy as np

    end = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "input_ids" in row:
        ids = list(row["input_ids"])
        labels = list(row["labels"]) if row.get("labels") is not None else ids
    elif "messages" in row:
        ids, labels = _chat(tokenizer, row["messages"])
    elif "completion" in row:
        before = _without(tokenizer(row["prompt"])["input_ids"], end)
        after = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
        ids, labels = before + after, [IGNORED] * len(before) + after
    elif "text" in row:
        ids = labels = _without(tokenizer(row["text"])["input_ids"], end) + end
    else:
        raise ConfigError(_unknown(row, "text, prompt and completion, messages, or input_ids"))
    return {key: np.asarray(value[:length], np.int64) for key, value in (("input_ids", ids), ("labels", labels))}


def class_sample(tokenizer: Any, row: Mapping[str, Any], length: int) -> Sample:
    """A row to classify: what the tokenizer makes of `text` (and `text_pair`), int64 (tokens,), and its `label`.

    Raises:
        ConfigError: it has no text or no label.
    """
    import numpy as np

    if "text" not in row or "label" not in row:
        raise ConfigError(_unknown(row, "text and label"))
    found = tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=length)
    return {**{key: np.asarray(value, np.int64) for key, value in found.items()}, "label": int(row["label"])}


def padded(samples: Sequence[Sample], pad_id: int) -> dict[str, Any]:
    """A batch, padded at the end to its longest sample: int64 (samples, tokens), and `attention_mask` alike."""
    import numpy as np
    import torch

    longest = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": pad_id, "labels": IGNORED}
    batch = {
        key: np.full((len(samples), longest), fill.get(key, 0), np.int64)
        for key, value in samples[0].items()
        if isinstance(value, np.ndarray)
    }
    batch["attention_mask"] = np.zeros((len(samples), longest), np.int64)
    for i, sample in enumerate(samples):
        for key, value in sample.items():
            if key in batch:
                batch[key][i, : len(value)] = value
        batch["attention_mask"][i, : len(sample["input_ids"])] = 1
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def _without(ids: list[int], end: list[int]) -> list[int]:
    return ids[:-1] if end and ids[-1:] == end else ids


def _unknown(row: Mapping[str, Any], wanted: str) -> str:
    return f"rows() gave a row with the columns {', '.join(sorted(map(str, row)))}; give rows with {wanted}"


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and labels for what the assistant says."""
    if not tokenizer.chat_template:
        raise ConfigError("rows() gave messages, but the tokenizer has no chat template; set one in tokenizer()")
    if _MARKED.search(tokenizer.chat_template):
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, said = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        return ids, [i if s else IGNORED for i, s in zip(ids, said)]

    def tokens(part: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(part, return_dict=True, **options)["input_ids"])

    ids = tokens(messages)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokens(messages[:i], add_generation_prompt=True) if i else []
        until = tokens(messages[: i + 1])
        if ids[: len(before)] != before or ids[: len(until)] != until:
            raise ConfigError(
                "the tokenizer's chat template writes a message in another way when others follow, so what the "
                "assistant says cannot be told from it; mark it in the template with {% generation %}"
            )
        labels[len(before) : len(until)] = until[len(before) :]
    return ids, labels
