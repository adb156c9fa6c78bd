"""Imports safetensors or torch.distributed.checkpoint as a committed checkpoint of a run that is not live."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from elastic.checkpoint.blocks import crc_blocks, hash_blocks
from elastic.checkpoint.fields import check_name
from elastic.checkpoint.format import MANIFEST, Manifest, attempt_folder, step_folder
from elastic.checkpoint.initial import SUFFIX, open_initial
from elastic.checkpoint.loader import fill
from elastic.checkpoint.pack_index import PackIndex, Place, put_index
from elastic.checkpoint.plan import Held, numbers_of, plan_lines, plan_save, statement
from elastic.checkpoint.reader import newest_first
from elastic.checkpoint.tensors import DTYPES, NAMES, Shard, tensor_bytes
from elastic.checkpoint.writer import commit
from elastic.errors import CheckpointError, ConfigError
from elastic.placement import Box
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from elastic.tools import dcp
from elastic.tools.exporting import BATCH_BYTES, NOTE, WEIGHTS, grouped
from elastic.tools.output import Stream
from elastic.tools.progress import held_back
from elastic.tools.target import Hold, hold

WEIGHTS_ONLY = {"weights_only": True}
PACK = "rank-0000.pack"
Read = Callable[[list[str]], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Source:
    """What is imported: the dtype and shape of each tensor by its name in the source, a function that reads some of
    them, and the note of a full export."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Read
    note: dict[str, Any] | None


@dataclass(frozen=True)
class Imported:
    """What was committed."""

    step: int
    attempt: str
    tensors: int
    bytes: int
    full: bool
    newest: int


def import_checkpoint(
    url: str,
    source_url: str,
    *,
    step: int | None = None,
    prefix: str = "",
    on_total: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> Imported:
    """Commit what lies at `source_url` as a checkpoint of the run at `url`, which may be a new run.

    A full export becomes a full checkpoint, of its own step. Any other source has weights only: a run that resumes from
    them makes the state of its optimizer anew.

    Args:
        step: of the checkpoint; by default that of a full export, or 0.
        prefix: for sources without a note: take only tensors whose names begin with this, and cut it off.

    Raises:
        ConfigError: the source cannot be read, the step has a checkpoint, or the run is live (with its owner).
        CheckpointError: the source is damaged.
        FencedError: somebody began to drive the run meanwhile; nothing was imported.
    """
    source = open_source(source_url)
    names = _names(source, prefix, source_url)
    storage = Storage(url, option="URL")
    storage.probe()
    step = step if step is not None else source.note["step"] if source.note else 0
    if step < 0:
        raise ConfigError(f"--step is {step}; give 0 or more")
    committed = list(newest_first(storage))
    if any(c.step == step for c in committed):
        raise ConfigError(f"{storage.url} has a committed checkpoint of step {step}; give another --step")
    note = source.note or {}
    with hold(RunFolder(storage), "change") as held:
        attempt = f"{held.epoch}-0-import"
        manifest = Manifest(
            step,
            note.get("seed", 0),
            note.get("config_digest", ""),
            {"size": 1, "generation": f"{held.epoch}-0"},
            note.get("values", WEIGHTS_ONLY),
            metrics=note.get("metrics", {}),
        )
        whole = write_checkpoint(storage, attempt, manifest, source, names, held, on_total)
    newest = max([step, *(c.step for c in committed)])
    return Imported(step, attempt, len(names), whole.nbytes, source.note is not None, newest)


def write_checkpoint(
    storage: Storage,
    attempt: str,
    manifest: Manifest,
    source: Source,
    names: dict[str, str],
    held: Hold,
    on_total: Callable[[int], Callable[[int], None]],
) -> Manifest:
    """Write tensors as one pack and commit it, unless somebody claimed the run meanwhile. An error leaves nothing
    behind.

    Args:
        names: the tensors to take: name in the checkpoint -> name in the source.
        held: the claim on the run.
    """
    folder = attempt_folder(manifest.step, attempt)
    try:
        index = _write_pack(storage, folder, source, names, on_total)
        held.check()
        with held_back():  # an interruption after the commit would remove what is committed
            return commit(storage, attempt, manifest, [index])
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            if not storage.exists(f"{folder}/{MANIFEST}"):
                storage.remove(folder)
                if not storage.names(step_folder(manifest.step)):
                    storage.remove(step_folder(manifest.step))
        raise


def _write_pack(
    storage: Storage,
    folder: str,
    source: Source,
    names: dict[str, str],
    on_total: Callable[[int], Callable[[int], None]],
) -> dict[str, Any]:
    """Stream the tensors into one pack, and return what a rank tells about its pack (`plan.statement`)."""
    held = []
    for name, theirs in names.items():
        dtype, shape = source.tensors[theirs]
        held.append(Held(name, dtype, shape, Box.whole(shape)))
    lines = plan_lines(held)
    writes = plan_save(held, lines=lines)
    places: dict[int, Place] = {}
    numbers = iter(numbers_of(lines, writes))
    total = writes[-1].end if writes else 0
    on_bytes = on_total(total)
    with Stream(storage, f"{folder}/{PACK}", total) if total else contextlib.nullcontext() as stream:
        for some in grouped(writes, [w.end - w.start for w in writes], BATCH_BYTES):
            tensors = source.read([names[held[w.source].name] for w in some])
            for write, tensor in zip(some, tensors, strict=True):
                data = tensor_bytes(tensor)
                places[next(numbers)] = Place(PACK, write.start, write.end, hash_blocks(data), crc_blocks(data))
                assert stream is not None
                stream.write(data)
                on_bytes(len(data))
    said = put_index(storage, folder, PackIndex.of(PACK, places))
    return statement(PACK, said["index"], said["used"], lines, held)


def _names(source: Source, prefix: str, url: str) -> dict[str, str]:
    """Choose the tensors to take: name in the checkpoint -> name in the source."""
    if source.note is not None:
        if prefix:
            raise ConfigError(f"--prefix is {prefix!r}, but {url} is a full export, which is taken whole; leave it out")
        names = source.note["names"]
        if set(names) != set(source.tensors):
            raise CheckpointError(f"{url} has other tensors than it says")
        found = {saved: theirs for theirs, saved in names.items()}
    else:
        found = {WEIGHTS + n.removeprefix(prefix): n for n in sorted(source.tensors) if n.startswith(prefix)}
    if not found:
        shown = sorted(source.tensors)[:3]
        raise ConfigError(
            f"--prefix is {prefix!r}, but no tensor of {url} begins with it (it has {shown}); give another"
        )
    for name in found:
        check_name(name)
    return found


# ---- sources -------------------------------------------------------------------------------------------------------


def open_source(url: str) -> Source:
    """Open what lies at `url`: a folder of DCP, or safetensors.

    Raises:
        ConfigError: it is neither.
    """
    if not url.endswith(SUFFIX):
        storage = Storage(url, option="SOURCE", read_only=True)
        try:
            found = dcp.open_dcp(storage) if dcp.is_dcp(storage) else None
        except CheckpointError as error:
            raise ConfigError(f"SOURCE is {url!r}, which cannot be read: {error}; give another") from error
        if found is not None:
            return _dcp_source(found, url)
    return _safetensors_source(url)


def _dcp_source(opened: dcp.Opened, url: str) -> Source:
    def read(names: list[str]) -> Iterator[torch.Tensor]:
        return (opened.tensor(name) for name in names)

    tensors = {n: (NAMES[t.properties.dtype], tuple(t.size)) for n, t in opened.tensors.items()}
    note = _parse_note(opened.text(NOTE), url) if NOTE in opened.others else None
    return Source(tensors, read, note)


def _safetensors_source(url: str) -> Source:
    opened = open_initial(url, option="SOURCE")

    def read(names: list[str]) -> Iterator[torch.Tensor]:
        entries = {name: opened.entries[name][1] for name in names}
        tensors = {name: torch.empty(e.shape, dtype=DTYPES[e.dtype]) for name, e in entries.items()}
        fill(opened.storage, entries, [Shard.whole(name, tensor) for name, tensor in tensors.items()])
        return iter(tensors[name] for name in names)

    tensors = {name: (entry.dtype, entry.shape) for name, (_, entry) in opened.entries.items()}
    notes = [n for n in (_metadata(opened.storage, file).get(NOTE) for file in opened.files) if n is not None]
    return Source(tensors, read, _parse_note(notes[0], url) if notes else None)


def _metadata(storage: Storage, file: str) -> dict[str, Any]:
    """Return the free part of a header, which `open_initial` has checked."""
    length = int.from_bytes(storage.read(file, 0, 8), "little")
    return json.loads(storage.read(file, 8, 8 + length)).get("__metadata__") or {}


def _parse_note(text: Any, url: str) -> dict[str, Any]:
    """Parse the note of a full export.

    Raises:
        ConfigError: it is not as `exporting` writes it.
    """
    try:
        note = json.loads(text)
        kinds = {"step": int, "seed": int, "config_digest": str, "values": dict, "metrics": dict, "names": dict}
        fits = note["format"] == 1 and all(type(note[key]) is kind for key, kind in kinds.items())
        fits = fits and note["step"] >= 0 and all(isinstance(n, str) for n in note["names"].values())
        fits = fits and len(set(note["names"].values())) == len(note["names"])
    except (TypeError, ValueError, KeyError, RecursionError):
        fits = False
    if not fits:
        raise ConfigError(f"SOURCE is {url!r}, whose entry {NOTE!r} is not what an export writes; give another")
    return note
