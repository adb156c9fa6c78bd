"""What the job's `sample()` makes: texts, and pictures as PNG files in the run's folder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from elastic.errors import ConfigError, ElasticError
from elastic.parallel import modes
from elastic.parallel.wrapping import call_gathered
from elastic.seeds import derive, seed_all
from elastic.worker.user_code import takes
from elastic.worker.worker import Worker

FOLDER = "samples"
_COLOURS = {1: 0, 3: 2, 4: 6}  # types of PNG, by channels
_MOST = 20_000  # characters of a text that go into the ledger


def sample(worker: Worker, model: torch.nn.Module, step: int, *, leads: bool) -> str | None:
    """Call the job's `sample()`; where this worker leads, an event says what it made, for callbacks.

    Of a cut model all workers call this at one time. Modes are afterwards what they were before.

    Returns:
        its texts as one; None where there are none, or, with an event, where it raises.
    """
    code, kept = worker.code, modes.of(model)
    code.where = f"sample() after step {step}"
    model.eval()
    seed_all(derive("sample", worker.config.run.seed, step))
    try:
        with torch.no_grad():
            function: Callable[..., Any] = worker.job.sample
            given = (model, step) if takes(function, model, step) else (model,)
            found = code.guard(lambda: call_gathered(model, lambda: function(*given)))
            texts, pictures = code.guard(lambda: parted(found))
            if leads and (texts or pictures):
                _report(worker, step, texts, pictures)
    except (ElasticError, OSError) as error:  # of the job's code; or another worker's failed, where the model is cut
        why = error.__cause__ or error
        detail = f"sample() failed, {type(why).__name__}: {why}\n{error}"
        worker.link.event("sample_failed", step, detail)
        return None
    finally:
        modes.restore(model, kept)
    return "\n".join(texts.values()) if texts else None


def _report(worker: Worker, step: int, texts: Mapping[str, str], pictures: Mapping[str, bytes]) -> None:
    paths = {}
    for i, (name, data) in enumerate(pictures.items()):
        plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
        paths[name] = f"{FOLDER}/{step:08d}/{i}-{plain}.png"
        worker.storage.replace(paths[name], data)
    worker.link.event("sample", step, {"texts": {k: v[:_MOST] for k, v in texts.items()}, "pictures": paths})


def parted(found: Any) -> tuple[dict[str, str], dict[str, bytes]]:
    """Texts and pictures (as PNG) by name, of what `sample()` returned; a text alone is called `sample`.

    Raises:
        ConfigError: one is neither.
    """
    if found is None:
        return {}, {}
    if not isinstance(found, Mapping):
        return {"sample": str(found)}, {}
    texts, pictures = {}, {}
    for name, one in found.items():
        if isinstance(one, (np.ndarray, torch.Tensor)):
            pictures[str(name)] = png(one, str(name))
        elif isinstance(one, (str, int, float)):
            texts[str(name)] = str(one)
        else:
            raise ConfigError(
                f"sample()[{name!r}] is a {type(one).__name__}; return a text, or a picture as an array of shape "
                "(height, width, channels)"
            )
    return texts, pictures


def png(picture: np.ndarray | torch.Tensor, name: str) -> bytes:
    """A picture as PNG: uint8, or floating-point from 0 to 1, of shape (height, width) or (height, width, 1|3|4).

    Raises:
        ConfigError: it is of another shape or dtype.
    """
    if isinstance(picture, torch.Tensor):
        here = picture.detach().cpu()
        picture = (here.float() if here.is_floating_point() else here).numpy()
    given = picture
    picture = picture[:, :, None] if picture.ndim == 2 else picture
    floating = picture.dtype.kind == "f"
    if picture.ndim != 3 or picture.shape[2] not in _COLOURS or not (floating or picture.dtype == np.uint8):
        raise ConfigError(
            f"sample()[{name!r}] is {given.dtype} of shape {given.shape}; give a picture as uint8, or floating-point "
            "from 0 to 1, of shape (height, width) or (height, width, 1, 3 or 4)"
        )
    if floating:
        picture = np.rint(np.nan_to_num(picture).clip(0, 1) * 255).astype(np.uint8)
    height, width, channels = picture.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # the first byte of each: no filter
    rows[:, 1:] = picture.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body
