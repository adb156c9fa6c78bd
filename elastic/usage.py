"""Finds what is wrong with a command line: one sentence that names the option, its value and the fix. Pure.

People use the option names of other trainers (`--epochs 5`, `--lr 0.1`): the sentence then names ours.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elastic.errors import ConfigError

if TYPE_CHECKING:
    from elastic.options import Option

FILE = "--config"  # gives a file of options
OTHERS = ("--help", "-h", "--help-all")
_WORDS = [  # option names of other trainers, and what to give here; `{}` stands for the value that was given
    ("epochs epoch num-epochs n-epochs max-epochs num-train-epochs", "--run.duration {}ep"),
    ("steps max-steps num-steps max-iters iterations iters train-steps total-steps", "--run.duration {}st"),
    ("batch-size bs train-batch-size batch per-device-train-batch-size", "--batch.global-size {}, that of all workers"),
    (
        "gradient-accumulation-steps accumulate-grad-batches grad-accum accumulation-steps accum",
        "--batch.pass-size, the samples of one pass; a worker's share of --batch.global-size is cut into such passes",
    ),
    (
        "resume resume-from resume-from-checkpoint restore ckpt ckpt-path continue",
        "--run.name NAME, which resumes the run of that name",
    ),
    ("name run-name experiment experiment-name", "--run.name {}"),
    ("output-dir out-dir out output save-dir log-dir logdir save-path checkpoint-dir root-dir", "--run.storage {}"),
    (
        "workers nproc-per-node nproc world-size num-processes ngpus num-gpus gpus devices n-gpu nnodes",
        "--scaling.max-workers {}",
    ),
    ("num-workers dataloader-num-workers", "--data.workers {} for loader processes, or --scaling.max-workers {}"),
    ("device accelerator no-cuda cuda cpu gpu use-cpu", "--scaling.accelerator cpu or gpu"),
    ("amp fp16 bf16 mixed-precision precision dtype half", "--precision.autocast bf16 or fp16"),
    ("grad-clip max-grad-norm clip clip-grad clip-grad-norm gradient-clip-val max-norm", "--optim.clip-norm {}"),
    ("warmup warmup-steps num-warmup-steps warmup-iters", "--optim.warmup {}st"),
    ("warmup-epochs", "--optim.warmup {}ep"),
    ("lr-scheduler lr-scheduler-type scheduler", "--optim.schedule constant or cosine"),
    (
        "save-steps save-every save-interval checkpoint-interval save-freq ckpt-interval",
        "--checkpoint.every, such as 500st, 1ep or auto",
    ),
    ("save-total-limit", "--checkpoint.keep-last {}"),
    ("eval-steps eval-every eval-interval val-check-interval", "--eval.every, such as 500st or 1ep"),
    ("log-interval log-every logging-steps print-freq log-freq", "--observe.log-every SECONDS"),
    ("pretrained init-from weights from-pretrained", "--checkpoint.init-from {}"),
    ("fsdp", "--parallel.strategy fsdp"),
    ("ddp", "--parallel.strategy ddp"),
    ("config-file cfg yaml conf options", f"{FILE} {{}}"),
    (
        "local-rank rank local_rank master-addr master-port rdzv-endpoint",
        "nothing: workers find each other by themselves",
    ),
    ("ray-address", "--cluster.address {}"),
]
WORDS = {word: meant for words, meant in _WORDS for word in words.split()}
_OF_THE_JOB = {"lr", "learning-rate", "weight-decay", "wd", "momentum", "betas", "dropout", "optimizer", "model"}


def check_line(options: Sequence[Option], argv: Sequence[str], own: Sequence[str] = ()) -> None:
    """Refuse a line that cannot be parsed. Only numbers, texts, choices and flags are checked: not values of other
    types, nor options inside options of the job.

    Args:
        own: names of job options that may contain further options, or take words of their own.

    Raises:
        ConfigError: with the first mistake.
    """
    known = {o.name: o for o in options}
    flags = {_off(o.name): o for o in options if o.hint is bool}
    seen: Option | None = None  # the option that the next word may belong to
    takes = 0
    inside = False
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            if takes == 0 and not inside and not own:
                raise ConfigError(_stray(word, seen))
            if seen is not None and takes:
                _check_value(seen, word)
            takes = max(0, takes - 1)
            continue
        if seen is not None and takes == 1:
            raise ConfigError(f"{seen.name} has no value; give {_wanted(seen)}")
        name, given, value = _parted(word)
        inside = any(name == n or name.startswith(f"{n}.") for n in own)
        seen, takes = None, 0
        if inside or name in OTHERS:
            continue
        if name in flags or (name in known and known[name].hint is bool):
            seen = known.get(name) or flags[name]
            if given:
                raise ConfigError(_valued(seen, value))
            continue
        if name not in known:
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            brought = value if given else ("" if following.startswith("--") else following)
            raise ConfigError(f"{name} is no option{_meant(name, brought, known)}")
        seen = known[name]
        several = _is_several(seen.hint)
        if given:
            _check_value(seen, value)
            takes = 1 << 20 if several else 0
        else:
            takes = 1 << 20 if several else 1
    if seen is not None and takes == 1:
        raise ConfigError(f"{seen.name} has no value; give {_wanted(seen)}")


def last_value(argv: Sequence[str], name: str) -> str | None:
    """The last value that the line gives to an option of one value, None if it gives none."""
    found = None
    for position, word in enumerate(argv):
        if _parted(word)[0] == name:
            _, given, value = _parted(word)
            found = value if given else (argv[position + 1] if position + 1 < len(argv) else None)
    return found


def _parted(word: str) -> tuple[str, bool, str]:
    """A word's option name, whether it contains a value, and that value."""
    name, given, value = word.partition("=")
    return name.replace("_", "-"), bool(given), value


def _off(name: str) -> str:
    """The name of the option that turns a flag off."""
    section, dot, leaf = name.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{leaf}"


def _stray(word: str, seen: Option | None) -> str:
    if seen is not None and seen.hint is bool:
        return _valued(seen, word)
    after = f"; {seen.name} takes one value" if seen is not None else ""
    return f"{word!r} belongs to no option{after}; options begin with --"


def _valued(flag: Option, value: str) -> str:
    return f"{flag.name} takes no value, and was given {value!r}; {_off(flag.name)} turns it off"


def _check_value(option: Option, text: str) -> None:
    if not text.strip() or any(ord(letter) < 32 for letter in text):
        what = "holds a control character" if text.strip() else "is empty"
        raise ConfigError(f"{option.name} is {text!r}, which {what}; give {_wanted(option)}")
    kinds = _kinds(option.hint)
    if kinds and not any(_reads(kind, text) for kind in kinds):
        raise ConfigError(f"{option.name} is {text!r}; give {_wanted(option)}")


def _reads(kind: Any, text: str) -> bool:
    if kind is type(None):
        return text == "None"
    if typing.get_origin(kind) is typing.Literal:
        return text in map(str, typing.get_args(kind))
    if kind in (int, float):
        try:
            kind(text)
        except ValueError:
            return False
    return True


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The plain types that a value may have; empty if one of the types is not plain."""
    if _is_several(hint):
        hint = typing.get_args(hint)[0]
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    plain = all(k in (int, float, str, type(None)) or typing.get_origin(k) is typing.Literal for k in kinds)
    return kinds if plain else ()


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_several(hint: Any) -> bool:
    """Whether the option takes any number of values: `tuple[T, ...]`."""
    return typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,)


def is_plain(hint: Any) -> bool:
    """Whether `check_line` checks values of this type; others may take words of their own."""
    return hint is bool or bool(_kinds(hint))


def _wanted(option: Option) -> str:
    words = []
    for kind in _kinds(option.hint):
        if typing.get_origin(kind) is typing.Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(kind))))
        elif kind is not type(None):
            words.append({int: "a whole number", float: "a number", str: "a text"}[kind])
    if type(None) in _kinds(option.hint):
        words.append("None")
    return " or ".join(words) or "one"


def _meant(name: str, value: str, known: Mapping[str, Option]) -> str:
    """The end of the sentence: what the writer of this name probably meant."""
    word = name.removeprefix("--").removeprefix("no-").lower()
    leaf = word.rpartition(".")[2]
    leaves = [n for n in known if n.rpartition(".")[2].removeprefix("--") == leaf]
    own = [n for n in leaves if n.startswith("--job.")]
    if own:
        return f"; did you mean {own[0]}?"
    if word in WORDS:
        return "; give " + WORDS[word].replace("{}", value or "N")
    if word in _OF_THE_JOB:
        field = word.replace("-", "_")
        return (
            f"; it is the job's own: a field of its class, such as `{field}: float = 0.001` in a dataclass, is "
            f"--job.{word} on the line"
        )
    if leaves:
        return f"; did you mean {' or '.join(leaves[:3])}?"
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help-all shows all options"
