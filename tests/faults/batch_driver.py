"""A batch on a cluster whose users take their time and train nothing: for the tests beside it.

    python batch_driver.py FOLDER N_USERS SECONDS AT_ONCE

The cluster is the one of RAY_ADDRESS. The pool of workers is the real one. What a worker finishes it writes
to FOLDER, a file a user, unless it is there: so does the store. Prints a line of JSON for each outcome.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.personalize import calls
from milp_ray.personalize.pool import WorkerPool
from milp_ray.telemetry import configure_logging, ray_session


def maker(folder: Path, seconds: float) -> Callable[..., None]:
    """What workers do; a function made here is sent to them by value."""

    def make(state: Any, items: Any, report: Callable[[int, Any], None]) -> None:
        for place, item in enumerate(items):
            made = folder / f"{item:04d}"
            if not made.exists():
                # Many short naps: a process that is stopped for a while loses that time.
                for _ in range(round(seconds / 0.02)):
                    time.sleep(0.02)
                with (folder / "log").open("a", encoding="utf-8") as log:
                    log.write(f"{item}\n")
                made.touch()
            report(place, item)

    return make


def main() -> None:
    """Make what is missing."""
    folder, n_users, seconds, at_once = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        float(sys.argv[3]),
        int(sys.argv[4]),
    )
    calls.SLOW_AT_LEAST, calls.HUNG_AT_LEAST = 6.0, 16.0
    configure_logging()
    folder.mkdir(parents=True, exist_ok=True)
    # No retry: a lost worker that counted against its user would fail it at once.
    section = PersonalizeSection(max_retries=0, patience=16.0)
    with ray_session(RaySection()), WorkerPool(dict, section=section) as pool:
        for outcome in pool.map(maker(folder, seconds), range(n_users), key=str, at_once=at_once):
            told = {"user": outcome.key, "status": outcome.status, "attempts": outcome.attempts}
            print(json.dumps({"event": "outcome", **told, "worker": outcome.worker}), flush=True)


if __name__ == "__main__":
    main()
