"""A file that one process at a time holds, and that says who does."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milp_ray.this_process import this_process


@contextmanager
def held_file(path: Path) -> Iterator[bool]:
    """Hold a file, which is made where it is missing; whether it was free.

    The system lets go of it when the process ends, however it ends.
    """
    # (Opened without emptying it: that would be done to what its holder has written, too.)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(json.dumps(this_process()))
        file.flush()
        yield True


def last_holder(path: Path) -> dict[str, Any]:
    """Who took the file last, as :func:`~milp_ray.this_process.this_process` says; empty: it is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
