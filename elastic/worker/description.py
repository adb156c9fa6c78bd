"""A worker's description of its data, options, model and optimizer, for the workers that it is to train with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.parameter import is_lazy

from elastic.compat.torch import unsaved_buffers
from elastic.likeness import packed
from elastic.parallel.optimizers import parts_of
from elastic.parallel.wrapping import local
from elastic.values import show

_MOST_TEXT = 200
_MOST_SIGNS = 256
_PLAIN = (str, int, float, bool, type(None))


def describe_worker(data: Mapping[str, Any], **lines: list[str]) -> str:
    """The description as JSON, for `likeness.difference`.

    Args:
        data: for each data set, by the name of the method that made it, its `data.identity.identify`.
        lines: for everything else, lines of text by subject.
    """
    return json.dumps({"data": data, "lines": {subject: packed(found) for subject, found in lines.items()}})


def describe_options(options: Mapping[str, Any]) -> list[str]:
    """One line for each option, coded by `elastic.values`."""
    return [f"{name}={show(value)[:_MOST_TEXT]}" for name, value in sorted(comparable(options).items())]


def comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options whose texts are equal in every process: an object without a text of its own shows its address."""
    return {name: value for name, value in options.items() if " at 0x" not in str(value)}


def describe_model(model: nn.Module) -> list[str]:
    """One line for each parameter and each persistent buffer, in order."""
    lines = []
    for name, parameter in model.named_parameters():
        lines.append(f"parameter {name} {_shape(parameter)}{'' if parameter.requires_grad else ' frozen'}")
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in unsaved_buffers(module):
                lines.append(f"buffer {prefix}{'.' if prefix else ''}{name} {_shape(buffer)}")
    return lines


def describe_held(models: Mapping[str, nn.Module]) -> list[str]:
    """One line for each tensor of models that are not part of the trained one, with a digest of the signs of some of
    its
    elements: other kernels change the last bits of an initial value, but only another model has other signs."""
    return [
        f"{held}.{name} {_shape(tensor)} signs {_signs(tensor)}"
        for held, model in models.items()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


def describe_frozen(models: Mapping[str, nn.Module]) -> list[str]:
    """A line for each tensor of models that are never trained, with a digest of all its bytes."""
    return [
        f"{held}.{name} {_shape(tensor)} {_bytes_digest(tensor)}"
        for held, model in models.items()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


def _bytes_digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(memoryview(flat.numpy()))  # type: ignore[arg-type]


def _signs(tensor: torch.Tensor) -> str:
    if tensor.is_meta or is_lazy(tensor) or tensor.layout is not torch.strided:
        return "unknown"
    flat = local(tensor).detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _MOST_SIGNS)]
    return xxhash.xxh3_64_hexdigest((some.real > 0).cpu().numpy().tobytes())


def describe_optimizer(optimizer: torch.optim.Optimizer) -> list[str]:
    """The optimizer's class, or the classes of its parts, and one line for each group."""
    kinds = map(type, parts_of(optimizer))
    lines = [f"class {kind.__module__}.{kind.__qualname__}" for kind in kinds]
    for i, group in enumerate(optimizer.param_groups):
        options = [f"{k}={v!r}" for k, v in sorted(group.items()) if _is_plain(v)]
        lines.append(f"group {i} of {len(group['params'])} parameters, {', '.join(options)}"[:_MOST_TEXT])
    return lines


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _shape(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return kind if is_lazy(tensor) else f"{kind}{list(tensor.shape)}"
