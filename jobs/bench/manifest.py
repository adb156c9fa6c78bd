"""What a manifest costs by the number of shards: bytes, seconds, and how long the host answers nobody. No tensors.

A model of 7 billion parameters with what AdamW keeps of them (873 tensors), cut by fsdp. Plays the host that takes what
all workers say and commits it, and one worker that loads its part; storage is a local folder. The machine's other work
counts too.

said       bytes of all messages in which workers say what they wrote
index      bytes of what a worker reads beside the manifest, to load its own part in a world of the same size
write      seconds of the commit: put together, checked, stored
freeze     longest time in which the host's event loop answers nobody, while messages come in and during the commit
read       seconds in which a worker reads and checks the manifest and finds its own chunks

    python -m jobs.bench.manifest [--shards 8 64 256 1024 4096] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from elastic.checkpoint.chunks import find_chunks
from elastic.checkpoint.format import MANIFEST, Manifest, block_count
from elastic.checkpoint.pack_index import PackIndex, Place, put_index
from elastic.checkpoint.plan import Held, Wanted, numbers_of, plan_lines, plan_save, statement
from elastic.checkpoint.reader import Committed, read_manifest
from elastic.checkpoint.writer import commit
from elastic.placement import Part, TensorSpec
from elastic.storage import Storage
from jobs.bench.report import table, write_json

SHARDS = (8, 64, 256, 1024, 4096)
ATTEMPT = "1-1-1"
_LAYERS, _WIDTH, _INNER, _WORDS = 32, 4096, 11008, 32000
_TURN_S = 0.001


def model() -> list[TensorSpec]:
    """The tensors of a training state."""
    square, up, down, row = (_WIDTH, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER), (_WIDTH,)
    layer = {
        "q": square,
        "k": square,
        "v": square,
        "o": square,
        "gate": up,
        "up": up,
        "down": down,
        "n1": row,
        "n2": row,
    }
    shapes = {"embed": (_WORDS, _WIDTH), "norm": row, "head": (_WORDS, _WIDTH)}
    shapes |= {f"layers.{i}.{n}.weight": s for i in range(_LAYERS) for n, s in layer.items()}
    names = ("model/{}", "optimizer/{}/exp_avg", "optimizer/{}/exp_avg_sq")
    return [TensorSpec(n.format(name), "float32", s, (("shard", 0),)) for name, s in shapes.items() for n in names]


def held_by(specs: list[TensorSpec], rank: int, shards: int) -> list[Held]:
    part = Part.of([("shard", rank, shards)])
    return [Held(s.name, s.dtype, s.shape, s.box(part), cut=part.pieces(s.cut)) for s in specs]


def say(storage: Storage, folder: str, held: list[Held], rank: int) -> dict[str, Any]:
    """What a worker says of its pack; writes what its uploader writes beside it."""
    lines = plan_lines(held)
    writes = plan_save(held, lines=lines)
    places = {}
    for number, write in zip(numbers_of(lines, writes), writes):
        blocks = block_count(write.end - write.start)
        proofs = (f"{rank:032x}",) * blocks, (rank,) * blocks
        places[number] = Place(_pack(rank), write.start, write.end, *proofs)
    said = put_index(storage, folder, PackIndex.of(_pack(rank), places))
    return statement(_pack(rank), said["index"], said["used"], lines, held)


def _pack(rank: int) -> str:
    return f"rank-{rank:04d}.pack"


def all_say(storage: Storage, folder: str, specs: list[TensorSpec], shards: int, reader: int) -> list[str]:
    """The messages of all workers. Most hold as many bytes of each tensor as others do: they say the same of another
    part, and only the index that is read is written."""
    alike: dict[tuple[int, ...], dict[str, Any]] = {}
    shapes = sorted({spec.shape for spec in specs})
    messages = []
    for rank in range(shards):
        part = Part.of([("shard", rank, shards)])
        rows = tuple(part.box(shape, specs[0].cut).volume for shape in shapes)
        if rank in (0, reader) or rows not in alike:
            alike[rows] = said = say(storage, folder, held_by(specs, rank, shards), rank)
        else:
            stretches = [[digest, rank, *points] for digest, _, *points in alike[rows]["stretches"]]
            said = {**alike[rows], "pack": _pack(rank), "stretches": stretches, "families": []}
        messages.append(json.dumps(said))
    return messages


def answering(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` returns, done by another thread; its seconds, and the longest pause of an event loop meanwhile."""
    found: list[Any] = []
    longest = 0.0

    async def answer() -> float:
        nonlocal longest
        began = last = time.perf_counter()
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(_TURN_S)
            now = time.perf_counter()
            longest, last = max(longest, now - last - _TURN_S), now
        return last - began

    seconds = asyncio.run(answer())
    return found[0], seconds, longest


def measure(shards: int) -> dict[str, Any]:
    """All figures of one number of shards."""
    specs = model()
    with tempfile.TemporaryDirectory() as folder:
        storage, checkpoint = Storage(folder), Committed(1, ATTEMPT)
        rank = shards // 2
        said = all_say(storage, checkpoint.folder, specs, shards, rank)
        gc.collect()
        slowest, statements = 0.0, []
        for message in said:  # each is one turn of the host's event loop
            began = time.perf_counter()
            statements.append(json.loads(message))
            slowest = max(slowest, time.perf_counter() - began)
        head = Manifest(1, 0, "", {}, {})
        _, write_s, freeze_s = answering(lambda: commit(storage, ATTEMPT, head, statements))
        wanted = [Wanted(h.name, h.box) for h in held_by(specs, rank, shards)]
        began = time.perf_counter()
        manifest = read_manifest(storage, checkpoint)
        chunks = find_chunks(storage, checkpoint.folder, manifest, wanted)
        read_s = time.perf_counter() - began
        assert {c.pack for entry in chunks.values() for c in entry.chunks} == {_pack(rank)}
        index = storage.size(f"{checkpoint.folder}/rank-{rank:04d}.index")
        return {
            "shards": shards,
            "said_mb": sum(map(len, said)) / 1e6,
            "manifest_mb": storage.size(f"{checkpoint.folder}/{MANIFEST}") / 1e6,
            "index_mb": index / 1e6,
            "write_s": write_s,
            "freeze_s": max(freeze_s, slowest),
            "read_s": read_s,
        }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", type=int, default=SHARDS)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = [measure(shards) for shards in options.shards]
    print(
        table(
            ["shards", "said MB", "manifest MB", "index MB", "write s", "freeze s", "read s"],
            [list(r.values()) for r in rows],
        )
    )
    write_json(options.json, {"manifest": rows})


if __name__ == "__main__":
    main()
