"""What runs inside a pool's actor: load a state once, then apply functions to items.

Kept free of Ray, so that it is tested as a plain class.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.telemetry import prepare_worker

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Reply:
    """A function's value, or the class and the safe reason of its exception."""

    value: Any = None
    error: str | None = None
    reason: str | None = None
    seconds: float = 0.0


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

    def start(self, factory: Callable[[], Any], threads: int) -> float:
        """Cap the threads and load the state; the seconds it took."""
        started = time.perf_counter()
        prepare_worker(threads)
        self._state = factory()
        return time.perf_counter() - started

    def run(self, function: Callable[[Any, Any], Any], item: Any) -> Reply:
        """Apply a function to one item."""
        started = time.perf_counter()
        try:
            value = function(self._state, item)
        except Exception as error:
            reason = safe_reason(error)
            return Reply(error=type(error).__name__, reason=reason, seconds=time.perf_counter() - started)
        return Reply(value=value, seconds=time.perf_counter() - started)


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
