"""Work in a thread beside the training, so that a device does not wait for hashes and disks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, ParamSpec

Given = ParamSpec("Given")

# Calls that wait; what they hold is bounded where the thread is slower than training.
_MOST_WAITING = 8


class Beside(Generic[Given]):
    """Calls a function in a thread, one call after the other; use it as a context manager.

    All calls have ended when its block ends, however it ends. What the function raises is raised by a later
    call, or at the end of the block.
    """

    def __init__(self, function: Callable[Given, None], *, most_waiting: int = _MOST_WAITING) -> None:
        self._function = function
        self._most_waiting = most_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Callable[Given, None]:
        return self._call

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._settle(at_most=0)

    def _call(self, *args: Given.args, **kwargs: Given.kwargs) -> None:
        self._settle(at_most=self._most_waiting - 1)
        self._waiting.append(self._thread.submit(self._function, *args, **kwargs))

    def _settle(self, at_most: int) -> None:
        """Wait until no more calls than that are unfinished, and raise what those that ended have raised."""
        while self._waiting and (len(self._waiting) > at_most or self._waiting[0].done()):
            self._waiting.popleft().result()
