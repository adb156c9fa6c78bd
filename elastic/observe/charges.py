"""Worker-seconds and money by cause: where the timeline of a run writes down what each span of time went into."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from elastic.prices import ON_DEMAND, Prices, Tariff

Kind = tuple[str, str, int]  # type and market of a worker's node, and how many workers share the node
Tag = int | str | None  # what time is charged to: an interruption by its index, or by the world that went on after it
Charge = tuple[str, float, Tag]  # cause, share of the time, and what it is charged to


class Book:
    """Sums of charges by cause and tag: worker-seconds, and their cost."""

    def __init__(self, prices: Prices):
        self._prices = prices
        #: [worker-seconds, cost] by cause and tag.
        self.charges: dict[tuple[str, Tag], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.whole_s = self.unpriced_s = self.on_demand = 0.0
        self.on_demand_known = bool(prices)
        self.begin, self.end = math.inf, -math.inf

    def add(self, kinds: Mapping[Kind, int], begin: float, end: float, charges: Iterable[Charge]) -> None:
        """Charge the time of workers from `begin` to `end`, unix seconds; nothing if `end` is not after `begin`.

        Args:
            kinds: the number of workers of each kind.
            charges: the causes; their shares add up to 1.
        """
        if end <= begin:
            return
        seconds, money = (end - begin) * sum(kinds.values()), 0.0
        if self._prices:
            money = sum(count * self._money(kind, begin, end) for kind, count in kinds.items())
        for cause, share, tag in charges:
            found = self.charges[cause, tag]
            found[0] += seconds * share
            found[1] += money * share

    def constant(self, kinds: Iterable[Kind]) -> bool:
        """Return whether the prices of these kinds never change."""
        tariffs = [self._prices.tariff(kind[0], kind[1]) for kind in kinds]
        return all(tariff is None or len(tariff.since) == 1 for tariff in tariffs)

    def _money(self, kind: Kind, begin: float, end: float) -> float:
        tariff = self._prices.tariff(kind[0], kind[1])
        return 0.0 if tariff is None else tariff.cost(begin, end) / _sharers(tariff, kind)

    def lived(self, kind: Kind, begin: float, end: float) -> None:
        """Add the whole life of one worker, unix seconds, to what the charges are compared with."""
        self.whole_s += end - begin
        self.begin, self.end = min(self.begin, begin), max(self.end, end)
        if not self._prices:
            return
        if self._prices.tariff(kind[0], kind[1]) is None:
            self.unpriced_s += end - begin
        on_demand = self._prices.tariff(kind[0], ON_DEMAND)
        if on_demand is None:
            self.on_demand_known = False
        else:
            self.on_demand += on_demand.cost(begin, end) / _sharers(on_demand, kind)


def _sharers(tariff: Tariff, kind: Kind) -> int:
    """Return how many workers share the price: a node's price is shared, a worker's is not."""
    return kind[2] if tariff.of_node else 1
