"""A run's adapters continued with what is new since they were made."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.pipeline.work import working

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.rundir import RunFolder
    from milp_ray.users.records import UserSplit


def update(
    run: RunFolder, config: Config, user_ids: Sequence[str] | None = None, *, as_json: bool = False
) -> int:
    """Continue adapters with what is new since they were made, for all users or for some; print the outcomes.

    Returns:
        How many users failed.

    Raises:
        MilpError: the run has no user of an id.
    """
    from milp_ray.personalize.update import update as update_adapters
    from milp_ray.personalize.update import update_table

    with working(run, config, "update") as work:
        started = time.perf_counter()
        # Standard output is for the JSON alone, where that is asked for.
        with redirect_stdout(sys.stderr if as_json else sys.stdout):
            try:
                # Ray and its workers are started only where there is something to do.
                summary = update_adapters(
                    run,
                    work.splits if user_ids is None else _some(work.splits, user_ids),
                    work.recipe,
                    section=config.update,
                    personalize=config.personalize,
                    ray=config.ray,
                )
            finally:
                run.record_seconds("update", time.perf_counter() - started)
        run.record_facts(update=summary.to_dict())
        work.failures["update"] = summary.reasons.get("failed", {})
        if as_json:
            print(json.dumps(summary.to_dict(), indent=2, allow_nan=False))
            return summary.users["failed"]
        work.console.print(update_table(summary))
        if summary.users["kept"] or summary.users["failed"]:
            work.say(f"users whose adapter was not replaced, one a line: {run.updates_file}")
        return summary.users["failed"]


def _some(splits: Sequence[UserSplit], user_ids: Sequence[str]) -> list[UserSplit]:
    """The users of these ids."""
    wanted = set(user_ids)
    found = [split for split in splits if split.user_id in wanted]
    missing = sorted(wanted - {split.user_id for split in found})
    if missing:
        raise MilpError(
            f"the run has no user {missing[0]!r}"
            + (f" and {len(missing) - 1} others" * (len(missing) > 1))
            + "; `milp-ray users check CONFIG` lists what was read"
        )
    return found
