"""What workers cost: prices by node type and market, which may change during a run. Pure, but for reading a file."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elastic.errors import ConfigError

ANY = "*"
ON_DEMAND = "on-demand"
MARKETS = ("spot", ON_DEMAND)
FORMAT = 1
_OPTION = "--observe.price"
_FILE = ".json"
_SPEC = re.compile(r"(?:(?P<type>[^\s=:]+)(?::(?P<market>[a-z-]+))?=)?(?P<price>[-+0-9.a-z]+?)(?P<hour>/h)?\Z")
_FIX = (
    'give a price of one worker for one hour, such as 0.40, of a node, such as "g5.xlarge=0.40/h" or '
    '"g5.xlarge:on-demand=1.01/h", or a file of prices'
)


@dataclass(frozen=True)
class Price:
    """The price of one hour of a node of this type, or of one worker if no type is named.

    Args:
        type: of the node; ANY for all types without a price of their own.
        market: spot or on-demand; ANY for both.
        since: the price holds from this time on, unix seconds; -inf for ever.
    """

    type: str
    market: str
    per_hour: float
    since: float = -math.inf

    @property
    def of_node(self) -> bool:
        return self.type != ANY


@dataclass(frozen=True)
class Tariff:
    """One price as it changes: `per_second[i]` from `since[i]` on. Before the first, the first holds."""

    since: tuple[float, ...]
    per_second: tuple[float, ...]
    of_node: bool

    def cost(self, begin: float, end: float) -> float:
        """Return the cost of the time from `begin` to `end`, unix seconds."""
        if len(self.since) == 1:
            return (end - begin) * self.per_second[0]
        first, last = (max(0, bisect_right(self.since, at) - 1) for at in (begin, end))
        bounds = [begin, *self.since[first + 1 : last + 1], end]
        return sum((b - a) * p for a, b, p in zip(bounds, bounds[1:], self.per_second[first : last + 1]))


@dataclass(frozen=True)
class Prices:
    """All known prices."""

    known: tuple[Price, ...] = ()
    _found: dict[tuple[str, str], Tariff | None] = field(default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.known)

    def to_json(self) -> list[dict[str, Any]]:
        """JSON values, for the ledger."""
        return [
            {
                "type": p.type,
                "market": p.market,
                "price": p.per_hour,
                **({} if p.since == -math.inf else {"from": p.since}),
            }
            for p in self.known
        ]

    @staticmethod
    def from_json(values: Any) -> Prices:
        """Parse what `to_json` returned; invalid prices are left out."""
        found = []
        for value in values if isinstance(values, list) else ():
            try:
                found.append(_entry("the ledger", value))
            except (ConfigError, AttributeError):
                continue
        return Prices(tuple(found))

    def tariff(self, type: str, market: str) -> Tariff | None:
        """Return the tariff of a worker on such a node, or None if no price is known.

        Args:
            type, market: of its node; "" if it is not known.
        """
        key = (type, market)
        if key not in self._found:
            self._found[key] = self._find(type, market)
        return self._found[key]

    def _find(self, type: str, market: str) -> Tariff | None:
        """The price that says most: of its type and market, of its type, of its market, of any. Where the market is not
        known, the lowest price of the type may be too low, so spot is not taken for on-demand or the other way round
        but where there is one of the two alone."""
        for of_type in (type, ANY):
            there = [p for p in self.known if p.type == of_type]
            markets = {p.market for p in there}
            wanted = market or (next(iter(markets)) if len(markets) == 1 else "spot")
            for of_market in (wanted, ANY):
                found = sorted((p for p in there if p.market == of_market), key=lambda p: p.since)
                if found:
                    since, rates = tuple(p.since for p in found), tuple(p.per_hour / 3600 for p in found)
                    return Tariff(since, rates, found[0].of_node)
        return None


def read_prices(given: Sequence[str | float]) -> Prices:
    """Parse `--observe.price`: prices, or names of files with prices.

    Raises:
        ConfigError: one is neither.
    """
    return Prices(tuple(price for one in given for price in _read(one)))


def check_price(one: str | float) -> None:
    """Refuse what is neither a price nor the name of a file of prices, which is not looked into.

    Raises:
        ConfigError: in one sentence.
    """
    text = str(one).strip()
    if not text.endswith(_FILE):
        _read(text)


def _read(one: str | float) -> Iterable[Price]:
    text = str(one).strip()
    if text.endswith(_FILE):
        return _read_file(text)
    found = _SPEC.match(text)
    try:
        per_hour = float(found["price"]) if found else None
    except ValueError:
        per_hour = None
    if found is None or per_hour is None:
        raise ConfigError(f"{_OPTION} is {text!r}; {_FIX}")
    if found["type"] and not found["hour"]:
        raise ConfigError(f"{_OPTION} is {text!r}; say for how long: {text}/h")
    return [_checked(text, found["type"] or ANY, found["market"] or ANY, per_hour)]


def _checked(named: str, type: Any, market: Any, per_hour: Any, since: float = -math.inf) -> Price:
    if isinstance(per_hour, bool) or not isinstance(per_hour, (int, float)) or not 0 <= per_hour < math.inf:
        raise ConfigError(f"{_OPTION} is {named!r}; a price is a finite number from 0 on, not {per_hour!r}")
    if market not in (*MARKETS, ANY):
        raise ConfigError(f"{_OPTION} is {named!r}; a market is one of {', '.join(MARKETS)}, not {market!r}")
    if not isinstance(type, str) or not type:
        raise ConfigError(f"{_OPTION} is {named!r}; a type is the name of a node type, not {type!r}")
    return Price(type, market, float(per_hour), since)


def _read_file(name: str) -> Iterable[Price]:
    """A file `{"format": 1, "prices": [{"type": ..., "market": ..., "price": per hour, "from": a time}, ...]}`."""
    try:
        whole = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"no JSON: {error}"
        raise ConfigError(f"{_OPTION} is {name!r}, which cannot be read ({why}); {_FIX}") from error
    entries = whole.get("prices") if isinstance(whole, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(f'{_OPTION} is {name!r}, which has no list "prices" of objects; {_FIX}')
    if whole.get("format", FORMAT) != FORMAT:
        raise ConfigError(f"{_OPTION} is {name!r} of format {whole['format']!r}; this version reads format {FORMAT}")
    return [_entry(name, entry) for entry in entries]


def _entry(name: str, entry: dict[str, Any]) -> Price:
    at = _time(name, entry.get("from"))
    return _checked(name, entry.get("type", ANY), entry.get("market", ANY), entry.get("price"), at)


def _time(name: str, given: Any) -> float:
    """Unix seconds of a number, or of a text such as 2026-11-28T10:00:00Z; without an offset it is UTC."""
    if given is None:
        return -math.inf
    if isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given):
        return float(given)
    try:
        at = datetime.fromisoformat(str(given).replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(
            f'{_OPTION} is {name!r}, where "from" is {given!r}; give a time such as 2026-11-28T10:00:00Z'
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
