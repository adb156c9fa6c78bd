"""A search space: the values to try for each option. They are pure functions of the seed and the trial's number.

job.lr=loguniform(1e-4,1e-2)      batch.global-size=choice(32,64)      optim.schedule=grid(constant,cosine)
"""

from __future__ import annotations

import ast
import dataclasses
import math
import random
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job

Value = int | float | str | bool | None
Options = dict[str, Value]

#: Arguments of each kind of domain.
KINDS = {
    "uniform": ("low", "high"),
    "loguniform": ("low", "high"),
    "quniform": ("low", "high", "step"),
    "randint": ("low", "high"),
    "choice": (),
    "grid": (),
}
_DIGITS = 6  # of a drawn number: enough to tell trials apart, few enough to be typed again


@dataclass(frozen=True)
class Domain:
    """The values of one option. `randint` excludes `high`, as in Ray Tune and numpy; the other kinds include it."""

    kind: str
    values: tuple[Value, ...]

    @property
    def low(self) -> float:
        return float(self.values[0])  # type: ignore[arg-type]

    @property
    def high(self) -> float:
        """The greatest value of the domain."""
        return float(self.values[1]) - (self.kind == "randint")  # type: ignore[arg-type]

    @property
    def listed(self) -> bool:
        """Whether its values are listed one by one."""
        return self.kind in ("choice", "grid")

    @property
    def examples(self) -> tuple[Value, ...]:
        """Values to try a configuration with before anything starts: all listed values, or both ends."""
        if self.listed:
            return self.values
        return (self.clip(self.low), self.clip(self.high))

    def draw(self, source: random.Random) -> Value:
        """Draw one value."""
        if self.listed:
            return source.choice(self.values)
        if self.kind == "randint":
            return source.randrange(int(self.low), int(self.high) + 1)
        if self.kind == "loguniform":
            return self.clip(math.exp(source.uniform(math.log(self.low), math.log(self.high))))
        return self.clip(source.uniform(self.low, self.high))

    def clip(self, value: float) -> Value:
        """The nearest value of a numeric domain."""
        value = min(max(value, self.low), self.high)
        if self.kind == "randint":
            return round(value)
        if self.kind == "quniform":
            step = float(self.values[2])  # type: ignore[arg-type]
            steps = min(round((value - self.low) / step), math.floor((self.high - self.low) / step + 1e-9))
            value = self.low + steps * step
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def perturb(self, value: Value, source: random.Random) -> Value:
        """Return a neighbour: the listed value before or after, or the value times 1.2 or 0.8 (as PBT does)."""
        if self.listed:
            at = self.values.index(value) + source.choice((-1, 1))
            return self.values[min(max(at, 0), len(self.values) - 1)]
        assert isinstance(value, (int, float)), value
        return self.clip(value * source.choice((1.2, 0.8)))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.values))})"


Space = Mapping[str, Domain]


def parse_search(texts: Sequence[str] | Mapping[str, str]) -> dict[str, Domain]:
    """Parse `NAME=KIND(values)`, or a mapping from names to `KIND(values)`.

    Raises:
        ConfigError: a text cannot be parsed, a name is given twice, or there is none.
    """
    pairs = list(texts.items()) if isinstance(texts, Mapping) else [_split(text) for text in texts]
    found: dict[str, Domain] = {}
    for name, text in pairs:
        name = name.strip().removeprefix("--").replace("_", "-")
        if name in found:
            raise ConfigError(f"--search names {name!r} twice; give it once")
        found[name] = parse_domain(name, text)
    if not found:
        raise ConfigError("a sweep needs something to search; give --search NAME=KIND(values)")
    return found


def _split(text: str) -> tuple[str, str]:
    name, equals, domain = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--search is {text!r}; give NAME=KIND(values), for example job.lr=loguniform(1e-4,1e-2)")
    return name, domain


def parse_domain(name: str, text: str) -> Domain:
    """Parse one `KIND(values)`. Bare words are strings; nothing is evaluated.

    Raises:
        ConfigError: the text cannot be parsed.
    """
    where = f"--search {name}={text.strip()}"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"{where} cannot be read; give KIND(values) with a kind of {', '.join(KINDS)}") from None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and node.func.id in KINDS:
        return check_domain(where, Domain(node.func.id, tuple(_literal(where, argument) for argument in node.args)))
    raise ConfigError(f"{where} is no KIND(values); give a kind of {', '.join(KINDS)}")


def _literal(where: str, node: ast.expr) -> Value:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _literal(where, node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    raise ConfigError(f"{where} holds {ast.unparse(node)!r}; give numbers, words, True, False or None")


def check_domain(where: str, domain: Domain) -> Domain:
    """Refuse a domain without values.

    Raises:
        ConfigError: with a sentence that begins with `where`.
    """
    kind, values, wanted = domain.kind, domain.values, KINDS[domain.kind]
    if domain.listed:
        if not values:
            raise ConfigError(f"{where} has no values; give at least one")
        if len({(type(v), v) for v in values}) != len(values):
            raise ConfigError(f"{where} has a value twice; give each once")
        return domain
    if len(values) != len(wanted):
        raise ConfigError(f"{where} has {len(values)} values; give {kind}({', '.join(wanted)})")
    whole = kind == "randint"
    for label, value in zip(wanted, values):
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not math.isfinite(value):  # type: ignore[arg-type]
            raise ConfigError(f"{where} has {value!r} as {label}; give a {'whole' if whole else 'finite'} number")
    low, high = float(values[0]), float(values[1])  # type: ignore[arg-type]
    if not low < high:
        raise ConfigError(f"{where} has no values from {values[0]} to {values[1]}; give low below high")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{where} begins at {values[0]}; give a low above 0, or use uniform")
    if kind == "quniform" and not 0 < float(values[2]) <= high - low:  # type: ignore[arg-type]
        raise ConfigError(f"{where} goes in steps of {values[2]}; give a step above 0 that fits between low and high")
    return domain


# ---- trials --------------------------------------------------------------------------------------------------------


def grid_size(space: Space) -> int:
    """The number of combinations of the grids' values; 1 without grids."""
    return math.prod(len(domain.values) for domain in space.values() if domain.kind == "grid")


def draw(space: Space, seed: int, number: int) -> Options:
    """The options of trial `number` (from 0): grids are enumerated, the last one fastest, other options are drawn.

    The draw for one option does not depend on the others, so adding an option to the space changes no other values.
    """
    point: Options = {}
    rest = number
    for name in reversed([name for name, domain in space.items() if domain.kind == "grid"]):
        rest, place = divmod(rest, len(space[name].values))
        point[name] = space[name].values[place]
    return {name: point.get(name) if name in point else _draw(d, seed, number, name) for name, d in space.items()}


def _draw(domain: Domain, seed: int, number: int, name: str) -> Value:
    return domain.draw(random.Random(f"sweep/{seed}/{number}/{name}"))  # Python seeds by the text's sha512


# ---- options -------------------------------------------------------------------------------------------------------

_OURS = ("run.duration",)  # schedulers count evaluations, which must be of equal length in all trials


def check_names(space: Space, job: Job, config: TrainConfig) -> None:
    """Refuse names that are no result options of this job, and values that do not fit their types.

    Raises:
        ConfigError: with one sentence, and the nearest name.
    """
    known = searchable(job, config)
    for name, domain in space.items():
        if name not in known:
            raise ConfigError(_unknown(name, known, config))
        hint = known[name]
        for value in domain.examples:
            if not fits_type(value, hint):
                raise ConfigError(f"--search {name}={domain} has {value!r}, but --{name} is {_type_text(hint)}")


def _unknown(name: str, known: Mapping[str, Any], config: TrainConfig) -> str:
    import difflib

    part, _, leaf = name.partition(".")
    section = getattr(config, part.replace("-", "_"), None)
    if name in _OURS:
        return f"--search names {name!r}, which schedulers cut short themselves; give --{name} one value"
    if dataclasses.is_dataclass(section) and hasattr(section, leaf.replace("-", "_")):
        return f"--search names {name!r}, which does not change what a run computes; give --{name} one value"
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it may be one of {', '.join(sorted(known))}"
    return f"--search names {name!r}, which is no option of this job; {hint}"


def searchable(job: Job, config: TrainConfig) -> dict[str, Any]:
    """The type of every option that may be searched, by name: these are all result options."""
    found: dict[str, Any] = {}
    if dataclasses.is_dataclass(job):
        hints = typing.get_type_hints(type(job))
        found |= {_dashed(f"job.{f.name}"): hints[f.name] for f in dataclasses.fields(job) if f.init}
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        if dataclasses.is_dataclass(section):
            hints = typing.get_type_hints(type(section))
            fields = [f for f in dataclasses.fields(section) if f.metadata.get("result")]
            found |= {_dashed(f"{part.name}.{f.name}"): hints[f.name] for f in fields}
    return {name: hint for name, hint in found.items() if name not in _OURS}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def fits_type(value: Value, hint: Any) -> bool:
    """Whether an option of this type can have the value."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits_type(value, inner) for inner in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (None, type(None)):
        return value is None
    return isinstance(hint, type) and isinstance(value, hint)


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    inner = [names.get(h, str(h)) for h in typing.get_args(hint) or (hint,) if h is not type(None)]
    return " or ".join(inner)


def apply(options: Mapping[str, Value], job: Job, config: TrainConfig) -> tuple[Job, TrainConfig]:
    """The job and the configuration with these options.

    Raises:
        ConfigError: a value is not possible.
    """
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        part, _, leaf = name.replace("-", "_").partition(".")
        if part == "job":
            own[leaf] = _as_float(value, typing.get_type_hints(type(job))[leaf])
        else:
            section = getattr(config, part)
            parts.setdefault(part, {})[leaf] = _as_float(value, typing.get_type_hints(type(section))[leaf])
    if own:
        job = replace(job, **own)  # type: ignore[type-var]
    changed: dict[str, Any] = {part: replace(getattr(config, part), **values) for part, values in parts.items()}
    return job, replace(config, **changed)


def _as_float(value: Value, hint: Any) -> Value:
    """Convert a whole number for an option that takes floats: 1 and 1.0 are the same option."""
    takes_whole = hint is int or int in typing.get_args(hint)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and not takes_whole else value
