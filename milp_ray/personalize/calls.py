"""What a pool's workers are busy with, and which of them take far longer than the others would."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Generic

from milp_ray.personalize.hands import Item, Task

# A call that takes so many times as long as others of its size, and so many seconds at least, holds up the
# others: workers that have nothing else to do begin it again.
SLOW, SLOW_AT_LEAST = 4.0, 30.0
HUNG_AT_LEAST = 600.0  # seconds that a call is given before its worker is ended
_MOST_REMEMBERED = 101


@dataclass(slots=True)
class Call(Generic[Item]):
    """Some items that a worker was given together, and when."""

    tasks: list[Task[Item]]
    since: float = field(default_factory=time.monotonic)
    is_begun_again: bool = False  # by another worker, while this one still works on it

    @property
    def unfinished(self) -> list[Task[Item]]:
        """Items that have no outcome yet; another worker may have been faster."""
        return [task for task in self.tasks if not task.is_done]

    @property
    def seconds(self) -> float:
        """For how long it has been worked on."""
        return time.monotonic() - self.since


class Pace:
    """How long calls take: the median of the latest ones, by their number of items and by their size."""

    def __init__(self) -> None:
        self._by_number: deque[float] = deque(maxlen=_MOST_REMEMBERED)
        self._by_size: deque[float] = deque(maxlen=_MOST_REMEMBERED)

    def ended(self, call: Call[Item]) -> None:
        """A worker has replied."""
        seconds, size = call.seconds, sum(task.size for task in call.tasks)
        self._by_number.append(seconds / len(call.tasks))
        if size > 0:
            self._by_size.append(seconds / size)

    def expected(self, call: Call[Item]) -> float | None:
        """Seconds that a call takes, the larger of both guesses; ``None`` before any has ended."""
        if not self._by_number:
            return None
        size = sum(task.size for task in call.tasks)
        return max(
            _lower_median(self._by_number) * len(call.tasks),
            _lower_median(self._by_size) * size if self._by_size else 0.0,
        )

    def is_slow(self, call: Call[Item]) -> bool:
        """Whether it holds up the others."""
        expected = self.expected(call)
        return expected is not None and call.seconds > max(SLOW_AT_LEAST, SLOW * expected)

    def has_hung(self, call: Call[Item], patience: float) -> bool:
        """Whether it takes so many times as long as expected that it will not end."""
        expected = self.expected(call)
        return expected is not None and call.seconds > max(HUNG_AT_LEAST, patience * expected)


def _lower_median(values: deque[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
