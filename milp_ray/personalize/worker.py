"""What runs inside a pool's actor: load a state once, then apply functions to items.

Kept free of Ray, so that it is tested as a plain class.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.telemetry import prepare_worker

# (state, items, report): works on the items together and calls ``report(index, value)`` for each, or
# ``report(index, error)`` for one that failed by itself.
PackFunction = Callable[[Any, Sequence[Any], Callable[[int, Any], None]], None]

_PACKAGE = Path(__file__).resolve().parent.parent


class CannotGoOnError(Exception):
    """What no item is to blame for and every other would meet as well, such as a full disk.

    A function raises it to end the whole map. The message, which is for users, becomes that of a
    :class:`MilpError` in the driver.
    """


@dataclass(frozen=True, slots=True)
class Reply:
    """A function's value, or the class and the safe reason of its exception."""

    value: Any = None
    error: str | None = None
    reason: str | None = None
    seconds: float = 0.0
    ends_all: bool = False  # the error is a CannotGoOnError


class UserWorker:
    """One process with one loaded state. Exceptions of the function become replies: none leaves by Ray.

    Ray would print an exception that leaves an actor, and keep it in its logs, with whatever text of the
    user its message quotes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._state: Any = None

    def __repr__(self) -> str:
        return self._name

    def start(
        self, factory: Callable[[], Any], threads: int, where: Callable[[], str] = str
    ) -> tuple[float, str]:
        """Cap the threads and load the state; the seconds it took, and what ``where`` says of the place."""
        started = time.perf_counter()
        prepare_worker(threads)
        self._state = factory()
        return time.perf_counter() - started, where()

    def run(self, function: PackFunction, items: Sequence[Any]) -> list[Reply]:
        """Apply a function to some items together; a reply each.

        Where it raises, what is not reported yet is done again one by one, so that no item suffers from its
        neighbours.
        """
        started = time.perf_counter()
        replies: dict[int, Reply] = {}

        def report(index: int, value: Any) -> None:
            seconds = (time.perf_counter() - started) / len(items)
            if isinstance(value, Exception):
                replies[index] = Reply(error=type(value).__name__, reason=safe_reason(value), seconds=seconds)
            else:
                replies[index] = Reply(value=value, seconds=seconds)

        try:
            function(self._state, items, report)
        except CannotGoOnError as error:
            reply = Reply(error=type(error).__name__, reason=str(error), ends_all=True)
            return [replies.get(index, reply) for index in range(len(items))]
        except Exception as error:
            if len(items) == 1 and not replies:
                report(0, error)
        if len(items) == 1 and not replies:
            report(0, RuntimeError("the function reported nothing"))
        for index, item in enumerate(items):
            if index not in replies:
                [replies[index]] = self.run(function, [item])
                if replies[index].ends_all:
                    return [replies.get(other, replies[index]) for other in range(len(items))]
        return [replies[index] for index in range(len(items))]


def safe_reason(error: BaseException) -> str:
    """Say what went wrong without any of the user's text.

    The message of a :class:`MilpError` is written for users and never quotes data, so it is kept. Any other
    exception may quote what it choked on: its class is told and the line of this package that it came
    through, and the message is not.
    """
    if isinstance(error, MilpError):
        return str(error)
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE) and path != Path(__file__):
            place = f" at milp_ray/{path.relative_to(_PACKAGE)}:{frame.lineno}"
    return f"{type(error).__name__}{place} (its message is withheld: it may quote the user's text)"
