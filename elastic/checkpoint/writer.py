"""Committing: the manifest, from the indexes of all ranks, created only if it is not there."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastic import fault
from elastic.checkpoint.format import MANIFEST, Manifest, attempt_folder, pack_path, parse_manifest
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.reader import marked
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.storage import Storage


def merge(indexes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One index of all ranks': name -> tensor entry, with the chunks of all.

    Raises:
        CheckpointError: ranks say different things of one tensor.
    """
    tensors: dict[str, Any] = {}
    for index in indexes:
        for name, entry in index.items():
            known = tensors.setdefault(name, {"dtype": entry["dtype"], "shape": list(entry["shape"]), "chunks": []})
            if (known["dtype"], known["shape"]) != (entry["dtype"], list(entry["shape"])):
                raise CheckpointError(
                    f"ranks differ in the tensor {name!r}: {known['dtype']} {known['shape']} and {entry['dtype']} "
                    f"{list(entry['shape'])}"
                )
            known["chunks"] += entry["chunks"]
    return tensors


def commit(storage: Storage, attempt: str, manifest: Manifest, indexes: Sequence[Mapping[str, Any]]) -> Manifest:
    """Create the manifest from all ranks' indexes. Only the keeper of a run calls this.

    Returns:
        the manifest as it is read back.

    Raises:
        FileExistsError: somebody else committed this attempt.
        DamagedCheckpoint: an index that could not be read again, or that refers to an object that is not whole.
    """
    folder = attempt_folder(manifest.step, attempt)
    name = f"{folder}/{MANIFEST}"
    data = replace(manifest, tensors=merge(indexes), nonce=secrets.token_hex(8)).to_json()
    whole = parse_manifest(data, name)  # nothing is committed that could not be read again
    elsewhere = {c.pack for t in whole.tensors.values() for c in t.chunks if "/" in c.pack}
    damaged = {c.folder for c in marked(storage)} if elsewhere else set()
    for pack in sorted(elsewhere):
        path = pack_path(folder, pack)
        if path.rpartition("/")[0] in damaged:
            raise DamagedCheckpoint(f"{path}, which this checkpoint refers to, is of one that was found damaged")
        if not patiently(storage.exists, path):
            raise DamagedCheckpoint(f"{path}, which this checkpoint refers to, is not there")
    fault.point("checkpoint.before_manifest", -1, manifest.step)
    patiently(storage.create, name, data)
    fault.point("checkpoint.after_manifest", -1, manifest.step)
    return whole
