"""Working, short-term and long-term memory of a user's turns, with promotion by how often a turn is used."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from milp_ray.methods.ranking import by_bm25

if TYPE_CHECKING:
    from milp_ray.config.methods import MalpSection


class Memories:
    """Places of turns in time order, in one of three memories or forgotten.

    A new turn enters working memory, which holds the latest few; what leaves it enters short-term memory,
    whose least recently used turn is dropped where it is full. A turn of short-term memory that was used
    often enough moves to long-term memory, which drops nothing.
    """

    def __init__(self, texts: Sequence[str], section: MalpSection) -> None:
        self._section = section
        self._rank = by_bm25(texts)
        self._texts = texts
        self._working: deque[int] = deque()
        self._short: OrderedDict[int, int] = OrderedDict()  # place → uses, the least recently used first
        self._long: list[int] = []

    @property
    def kept(self) -> list[int]:
        """All that is not forgotten, in time order."""
        return sorted([*self._working, *self._short, *self._long])

    @property
    def long_term(self) -> list[int]:
        """What was used often, in the order of its promotion."""
        return list(self._long)

    def observe(self, place: int) -> None:
        """A turn is said: the older one that it is most like is used, and it enters working memory."""
        self.use(self._texts[place], k=1)
        self._working.append(place)
        if len(self._working) > self._section.working:
            self._short[self._working.popleft()] = 0
        if len(self._short) > self._section.short_term:
            self._short.popitem(last=False)

    def use(self, query: str, k: int) -> None:
        """The ``k`` turns of short-term memory that are most like a query are used."""
        found = [place for place in self._rank(query) if place in self._short][:k]
        for place in found:
            self._short[place] += 1
            self._short.move_to_end(place)
            if self._short[place] >= self._section.promote_after:
                del self._short[place]
                self._long.append(place)
