"""Names of weights in models that peft has put adapters (LoRA) into, and in the files of either."""

from __future__ import annotations

import re

#: What peft puts before every name of the model that it wraps.
PREFIX = "base_model.model."
_ADAPTER = re.compile(r"\.lora_\w+\.")
_NAMED = re.compile(r"(\.lora_\w+|\.modules_to_save)\.default(?=\.|$)")
_COPY = re.compile(r"\.(?:modules_to_save\.[^.]+|original_module)(?=\.)")


def source_name(name: str) -> str | None:
    """The name that a weight has without peft: in the files of the base model; None for one of an adapter's own.

    Of a module that is trained whole beside adapters, the copy and the original have the same name there.
    """
    if not name.startswith(PREFIX):
        return name
    if _ADAPTER.search(name):
        return None
    return _COPY.sub("", name.removeprefix(PREFIX)).replace(".base_layer.", ".")


def adapter_name(name: str) -> str | None:
    """The name that a weight has in `adapter_model.safetensors`, as peft writes it; None for one of the base model."""
    if not name.startswith(PREFIX) or not _NAMED.search(name):
        return None
    return _NAMED.sub(lambda found: "" if found[1] == ".modules_to_save" else found[1], name)
