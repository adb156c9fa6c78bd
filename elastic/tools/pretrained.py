"""What `from_pretrained` needs beside weights (config, generation options, tokenizer), and the names of weights
there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic import adapters
from elastic.checkpoint.format import Manifest
from elastic.errors import ConfigError
from elastic.hf.files import ADAPTER_CONFIG, CONFIG, FILES, GENERATION_CONFIG
from elastic.hf.source import local_folder
from elastic.values import decode

_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Pretrained:
    """A folder that `from_pretrained` opens.

    Args:
        folder: the folder, or name on the hub, from which config and tokenizer are copied. A config that the job keeps
            in its checkpoints has precedence.
        adapter: write the adapters alone, for `PeftModel.from_pretrained`, instead of a model.
    """

    folder: str | None
    adapter: bool = False

    @property
    def stem(self) -> str:
        """The beginning of the names of the files with weights."""
        return "adapter_model" if self.adapter else "model"

    def named(self, manifest: Manifest, weights: str) -> Callable[[str], str | None]:
        """Return a function from a weight's name in the checkpoint to its name in the folder; None if the weight is
        left out.

        Raises:
            ConfigError: the checkpoint has adapters and a whole model is wanted, or the other way round.
        """
        wrapped = any(name.startswith(weights + adapters.PREFIX) for name in manifest.tensors)
        if self.adapter and not wrapped:
            raise ConfigError("--adapter was given, but the weights are those of a whole model; leave it out")
        if wrapped and not self.adapter:
            raise ConfigError(
                "--hf was given, but the weights are those of adapters over a base model; give --adapter too, and make "
                "one model of both with PeftModel.from_pretrained(BASE, OUT).merge_and_unload()"
            )
        return adapters.adapter_name if self.adapter else lambda name: name

    def files(self, manifest: Manifest, dtype: str | None) -> dict[str, bytes]:
        """Return the small files by name.

        Args:
            dtype: to which weights were converted, if they were.

        Raises:
            ConfigError: there is no config.
        """
        found: dict[str, bytes] = {}
        needed = ADAPTER_CONFIG if self.adapter else CONFIG
        wanted = {needed} if self.adapter else {CONFIG, GENERATION_CONFIG}
        if self.folder is not None:
            here = Path(local_folder(self.folder, option="--hf"))
            found = {name: (here / name).read_bytes() for name in {*_TOKENIZER, *wanted} if (here / name).is_file()}
        kept = _kept(manifest)
        found |= {name: text.encode() for name, text in kept.items() if name in wanted}
        if needed not in found:
            raise ConfigError(
                f"neither the checkpoint nor --hf {self.folder or '(which was not given)'} has {needed}; give a folder "
                "that has one with --hf"
            )
        if dtype is not None and CONFIG in found:
            found[CONFIG] = (json.dumps({**json.loads(found[CONFIG]), "dtype": dtype}, indent=2) + "\n").encode()
        return dict(sorted(found.items()))


def _kept(manifest: Manifest) -> Mapping[str, str]:
    """Return the files that a job of `elastic.hf` keeps in its checkpoints."""
    extra: Any = manifest.values.get("extra") or {}
    coded = extra.get(FILES) if isinstance(extra, dict) else None
    return decode(coded) if coded is not None else {}
