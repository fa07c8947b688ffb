"""Processes that are lost: those that died, and those that Ray ended as their node ran out of memory.

Ray watches each node's memory, and ends the process that it can best do without before the operating system
ends any. Who waits for an actor that went that way is told of an ``OutOfMemoryError``, which to Ray is no
``RayActorError``: Tune knows the latter only, and what it does not know ends the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError

# What Ray raises where an actor's process is gone.
LOST = (RayActorError, OutOfMemoryError)
# Where Tune takes in how an actor ended. Not part of its interface: one that is not found is left alone.
_TAKEN_IN = ("_actor_start_failed", "_actor_task_failed")


class OutOfMemory(ActorDiedError):
    """An actor that Ray ended as its node ran out of memory, as Tune understands it."""


@contextmanager
def told_to_tune() -> Iterator[None]:
    """Tune takes a process that Ray ended for want of memory for one that died, and tries its trial again."""
    before = {name: getattr(RayActorManager, name) for name in _TAKEN_IN if hasattr(RayActorManager, name)}
    for name, take_in in before.items():
        setattr(RayActorManager, name, _translated(take_in))
    try:
        yield
    finally:
        for name, take_in in before.items():
            setattr(RayActorManager, name, take_in)


def _translated(take_in: Callable[..., None]) -> Callable[..., None]:
    def translated(*args: Any, exception: Exception, **kwargs: Any) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = OutOfMemory()
        take_in(*args, exception=exception, **kwargs)

    return translated
