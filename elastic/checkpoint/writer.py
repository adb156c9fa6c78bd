"""Committing: makes the manifest from what all ranks tell about their packs, and creates it only if there is none."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastic import fault
from elastic.checkpoint.families import merge
from elastic.checkpoint.format import MANIFEST, Manifest, attempt_folder, pack_path, seal
from elastic.checkpoint.parsing import parse_manifest
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.reader import marked
from elastic.errors import DamagedCheckpoint
from elastic.storage import Storage


def commit(storage: Storage, attempt: str, manifest: Manifest, indexes: Sequence[Mapping[str, Any]]) -> Manifest:
    """Create the manifest. Only the keeper of a run calls this.

    Args:
        attempt: the name of the attempt that is committed.
        manifest: all fields but the tensors.
        indexes: what each rank tells about its pack, as `plan.statement` returns it.

    Returns:
        The manifest as it will be read back.

    Raises:
        FileExistsError: somebody else committed this attempt.
        CheckpointError: two ranks tell different things about one tensor.
        DamagedCheckpoint: the manifest could not be read back, or refers to an object that is missing or damaged.
    """
    folder = attempt_folder(manifest.step, attempt)
    name = f"{folder}/{MANIFEST}"
    head = replace(manifest, nonce=secrets.token_hex(8)).head
    whole = {**dict(sorted(head.items())), **merge(indexes)}  # the keys inside of `values` keep their order
    data = seal(json.dumps(whole, separators=(",", ":")).encode())
    found = parse_manifest(data, name)  # before the commit: no manifest may be committed that cannot be read back
    assert found.placement is not None
    elsewhere = {path for pack in found.placement.packs.values() for path in pack.elsewhere}
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
    return found
