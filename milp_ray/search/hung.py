"""Trials whose process neither ends nor dies: stopped, or waiting for what does not answer.

Ray knows of processes that end, not of those that do nothing, and Tune waits for a trial as long as it takes.
"""

from __future__ import annotations

import time
from typing import Any

from ray import tune

from milp_ray.telemetry import log_event, logger

AT_LEAST = 600.0  # seconds that every trial is given
_LOOK_AGAIN = 1.0  # seconds between two looks at the trials that run


class HungTrials(tune.Callback):
    """Ends the process of a trial that takes many times as long as any before it.

    Tune then takes the trial for one whose process was lost, and tries it again. Before a trial has ended
    nothing is known of how long they take, and none is ended.

    Args:
        patience: how many times as long; :data:`AT_LEAST` seconds are always waited.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[str, float] = {}  # trial that runs → when that was first seen
        self._longest: float | None = None  # seconds of a trial that ended
        self._looked = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called many times a second."""
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN:
            return
        self._looked = now
        running = {trial.trial_id: trial for trial in trials if _has_process(trial)}
        self._since = {name: self._since.get(name, now) for name in running}
        if self._longest is None:
            return
        limit = max(AT_LEAST, self._patience * self._longest)
        for name, since in list(self._since.items()):
            if now - since > limit:
                del self._since[name]
                self._end(running[name], now - since)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself."""
        since = self._since.pop(trial.trial_id, None)
        seconds = 0.0 if since is None else time.monotonic() - since
        self._longest = max(self._longest or 0.0, seconds)

    def _end(self, trial: Any, seconds: float) -> None:
        import ray

        index = trial.config["trial"]
        logger.warning("trial %d has hung for %.0f s: its process is ended", index, seconds)
        log_event("trial_hung", index=index, seconds=round(seconds, 1))
        ray.kill(trial.temporary_state.ray_actor)


def _has_process(trial: Any) -> bool:
    """Whether it runs, or is being handed to a process that has done other trials before."""
    return trial.status in ("RUNNING", "PENDING") and trial.temporary_state.ray_actor is not None
