"""A pretrained model's files on this machine: a folder, or the copy of what a name on the hub stands for."""

from __future__ import annotations

import functools
import os
from typing import Any

from elastic.errors import ConfigError, one_line

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@functools.cache
def local_folder(pretrained: str, revision: str | None = None, option: str = "--job.pretrained") -> str:
    """The folder with a model's config, tokenizer and weights. What is on the hub is fetched once a machine.

    Args:
        pretrained: a folder as `save_pretrained` writes it, or a name on the hub.
        option: where it came from, for messages.

    Raises:
        ConfigError: there is neither.
    """
    folder = os.path.abspath(os.path.expanduser(pretrained))
    if pretrained and os.path.isdir(folder):
        return folder
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(pretrained, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # of the hub's client, of many kinds
        raise ConfigError(
            f"{option} is {pretrained!r}, which is no folder here and cannot be had from the hub ({one_line(error)}); "
            "give a folder that save_pretrained wrote, or a name such as openai-community/gpt2"
        ) from error


@functools.cache
def weight_names(folder: str) -> frozenset[str]:
    """Names of the weights in a folder of safetensors.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    from elastic.checkpoint.initial import open_initial  # imports torch

    return frozenset(open_initial(folder, option="--job.pretrained").entries)


@functools.cache
def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder, read once a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def name_there(name: str, names: frozenset[str], prefix: str) -> str | None:
    """Which of the weights of a source is the one that a model has as `name`; None if it has none.

    A headless model is saved without the name (`prefix`) that models with a head keep it under, and older ones of BERT
    call the weights of a norm gamma and beta.
    """
    aged = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for one in (name, aged):
        for candidate in (one, one.removeprefix(f"{prefix}."), f"{prefix}.{one}"):
            if candidate in names:
                return candidate
    return None
