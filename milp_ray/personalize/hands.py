"""Items on their way through a pool, and how they are dealt to its workers."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

Item = TypeVar("Item")

# Items looked at ahead of the workers when the longest is picked, and the most that their sizes may add up
# to: together they bound the memory of a long iterator.
LOOKAHEAD = 4096
LOOKAHEAD_SIZE = 64e6
# Items a worker is given at once: several packs of them, so that slots that become free are filled again;
# and the most that their sizes may add up to, where it is more than one item.
MOST_AT_ONCE = 64
MOST_SIZE_AT_ONCE = 8e6


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item."""

    key: str  # the user's id
    status: Literal["done", "failed"]
    value: Any = None  # what the function returned; None for a failed item
    error: str | None = None  # class of the exception, "WorkerLost" for a lost worker
    reason: str | None = None  # never holds a user's text
    attempts: int = 1
    seconds: float = 0.0  # inside the function, of the last attempt
    worker: str = ""

    @property
    def failed(self) -> bool:
        """Whether the item has no result."""
        return self.status == "failed"


@dataclass(order=True, slots=True)
class Task(Generic[Item]):
    """One item in the queue: the largest first, then in the order given.

    One that was alone with a worker that was lost goes behind all others, so that it holds up nobody, and
    whatever made the worker's machine fail has time to pass.
    """

    n_lost: int = field(init=False, default=0)
    rank: tuple[float, int]
    key: str = field(compare=False)
    item: Item = field(compare=False)
    size: float = field(compare=False)
    attempts: int = field(default=0, compare=False)
    lost_on: list[str] = field(default_factory=list, compare=False)  # nodes of workers lost with it alone
    alone: bool = field(default=False, compare=False)  # something went wrong with it in company
    is_done: bool = field(default=False, compare=False)  # it has its outcome


class Queue(Generic[Item]):
    """Items by size, the largest of those looked at first; reads its source only as it is emptied."""

    def __init__(
        self, items: Iterable[Item], key: Callable[[Item], str], size: Callable[[Item], float]
    ) -> None:
        self._source = iter(items)
        self._key = key
        self._size = size
        self._order = itertools.count()
        self._heap: list[Task[Item]] = []
        self._total = 0.0  # of the sizes in the heap
        self._fill()

    def __len__(self) -> int:
        return len(self._heap)

    def deal(self, n_hands: int, most: int) -> list[Task[Item]]:
        """Take a hand: every ``n_hands``-th of the largest tasks, so that what is left makes equal hands.

        At most ``most`` tasks of :data:`MOST_SIZE_AT_ONCE` together; one that has to be done alone makes a
        hand of its own.
        """
        first = heapq.heappop(self._heap)
        hand = [first]
        if not first.alone:
            n_each = min(most, math.ceil((len(self._heap) + 1) / n_hands))
            total = first.size
            left: list[Task[Item]] = []
            while self._heap and len(hand) < n_each and total + self._heap[0].size <= MOST_SIZE_AT_ONCE:
                task = heapq.heappop(self._heap)
                if (len(left) + len(hand)) % n_hands == 0 and not task.alone:
                    hand.append(task)
                    total += task.size
                else:
                    left.append(task)
            for task in left:
                heapq.heappush(self._heap, task)
        self._total -= sum(task.size for task in hand)
        self._fill()
        return hand

    def push_back(self, task: Task[Item]) -> None:
        """Return a task whose worker was lost."""
        task.n_lost = len(task.lost_on)
        self._total += task.size
        heapq.heappush(self._heap, task)

    def _fill(self) -> None:
        while len(self._heap) < LOOKAHEAD and (self._total < LOOKAHEAD_SIZE or not self._heap):
            new = list(itertools.islice(self._source, 1))
            if not new:
                return
            [item] = new
            size = self._size(item)
            self._total += size
            heapq.heappush(self._heap, Task((-size, next(self._order)), self._key(item), item, size))
