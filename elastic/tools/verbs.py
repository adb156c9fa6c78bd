"""The verbs of `elastic` for stored runs: their options, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from elastic.errors import ConfigError, ElasticError, Interrupted
from elastic.tools.places import USUAL, find_run
from elastic.tools.text import show

_DTYPES = ("float64", "float32", "float16", "bfloat16")


def add_verbs(verbs: Any) -> None:
    """Add `checkpoints` and `prune`; each sets `run`, which takes the arguments and returns the exit code."""
    group = verbs.add_parser("checkpoints", help="list, verify, export, import and remove checkpoints of a run")
    inner = group.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        parser = inner.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        what = f"folder or URL of a run, such as runs/mine or s3://bucket/mine, or its name in {USUAL}"
        parser.add_argument("url", metavar="URL", type=find_run, help=what)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)
        return parser

    add("ls", _ls, "list committed checkpoints").add_argument(
        "--verify", action="store_true", help="read every block, as verify does"
    )
    _step(add("show", _show, "show what a checkpoint has: values, and each tensor and where its bytes lie"))
    _step(add("verify", _verify, "read every block and compare it with its checksums"), "all")
    parser = add("export", _export, "write weights as safetensors, or everything for torch.distributed.checkpoint")
    parser.add_argument("out", metavar="OUT", help="a file *.safetensors, or a folder that is not there yet")
    parser.add_argument("--format", choices=("safetensors", "dcp"), default="safetensors")
    parser.add_argument("--full", action="store_true", help="everything, so that an import can go on from it")
    parser.add_argument("--dtype", help=f"convert floating-point weights: {', '.join(_DTYPES)}, ...")
    what = "a folder for from_pretrained: tokenizer and config are taken from this folder, or this name on the hub"
    parser.add_argument("--hf", metavar="FOLDER", help=what)
    parser.add_argument("--adapter", action="store_true", help="adapters alone, for PeftModel.from_pretrained")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="cut a folder of safetensors (default 5GB)")
    _step(parser)
    parser = add("import", _import, "commit safetensors or a DCP folder as a checkpoint of a run, which may be new")
    parser.add_argument("source", metavar="SOURCE", help="a file *.safetensors, or a folder of them or of DCP")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default that of a full export, else 0)")
    parser.add_argument("--prefix", default="", help="take only tensors whose names begin so, and cut that off")
    parser = add("prune", _prune, "remove checkpoints that the run's options, or these, do not keep")
    parser.add_argument("--keep-last", type=int, metavar="N", help="newest to keep")
    parser.add_argument("--keep-every", type=int, metavar="STEPS", help="keep those at multiples of this")
    parser.add_argument("--keep-best", type=int, metavar="N", help="keep the best by --metric")
    parser.add_argument("--metric", help="such as eval/loss")
    parser.add_argument("--mode", choices=("min", "max"), help="whether less or more of the metric is better")
    parser.add_argument("--yes", action="store_true", help="do it; else it is only shown")
    parser = add("pin", _pin, "keep a checkpoint until it is unpinned")
    parser.add_argument("--unpin", action="store_true", help="let it go when its time comes")
    _step(parser)

    text = "remove whole runs, never a live, pinned or best one"
    parser = verbs.add_parser("prune", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("url", metavar="URL", nargs="?", default=USUAL, help=f"folder or URL of runs (default {USUAL})")
    parser.add_argument("--older-than", required=True, metavar="AGE", help="not driven for so long, for example 30d")
    parser.add_argument("--keep-final", action="store_true", help="keep the records and the newest checkpoint of each")
    parser.add_argument("--yes", action="store_true", help="do it; else it is only shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_prune_runs)


def _step(parser: argparse.ArgumentParser, default: str = "the newest") -> None:
    parser.add_argument("--step", type=int, help=f"of this step (default {default})")


def run(arguments: argparse.Namespace) -> int:
    """Carry out a verb, and return the exit code.

    Raises:
        ElasticError: the message is one sentence for the user.
    """
    from elastic.tools.progress import interruptible

    try:
        with interruptible():
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        left = "nothing of it is left"
        if "prune" in getattr(arguments.run, "__name__", ""):
            left = "the next prune does the rest"
        elif hasattr(arguments, "timeout"):
            left = "what the run was asked it does all the same"
        raise Interrupted(f"interrupted; {left}") from None
    except ElasticError:
        raise
    except Exception as error:
        from elastic.checkpoint.patience import is_from_storage

        if not is_from_storage(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ElasticError(f"storage failed while working on {arguments.url}: {reason}") from error


def _bar(doing: str, unit: str, stack: Any) -> Callable[[int], Callable[[int], None]]:
    from elastic.tools.progress import progress

    return lambda total: stack.enter_context(progress(doing, total, unit=unit))


# ---- looking -------------------------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace) -> int:
    from elastic.tools.inspecting import list_checkpoints, unfinished
    from elastic.tools.target import open_run
    from elastic.tools.text import age_text, size_text, table

    folder = open_run(arguments.url, read_only=True)
    storage = folder.storage
    bad: dict[tuple[int, str], str] = {}
    if arguments.verify:
        for damage in _verified(folder, None)[0].damages:
            bad.setdefault((damage.step, damage.attempt), f"{damage.object}: {damage.problem}")
    found = [asdict(c) for c in list_checkpoints(storage)]
    for one in found:
        problem = bad.get((one["step"], one["attempt"]), one["problem"])
        if arguments.verify:
            one["state"], one["problem"] = "damaged" if problem else "verified", problem
    left = unfinished(storage)

    def text() -> str:
        rows = [
            (
                c["step"],
                c["generation"],
                c["attempt"],
                size_text(c["bytes"]),
                age_text(c["age_s"]),
                "yes" if c["pinned"] else "",
                c["state"] + (f": {c['problem']}" if c["problem"] else ""),
            )
            for c in found
        ]
        head = ("step", "generation", "attempt", "size", "age", "pinned", "state")
        shown = table(head, rows, "step,size,age") if rows else "no committed checkpoint"
        return shown + (f"\n{len(left)} unfinished: {', '.join(left[:3])}" if left else "")

    show(arguments, {"checkpoints": found, "unfinished": left}, text)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from elastic.tools.inspecting import describe
    from elastic.tools.target import choose, open_run

    storage = open_run(arguments.url, read_only=True).storage
    found = describe(storage, choose(storage, arguments.step))
    show(arguments, found, partial(_shown, found))
    return 0


def _shown(found: dict[str, Any]) -> str:
    from elastic.tools.text import size_text, table

    plain = {k: v for k, v in found.items() if k not in ("tensors", "values", "bytes")}
    lines = [f"{k:<14} {v if isinstance(v, (int, str)) else json.dumps(v)}" for k, v in plain.items()]
    lines += [f"{'bytes':<14} {found['bytes']} ({size_text(found['bytes'])})", "", "values"]
    lines += [f"  {k:<12} {json.dumps(v)}" for k, v in found["values"].items()]
    rows = []
    for name, tensor in found["tensors"].items():
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        for i, c in enumerate(tensor["chunks"] or [None]):
            first = (name, tensor["dtype"], shape, tensor["bytes"]) if i == 0 else ("", "", "", "")
            box = "" if c is None else ", ".join(f"{o}:{o + s}" for o, s in zip(c["offsets"], c["sizes"]))
            rows.append((*first, f"[{box}]", "" if c is None else f"{c['object']} {c['start']}:{c['end']}"))
    return "\n".join(lines) + "\n\n" + table(("tensor", "dtype", "shape", "bytes", "chunk", "object"), rows, "bytes")


def _verified(folder: Any, step: int | None) -> tuple[Any, Any]:
    from contextlib import ExitStack

    from elastic.checkpoint.reader import with_manifest
    from elastic.tools.inspecting import verify
    from elastic.tools.marking import mark_found

    checkpoints = [c for c in with_manifest(folder.storage) if step in (None, c.step)]
    with ExitStack() as stack:
        found = verify(folder.storage, checkpoints, _bar("verifying", "bytes", stack))
    return found, mark_found(folder, checkpoints, found)


def _verify(arguments: argparse.Namespace) -> int:
    from elastic.checkpoint.reader import with_manifest
    from elastic.tools.target import choose, open_run
    from elastic.tools.text import size_text

    folder = open_run(arguments.url, read_only=True)
    if not any(arguments.step in (None, c.step) for c in with_manifest(folder.storage)):
        choose(folder.storage, arguments.step)  # raises with a list of the steps that there are
    found, marks = _verified(folder, arguments.step)

    def text() -> str:
        what = f"{found.checkpoints} checkpoints, {found.blocks} blocks, {size_text(found.bytes)}"
        last = f"{what}: {len(found.damages)} damaged" if found.damages else f"{what}: all as written"
        return "\n".join([*map(str, found.damages), *_marks_text(marks), last])

    show(arguments, {**asdict(found), "marks": asdict(marks)}, text)
    return 1 if found.damages else 0


def _marks_text(marks: Any) -> list[str]:
    lines = [f"step {step}: marked, nothing counts it any more" for step in marks.marked]
    lines += [f"step {step}: it is whole again and counts" for step in marks.unmarked]
    return [*lines, f"not marked: {marks.problem}"] if marks.problem else lines


# ---- moving --------------------------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from elastic.checkpoint.initial import SUFFIX
    from elastic.tools.exporting import export
    from elastic.tools.pretrained import Pretrained
    from elastic.tools.sweeps import best_run
    from elastic.tools.target import choose, open_run
    from elastic.tools.text import parse_size, size_text

    url, step = arguments.url, arguments.step
    if (best := best_run(url)) is not None:  # of a sweep: its best trial
        url, step = best[0], best[1] if step is None else step
    storage = open_run(url, read_only=True).storage
    checkpoint = choose(storage, step)
    size = arguments.max_shard_size
    pretrained = Pretrained(arguments.hf, arguments.adapter) if arguments.hf or arguments.adapter else None
    if size is None and arguments.format == "safetensors" and not arguments.out.endswith(SUFFIX):
        size = None if arguments.adapter else "5GB"  # peft reads one file only
    with ExitStack() as stack:
        found = export(
            storage,
            checkpoint,
            arguments.out,
            kind=arguments.format,
            full=arguments.full,
            dtype=arguments.dtype,
            max_shard_bytes=None if size is None else parse_size("--max-shard-size", size),
            pretrained=pretrained,
            on_total=_bar("exporting", "bytes", stack),
        )

    def text() -> str:
        return f"step {found.step}: {found.tensors} tensors, {size_text(found.bytes)}, in {arguments.out}"

    show(arguments, asdict(found), text)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from elastic.tools.importing import import_checkpoint
    from elastic.tools.text import size_text

    with ExitStack() as stack:
        found = import_checkpoint(
            arguments.url,
            arguments.source,
            step=arguments.step,
            prefix=arguments.prefix,
            on_total=_bar("importing", "bytes", stack),
        )

    def text() -> str:
        what = "the whole state" if found.full else "weights alone"
        lines = [
            f"step {found.step}, attempt {found.attempt}: {found.tensors} tensors, {size_text(found.bytes)}, {what}"
        ]
        if found.newest > found.step:
            lines.append(f"the run has a checkpoint of step {found.newest}, from which it will resume")
        return "\n".join(lines)

    show(arguments, asdict(found), text)
    return 0


# ---- keeping and removing ------------------------------------------------------------------------------------------


def _pin(arguments: argparse.Namespace) -> int:
    from elastic.checkpoint.reader import newest_first
    from elastic.checkpoint.retention import pin, pins, unpin
    from elastic.errors import CheckpointError
    from elastic.tools.target import choose, open_run

    storage = open_run(arguments.url).storage
    if arguments.unpin:
        step = arguments.step if arguments.step is not None else choose(storage, None).step
        if step not in pins(storage):
            known = ", ".join(map(str, sorted(pins(storage)))) or "none"
            raise ConfigError(f"--step is {step}, which is not pinned (pinned: {known}); give one that is")
        unpin(storage, step)
    else:
        step = choose(storage, arguments.step).step
        pin(storage, step)
        if step not in {c.step for c in newest_first(storage)}:  # the retention of a live run was faster
            unpin(storage, step)
            raise CheckpointError(f"the checkpoint of step {step} was removed by its run at this moment; pin another")
    values = {"step": step, "pinned": not arguments.unpin}
    show(arguments, values, lambda: f"step {step} is {'not pinned any more' if arguments.unpin else 'pinned'}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from elastic.tools.live import connect
    from elastic.tools.pruning import check_keep, policy_of, prune_checkpoints, prune_live
    from elastic.tools.target import open_run
    from elastic.tools.text import size_text, table

    folder = open_run(arguments.url)
    given = {
        "last": arguments.keep_last,
        "every": arguments.keep_every,
        "best": arguments.keep_best,
        "metric": arguments.metric,
        "mode": arguments.mode,
    }
    if folder.live_driver() is not None:
        check_keep(arguments.keep_last, arguments.keep_every, arguments.keep_best)
        given = {name: value for name, value in given.items() if value is not None}
        found = prune_live(connect(folder, "prune"), given, yes=arguments.yes)
    else:
        found = prune_checkpoints(folder, policy_of(folder, **given), yes=arguments.yes)

    def text() -> str:
        if not found:
            return "nothing to remove"
        rows = [(r.step, r.attempt, "checkpoint" if r.committed else "unfinished", size_text(r.bytes)) for r in found]
        shown = table(("step", "attempt", "what", "size"), rows, "step,size")
        return f"{shown}\n{_outcome(arguments.yes, size_text(sum(r.bytes for r in found)))}"

    show(arguments, {"removed" if arguments.yes else "would_remove": [asdict(r) for r in found]}, text)
    return 0


def _outcome(yes: bool, what: str) -> str:
    return f"removed {what}" if yes else f"would remove {what}; nothing was done, give --yes"


def _prune_runs(arguments: argparse.Namespace) -> int:
    import time
    from contextlib import ExitStack

    from elastic.tools.pruning import decide, look_at_runs, prune_runs
    from elastic.tools.text import age_text, parse_age, table

    older_s = parse_age("--older-than", arguments.older_than)
    storage, runs = look_at_runs(arguments.url)
    decisions = decide(runs, time.time(), older_s, keep_final=arguments.keep_final)
    problems: Sequence[tuple[str, str]] = []
    if arguments.yes:
        with ExitStack() as stack:
            problems = prune_runs(storage, decisions, _bar("removing", "runs", stack))
    for name, problem in problems:
        print(f"error: {name} is left as it is: {problem}", file=sys.stderr)

    def text() -> str:
        if not decisions:
            return f"no run in {storage.url}"
        rows = [(d.name, d.status, age_text(d.age_s), d.do, d.why) for d in decisions]
        chosen = sum(d.do != "keep" for d in decisions) - len(problems)
        what = f"{chosen} of {len(decisions)} runs" + (", but for final checkpoints" if arguments.keep_final else "")
        return f"{table(('run', 'status', 'age', 'do', 'why'), rows, 'age')}\n{_outcome(arguments.yes, what)}"

    values = {"done": arguments.yes, "runs": [asdict(d) for d in decisions], "problems": dict(problems)}
    show(arguments, values, text)
    return 1 if problems else 0
